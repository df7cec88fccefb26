"""Random states of Python, numpy and torch."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from nclightning.compat.torch import parameters_of

__all__ = ["cuda_devices", "random_states_kept", "torch_states_kept"]


def cuda_devices(modules: Iterable[nn.Module]) -> list[int]:
    """Return the numbers of the CUDA devices on which modules have parameters of their own."""
    devices = {p.device for module in modules for p in parameters_of(module).values() if p is not None}
    return sorted({d.index for d in devices if d.type == "cuda" and d.index is not None})


@contextmanager
def random_states_kept(devices: Sequence[int] = ()) -> Iterator[None]:
    """Put the random states of Python, numpy and torch back afterwards.

    Args:
        devices: CUDA devices; the host always counts.
    """
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global state is what is protected
    try:
        with torch_states_kept(devices):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002


@contextmanager
def torch_states_kept(devices: Sequence[int] = ()) -> Iterator[None]:
    """Put the random states of torch back afterwards.

    Args:
        devices: CUDA devices; the host always counts.
    """
    # As torch.random.fork_rng does, without looking for devices each time.
    state, on_devices = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in devices]
    try:
        yield
    finally:
        torch.set_rng_state(state)
        for device, each in zip(devices, on_devices, strict=True):
            torch.cuda.set_rng_state(each, device)
