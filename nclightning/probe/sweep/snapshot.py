"""A snapshot of a model and everything that it refers to, and its restoration in place."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nclightning.compat.torch import HOLDERS, version_of
from nclightning.errors import UserError
from nclightning.probe.sweep.checksums import fingerprint
from nclightning.probe.sweep.messages import online_hint
from nclightning.probe.sweep.object_state import LEAVES, save_state
from nclightning.sharding import own_shard

__all__ = ["TraceError", "has_lazy_parts", "remembered"]

# Largest number of objects that are searched, the nearest to the model first.
_MAX_OBJECTS = 100_000
# Total size of the tensors that are copied, trainable weights last. Of further tensors a change is only detected.
_COPIED_BYTES = 2**30
# Containers of these types that were empty are just emptied again. Most dictionaries of a torch module are empty.
_CLEARED = frozenset({dict, OrderedDict, list, set, deque})
_SIGNED = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class TraceError(UserError):
    """A forward changed the model in a way that could not be restored: training would continue from another state."""


def has_lazy_parts(module: nn.Module) -> bool:
    """Return whether a module has lazy parameters or buffers, which have no values before its first forward."""
    return any(is_lazy(each) for each in (*module.parameters(), *module.buffers()))


@contextmanager
def remembered(module: nn.Module) -> Iterator[None]:
    """Restore a module after the block: parameters, buffers, attributes, and all objects that they refer to.

    These are tensors, arrays, random generators, lists, dictionaries and other containers, objects with attributes,
    variables and caches of functions, and attributes of the user's own classes and modules. The state is restored into
    the same objects, and only what changed is written.

    Args:
        module: The module. Trainers, loggers and other objects of Lightning are left alone.

    Raises:
        TraceError: If a change cannot be undone. Another exception of the block takes precedence.
    """
    snapshot = _Snapshot(module)
    try:
        yield
    except BaseException:
        snapshot.restore()
        raise
    if reasons := snapshot.restore():
        name, why = reasons[0]
        raise TraceError(
            f"a forward of {type(module).__name__} changes {name!r}, and {why}, so that training would continue "
            "from another state than without the measurement: pass forward_fn=(module, inputs) -> output that runs the "
            f"model without this change{online_hint()}."
        )


class _Snapshot:
    """The saved state of all objects that a module refers to."""

    def __init__(self, module: nn.Module) -> None:
        # Objects stay referenced, so that Python does not reuse their id.
        self._objects: list[Any] = [module]
        self._origins: list[tuple[int, Any]] = [(-1, "")]  # For each object: its parent, and its name in the parent.
        self._restorers: list[tuple[int, Any]] = []  # Indices of objects, with the functions that restore them.
        self._replacements: dict[int, Any] = {}  # Copies of objects that cannot be restored in place, by their id.
        self._empty: list[Any] = []  # Containers that were empty.
        self._tensors = _Tensors(self._search())

    def _search(self) -> list[tuple[int, Tensor]]:
        """Save the states of all objects that the module refers to, and return the tensors among them."""
        objects, origins, tensors = self._objects, self._origins, list[tuple[int, Tensor]]()
        seen = {id(objects[0])}
        for at, value in enumerate(objects):  # The loop appends to this list.
            if len(objects) >= _MAX_OBJECTS:
                break
            if isinstance(value, Tensor):
                tensors.append((at, value))
                continue
            saved_state = save_state(value)
            if saved_state.restore is not None:
                self._restorers.append((at, saved_state.restore))
            if saved_state.replacement is not None:
                self._replacements[id(value)] = saved_state.replacement
            for key, child in saved_state.children:
                if (kind := type(child)) in LEAVES or (number := id(child)) in seen:
                    continue
                seen.add(number)
                if kind in _CLEARED and not child:
                    self._empty.append(child)
                    continue
                objects.append(child)
                origins.append((at, key))
        return tensors

    def _name(self, at: int) -> str:
        """Return the dotted name of an object."""
        parts = list[str]()
        while at > 0:
            at, key = self._origins[at]
            if key not in HOLDERS:
                parts.append(str(key))
        return ".".join(reversed(parts))

    def restore(self) -> list[tuple[str, str]]:
        """Restore everything. Return the names of objects that could not be restored, with the reasons."""
        with torch.no_grad():
            for each in self._empty:
                if each:
                    each.clear()
            reasons = [(at, restore(self._replacements)) for at, restore in self._restorers]
            reasons += self._tensors.restore()
        return [(self._name(at), why) for at, why in reasons if why is not None]


class _Tensors:
    """The saved values of tensors.

    Args:
        placed: The tensors, each with its index in the list of objects.
    """

    def __init__(self, placed: list[tuple[int, Tensor]]) -> None:
        self._grads = [
            (value, at, value.requires_grad, value.grad, _version(value.grad))
            for at, value in placed
            if value.is_leaf and isinstance(value, nn.Parameter)
        ]
        placed = [(at, value) for at, value in placed if not (is_lazy(value) or value.is_meta)]
        placed.sort(key=lambda each: isinstance(each[1], nn.Parameter) and each[1].requires_grad)
        self._copied: list[tuple[Tensor, Tensor, Tensor]] = []
        watched, budget = list[tuple[int, Tensor]](), _COPIED_BYTES
        for at, value in placed:
            # A view keeps the original memory, in case .data is assigned other memory.
            view = value.detach()
            shard = own_shard(view)
            strided = shard.layout == torch.strided
            size = shard.numel() * shard.element_size() if strided else 0
            if size > budget:
                watched.append((at, value))
                continue
            budget -= size
            self._copied.append((value, view, shard.clone()))
        self._watched = watched
        self._before = fingerprint([value for _, value in watched])

    def restore(self) -> list[tuple[int, str | None]]:
        """Restore values and gradients. Return the tensors for which this is not possible, with the reasons."""
        shards = [self._redirected(value, view) for value, view, _ in self._copied]
        copies = [copy for _, _, copy in self._copied]
        for changed, shard, copy in zip(_differ(shards, copies), shards, copies, strict=True):
            if changed:  # Others are not written to, because autograd may still need them.
                with torch.inference_mode(shard.is_inference()), torch.no_grad():
                    shard.copy_(copy)
        after = fingerprint([value for _, value in self._watched])
        reasons: list[tuple[int, str | None]] = [
            (at, f"with more than {_COPIED_BYTES / 2**30:g} GiB of tensors the model is too large to be copied")
            for (at, _), one, other in zip(self._watched, self._before, after, strict=True)
            if one != other
        ]
        for value, at, requires_grad, grad, version in self._grads:
            if value.requires_grad != requires_grad:
                value.requires_grad_(requires_grad)
            if value.grad is not grad:
                value.grad = grad
            if _version(grad) != version:
                reasons.append((at, "its gradient was added to"))
        return reasons

    @staticmethod
    def _redirected(value: Tensor, view: Tensor) -> Tensor:
        """Point a tensor to its original memory again, and return the shard of this process."""
        if view.layout != torch.strided:  # A detached sparse tensor does not share memory with the original.
            return value
        if not hasattr(view, "to_local") and (
            value.data_ptr() != view.data_ptr() or value.shape != view.shape or value.stride() != view.stride()
        ):
            with torch.inference_mode(value.is_inference()):
                value.data = view
        return own_shard(view)


def _version(tensor: Tensor | None) -> int:
    return 0 if tensor is None else version_of(tensor)


def _differ(tensors: list[Tensor], copies: list[Tensor]) -> list[bool]:
    """Return which tensors differ from their copies, bit for bit. There is one transfer to the host per device."""
    found = [False] * len(tensors)
    waiting: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for i, (tensor, copy) in enumerate(zip(tensors, copies, strict=True)):
        if tensor.layout != torch.strided or tensor.is_quantized:
            found[i] = True
            continue
        if tensor.untyped_storage().nbytes() < copy.untyped_storage().nbytes():  # Its memory was freed.
            continue
        bits, others = _bits(tensor), _bits(copy)
        if tensor.device.type == "cpu":
            found[i] = not torch.equal(bits, others)
        else:
            waiting.setdefault(tensor.device, []).append((i, (bits != others).any()))
    for flags in waiting.values():
        for (i, _), flag in zip(flags, torch.stack([flag for _, flag in flags]).tolist(), strict=True):
            found[i] = flag
    return found


def _bits(tensor: Tensor) -> Tensor:
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return tensor.view(_SIGNED[tensor.element_size()])
