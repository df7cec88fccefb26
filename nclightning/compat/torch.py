"""Undocumented names of torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

__all__ = [
    "COMPILED_PREFIX",
    "HOLDERS",
    "OwnEntries",
    "buffers_of",
    "default_store",
    "has_hooks",
    "is_compiled",
    "leave_out_of_ddp",
    "parameters_of",
    "sees_gradients",
    "uncompiled",
    "version_of",
]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

HOLDERS = frozenset({"_parameters", "_buffers", "_modules"})
"""Names of the dictionaries in which a module keeps parameters, buffers and submodules.

Non-public: ``Module._parameters``, ``Module._buffers``, ``Module._modules`` (torch 2.13). Without them messages would
name a layer ``_modules.head`` where the user wrote ``head``.
"""


def version_of(tensor: Tensor) -> int:
    """Return the number of writes to a tensor; -1 if torch does not count them, as in inference mode.

    Non-public: ``Tensor._version`` (torch 2.13). Without it a write to a parameter between two steps, or to a head
    between two passes, would go unnoticed, and outdated gradients and statistics would be used.

    Args:
        tensor: Any tensor.
    """
    return -1 if tensor.is_inference() else tensor._version


def parameters_of(module: nn.Module) -> Mapping[str, nn.Parameter | None]:
    """Return the parameters of a module by name, without those of its submodules.

    Non-public: ``Module._parameters`` (torch 2.13). ``named_parameters(recurse=False)`` is ten times slower, which a
    full-batch run pays at each measurement for each layer. It also leaves out repeated parameters.

    Args:
        module: Any module.
    """
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the dictionary in which a module keeps its buffers, for reading and restoring them.

    Non-public: ``Module._buffers`` (torch 2.13). ``setattr`` would restore a deleted buffer as a plain attribute,
    which ``state_dict`` leaves out.

    Args:
        module: Any module.
    """
    return module._buffers


COMPILED_PREFIX = "_orig_mod."
"""The prefix that ``torch.compile(module)`` adds to the names of submodules and parameters.

Non-public: ``OptimizedModule._orig_mod`` (torch 2.13). Without it a name that the user copied from ``named_modules()``
of the compiled model would not be found.
"""


def uncompiled(module: nn.Module) -> nn.Module | None:
    """Return the module inside one that ``torch.compile(module)`` returned; None for any other module.

    Non-public: ``OptimizedModule._orig_mod`` (torch 2.13). Without it a compiled model could not be measured, because
    its graphs do not call hooks.
    """
    inner = getattr(module, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else None


def is_compiled(module: nn.Module) -> bool:
    """Return whether a module, or a function in its attributes, is compiled to a graph, in which new hooks do not fire.

    Non-public: ``_torchdynamo_orig_callable`` of a compiled function (torch 2.13). Without it a compiled model would be
    measured with hooks that never fire.

    Args:
        module: Any module. Its submodules are not looked at.
    """
    # torch.compile(module) and module.compile() also set an attribute that is a compiled function.
    return any(hasattr(value, "_torchdynamo_orig_callable") for value in vars(module).values())


def has_hooks(modules: Iterable[nn.Module]) -> bool:
    """Return whether one of several modules has a forward or backward hook, or there is one for all modules.

    Non-public: ``Module._forward_hooks``, ``_forward_pre_hooks``, ``_backward_hooks``, ``_backward_pre_hooks``, and
    ``_global_forward_hooks``, ``_global_forward_pre_hooks``, ``_global_backward_hooks``,
    ``_global_backward_pre_hooks`` of ``torch.nn.modules.module`` (torch 2.13). Without them the closed form of the
    unconstrained feature model, which calls no module, would ignore hooks that change training.

    Args:
        modules: The modules. Their submodules are not looked at.
    """
    return any(getattr(nn.modules.module, f"_global{name}") for name in _HOOKS) or any(
        getattr(module, name) for module in modules for name in _HOOKS
    )


def sees_gradients(tensor: Tensor) -> bool:
    """Return whether a tensor has a hook on its gradient, which may change it.

    Non-public: ``Tensor._backward_hooks``, ``Tensor._post_accumulate_grad_hooks`` (torch 2.13). Without them the closed
    form of the unconstrained feature model would ignore hooks that change gradients.

    Args:
        tensor: A leaf tensor.
    """
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)


def leave_out_of_ddp(module: nn.Module, names: Iterable[str]) -> None:
    """Exclude parameters from the synchronisation of ``DistributedDataParallel``.

    Non-public: ``_ddp_params_and_buffers_to_ignore`` of a module (torch 2.13, lightning 2.6). Without it the features
    of the unconstrained feature model, of which each process has its own rows, would be overwritten.

    Args:
        module: The module that will be wrapped.
        names: Dotted names of the parameters.
    """
    module._ddp_params_and_buffers_to_ignore = list(names)  # type: ignore[assignment]


def default_store() -> Any:
    """Return the store with which torch.distributed was initialised; None if this version has no such function.

    Non-public: ``torch.distributed.distributed_c10d._get_default_store`` (torch 2.13). Without it a process that
    measures alone could only communicate by a collective, which would mix with the collectives of training.
    """
    make = getattr(dist.distributed_c10d, "_get_default_store", None)
    return None if make is None else make()


class OwnEntries(nn.Module):
    """A module that can change its own entries of a ``state_dict``.

    Non-public: ``Module._save_to_state_dict``, ``Module._load_from_state_dict`` (torch 2.13). The public hooks are
    bound to an instance, so that a copy of a module would run those of the original, and torch 2.4 has them for saving
    only. Without them each process would save its own rows of the features as if they were all rows.
    """

    def change_saved(self, entries: dict[str, Any], prefix: str) -> None:
        """Change the saved entries in place.

        Args:
            entries: The entries of the whole ``state_dict``.
            prefix: Prefix of the names of this module's entries.
        """

    def change_loaded(self, entries: dict[str, Any], prefix: str) -> dict[str, Any]:
        """Return the entries to load.

        Args:
            entries: The entries of the whole ``state_dict``. Entries that are deleted from it count as loaded.
            prefix: Prefix of the names of this module's entries.
        """
        return entries

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        self.change_saved(destination, prefix)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(self.change_loaded(state_dict, prefix), prefix, *args)
