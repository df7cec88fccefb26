"""Names of torch that its documentation does not promise."""

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
"""Dictionaries in which a module keeps its parts.

Non-public: ``Module._parameters``, ``Module._buffers``, ``Module._modules`` (torch 2.13). Without them messages would
name a layer ``_modules.head`` where the user wrote ``head``.
"""


def version_of(tensor: Tensor) -> int:
    """Count the writes to a tensor; -1 where nobody counts them, as in inference mode.

    Non-public: ``Tensor._version`` (torch 2.13). Without it a write to a parameter between two steps, or to a head
    between two passes, is not seen: gradients and statistics of other values would be taken for those of now.

    Args:
        tensor: Any.
    """
    return -1 if tensor.is_inference() else tensor._version


def parameters_of(module: nn.Module) -> Mapping[str, nn.Parameter | None]:
    """Return the parameters of a module by name, without those of its submodules, however often they are shared.

    Non-public: ``Module._parameters`` (torch 2.13). ``named_parameters(recurse=False)`` does the same ten times slower,
    which a full-batch run pays at each reading for each layer.

    Args:
        module: Any module.
    """
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the dictionary in which a module keeps its buffers, to read and to put them back.

    Non-public: ``Module._buffers`` (torch 2.13). ``setattr`` would put a buffer that a forward has deleted back as a
    plain attribute, which ``state_dict`` leaves out.

    Args:
        module: Any module.
    """
    return module._buffers


COMPILED_PREFIX = "_orig_mod."
"""What ``torch.compile(module)`` puts before the names of parts.

Non-public: ``OptimizedModule._orig_mod`` (torch 2.13). Without it ``head="fc"`` could not be written as the names of
``named_modules()`` are.
"""


def uncompiled(module: nn.Module) -> nn.Module | None:
    """Return the module inside what ``torch.compile(module)`` returned; None of any other.

    Non-public: ``OptimizedModule._orig_mod`` (torch 2.13). Without it a compiled model could not be measured, as its
    graphs show nothing to hooks.
    """
    inner = getattr(module, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else None


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` runs a module or a function in its attributes as a graph, in which no new hook fires.

    Non-public: ``_torchdynamo_orig_callable`` of a compiled function (torch 2.13). Without it a compiled model would be
    measured with hooks that never fire.

    Args:
        module: Any module; its submodules do not count.
    """
    # What torch.compile(module) and module.compile() make has a compiled function among its attributes, too.
    return any(hasattr(value, "_torchdynamo_orig_callable") for value in vars(module).values())


def has_hooks(modules: Iterable[nn.Module]) -> bool:
    """Whether somebody is to see each forward or backward of a module, by a hook on it or on all modules.

    Non-public: ``Module._forward_hooks``, ``_forward_pre_hooks``, ``_backward_hooks``, ``_backward_pre_hooks``, and
    ``_global_forward_hooks``, ``_global_forward_pre_hooks``, ``_global_backward_hooks``,
    ``_global_backward_pre_hooks`` of ``torch.nn.modules.module`` (torch 2.13). Without them the closed form of the
    unconstrained feature model, which calls no module, would pass over hooks that change what is trained.

    Args:
        modules: Each with hooks of its own; those of submodules do not count.
    """
    return any(getattr(nn.modules.module, f"_global{name}") for name in _HOOKS) or any(
        getattr(module, name) for module in modules for name in _HOOKS
    )


def sees_gradients(tensor: Tensor) -> bool:
    """Whether a hook is to see, and may change, the gradient of a tensor.

    Non-public: ``Tensor._backward_hooks``, ``Tensor._post_accumulate_grad_hooks`` (torch 2.13). Without them the closed
    form of the unconstrained feature model would pass over hooks that change gradients.

    Args:
        tensor: A leaf.
    """
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)


def leave_out_of_ddp(module: nn.Module, names: Iterable[str]) -> None:
    """Let ``DistributedDataParallel`` leave parameters as they are on each process.

    Non-public: ``_ddp_params_and_buffers_to_ignore`` of a module (torch 2.13, lightning 2.6). Without it the features
    of the unconstrained feature model, of which each process has rows of its own, would be made equal.

    Args:
        module: What is to be wrapped.
        names: Dotted names in it.
    """
    module._ddp_params_and_buffers_to_ignore = list(names)  # type: ignore[assignment]


def default_store() -> Any:
    """Return the store by which processes found each other; None if this torch keeps it elsewhere.

    Non-public: ``torch.distributed.distributed_c10d._get_default_store`` (torch 2.13). Without it a process that
    measures alone would wait in a collective, which those of the others that train would be taken for.
    """
    make = getattr(dist.distributed_c10d, "_get_default_store", None)
    return None if make is None else make()


class OwnEntries(nn.Module):
    """A module that has a say in its own entries of a ``state_dict``.

    Non-public: ``Module._save_to_state_dict``, ``Module._load_from_state_dict`` (torch 2.13). The public hooks are
    bound to an instance, so that a copy of a module would run those of the original, and torch 2.4 has them for saving
    only. Without them each process would save the rows of the features that it has, as if they were all.
    """

    def change_saved(self, entries: dict[str, Any], prefix: str) -> None:
        """Change what is saved, in place.

        Args:
            entries: Of the whole ``state_dict``.
            prefix: Of those of this module.
        """

    def change_loaded(self, entries: dict[str, Any], prefix: str) -> dict[str, Any]:
        """Return the entries that are to be loaded.

        Args:
            entries: Of the whole ``state_dict``; what is deleted from them counts as loaded.
            prefix: Of those of this module.
        """
        return entries

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        self.change_saved(destination, prefix)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(self.change_loaded(state_dict, prefix), prefix, *args)
