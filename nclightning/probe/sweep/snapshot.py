"""A model and all that it remembers, put back as it was."""

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
from nclightning.probe.sweep.kinds import LEAVES, keep
from nclightning.probe.sweep.online import or_online
from nclightning.sharding import own_shard

__all__ = ["TraceError", "has_lazy_parts", "remembered"]

# Objects that are searched, the nearest to the model first.
_MOST_OBJECTS = 100_000
# Tensors up to so many bytes in all are copied, weights that are trained last; of the others a change is seen.
_COPIED_BYTES = 2**30
# Containers that are emptied again if they were empty, as most of the thirteen dictionaries of each torch module are.
_CLEARED = frozenset({dict, OrderedDict, list, set, deque})
_SIGNED = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class TraceError(UserError):
    """A forward changed something of the model that could not be put back: training would go on from another state."""


def has_lazy_parts(module: nn.Module) -> bool:
    """Whether parameters or buffers of a module have no values before its first forward."""
    return any(is_lazy(each) for each in (*module.parameters(), *module.buffers()))


@contextmanager
def remembered(module: nn.Module) -> Iterator[None]:
    """Put back what a module remembers: parameters, buffers, attributes, and all that can be reached from them.

    That is tensors, arrays, random generators, lists, dictionaries and other containers, objects with attributes,
    variables and caches of functions, and attributes of the user's own classes and modules. Everything is put back into
    the same objects, and only what changed is written to.

    Args:
        module: The module. Trainers, loggers and what else belongs to Lightning are left alone.

    Raises:
        TraceError: If something changed that cannot be put back; not if there is another exception.
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
            f"a forward of {type(module).__name__} changes {name!r}, and {why}, so that training would go on from "
            "another state than without the measurement: pass forward_fn=(module, inputs) -> output that runs the "
            f"model without this change{or_online()}."
        )


class _Snapshot:
    """What can be reached from a module."""

    def __init__(self, module: nn.Module) -> None:
        # Objects stay referenced, so that no id is given away a second time.
        self._objects: list[Any] = [module]
        self._origins: list[tuple[int, Any]] = [(-1, "")]
        self._restorers: list[tuple[int, Any]] = []
        self._instead: dict[int, Any] = {}
        self._empty: list[Any] = []
        self._tensors = _Tensors(self._search())

    def _search(self) -> list[tuple[int, Tensor]]:
        objects, origins, tensors = self._objects, self._origins, list[tuple[int, Tensor]]()
        seen = {id(objects[0])}
        for at, value in enumerate(objects):  # It grows on the way.
            if len(objects) >= _MOST_OBJECTS:
                break
            if isinstance(value, Tensor):
                tensors.append((at, value))
                continue
            kept = keep(value)
            if kept.restore is not None:
                self._restorers.append((at, kept.restore))
            if kept.instead is not None:
                self._instead[id(value)] = kept.instead
            for key, child in kept.children:
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
        """Name an object as the user would."""
        parts = list[str]()
        while at > 0:
            at, key = self._origins[at]
            if key not in HOLDERS:
                parts.append(str(key))
        return ".".join(reversed(parts))

    def restore(self) -> list[tuple[str, str]]:
        """Put everything back; return names of what could not be, with the reasons."""
        with torch.no_grad():
            for each in self._empty:
                if each:
                    each.clear()
            reasons = [(at, restore(self._instead)) for at, restore in self._restorers]
            reasons += self._tensors.restore()
        return [(self._name(at), why) for at, why in reasons if why is not None]


class _Tensors:
    """Contents of tensors, with their places among the objects."""

    def __init__(self, placed: list[tuple[int, Tensor]]) -> None:
        self._grads = [
            (value, at, value.requires_grad, value.grad, _version(value.grad))
            for at, value in placed
            if value.is_leaf and isinstance(value, nn.Parameter)
        ]
        placed = [(at, value) for at, value in placed if not (is_lazy(value) or value.is_meta)]
        placed.sort(key=lambda each: isinstance(each[1], nn.Parameter) and each[1].requires_grad)
        self._copied: list[tuple[Tensor, Tensor, Tensor]] = []
        watched, room = list[tuple[int, Tensor]](), _COPIED_BYTES
        for at, value in placed:
            # Its own view of the same memory, which it may be pointed away from by way of .data.
            view = value.detach()
            shard = own_shard(view)
            strided = shard.layout == torch.strided
            size = shard.numel() * shard.element_size() if strided else 0
            if size > room:
                watched.append((at, value))
                continue
            room -= size
            self._copied.append((value, view, shard.clone()))
        self._watched = watched
        self._before = fingerprint([value for _, value in watched])

    def restore(self) -> list[tuple[int, str | None]]:
        shards = [self._redirected(value, view) for value, view, _ in self._copied]
        copies = [copy for _, _, copy in self._copied]
        for changed, shard, copy in zip(_differ(shards, copies), shards, copies, strict=True):
            if changed:  # Else untouched, as what autograd still needs must be.
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
        """Point a tensor back to its memory; return the part of it that this process has."""
        if view.layout != torch.strided:  # Sparse ones do not share their memory with what detach returns.
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
    """Tell which tensors have other bits than their copies. One transfer to the host for each device."""
    found = [False] * len(tensors)
    waiting: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for i, (tensor, copy) in enumerate(zip(tensors, copies, strict=True)):
        if tensor.layout != torch.strided or tensor.is_quantized:
            found[i] = True
            continue
        if tensor.untyped_storage().nbytes() < copy.untyped_storage().nbytes():  # It was given up.
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
