"""Saving and restoring the random states of Python, numpy, torch and data sets."""

from __future__ import annotations

import copy
import functools
import random
import types
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nclightning.compat.torch import parameters_of
from nclightning.probe.sweep.object_state import LEAVES, save_state

__all__ = ["cuda_devices", "generators_kept", "random_states_kept", "torch_states_kept", "with_own_generators"]

_GENERATORS = (torch.Generator, random.Random, np.random.RandomState, np.random.Generator, np.random.BitGenerator)
# Longer containers are taken for data, and not searched for generators.
_MAX_ITEMS, _MAX_OBJECTS = 256, 10_000


def cuda_devices(modules: Iterable[nn.Module]) -> list[int]:
    """Return the numbers of the CUDA devices on which modules have parameters of their own."""
    devices = {p.device for module in modules for p in parameters_of(module).values() if p is not None}
    return sorted({d.index for d in devices if d.type == "cuda" and d.index is not None})


@contextmanager
def random_states_kept(devices: Sequence[int] = ()) -> Iterator[None]:
    """Restore the random states of Python, numpy and torch after the block.

    Args:
        devices: CUDA devices whose states are restored, in addition to the CPU.
    """
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global state is what is protected
    try:
        with torch_states_kept(devices):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002


@contextmanager
def generators_kept(data: Any) -> Iterator[None]:
    """Restore the random generators of a data set, its transforms and its collate function after the block.

    Other attributes, such as a cache of samples, are not restored.

    Args:
        data: A loader, or any iterable of batches.
    """
    saved_state = [save_state(each).restore for each in _generators_in(data)]
    try:
        yield
    finally:
        for restore in saved_state:
            if restore is not None:
                restore({})


def _generators_in(data: Any) -> list[Any]:
    """Return the random generators that an object refers to."""
    objects, found = [data], list[Any]()
    seen = {id(data)}
    for each in objects:  # The loop appends to this list.
        if isinstance(each, _GENERATORS):
            found.append(each)
            continue
        for child in _held_by(each):
            if type(child) not in LEAVES and id(child) not in seen and len(objects) < _MAX_OBJECTS:
                seen.add(id(child))
                objects.append(child)
    return found


def _held_by(value: Any) -> list[Any]:
    """Return the objects that an object refers to directly."""
    if isinstance(value, Tensor | np.ndarray | type):
        return []
    held: list[Any] = []
    if isinstance(value, dict | list | tuple | set | deque) and len(value) <= _MAX_ITEMS:
        held += value.values() if isinstance(value, dict) else value
    elif isinstance(value, types.MethodType):
        held.append(value.__self__)
    elif isinstance(value, functools.partial):
        held += [value.func, value.args, value.keywords]
    elif isinstance(value, types.FunctionType):
        held += [*(value.__defaults__ or ()), *(save_state(cell).children for cell in value.__closure__ or ())]
    if isinstance(own := getattr(value, "__dict__", None), dict):
        held.append(own)
    return held


@contextmanager
def torch_states_kept(devices: Sequence[int] = ()) -> Iterator[None]:
    """Restore the random states of torch after the block.

    Args:
        devices: CUDA devices whose states are restored, in addition to the CPU.
    """
    # Like torch.random.fork_rng, which looks for devices at each call.
    state, on_devices = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in devices]
    try:
        yield
    finally:
        torch.set_rng_state(state)
        for device, each in zip(devices, on_devices, strict=True):
            torch.cuda.set_rng_state(each, device)


def with_own_generators(collator: Any, depth: int = 4) -> Any:
    """Copy a collate function and the callables that it refers to, together with their random generators.

    Without the copy an evaluation pass would advance the generators of training. :func:`generators_kept` is not enough,
    because it cannot restore a generator that is constructed at the first batch. Models, functions and all other
    objects are shared with the original.

    Args:
        collator: Any callable.
        depth: Largest depth of nested objects that are copied.
    """
    if isinstance(collator, torch.Generator | np.random.Generator | np.random.RandomState | random.Random):
        return copy.deepcopy(collator)
    if isinstance(collator, types.MethodType):
        return types.MethodType(collator.__func__, with_own_generators(collator.__self__, depth - 1))
    is_shared = isinstance(collator, nn.Module | type | types.FunctionType) or not hasattr(collator, "__dict__")
    if is_shared or depth == 0 or not callable(collator):
        return collator
    try:
        made = copy.copy(collator)
        vars(made).update({name: with_own_generators(each, depth - 1) for name, each in vars(collator).items()})
    except Exception:  # The object cannot be copied.
        return collator
    return made
