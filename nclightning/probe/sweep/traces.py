"""Running a model so that nothing of it is left changed."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from nclightning.compat.torch import buffers_of, is_compiled
from nclightning.heads import evaluating
from nclightning.probe.nesting import measurement
from nclightning.probe.sweep.snapshot import remembered
from nclightning.probe.sweep.states import cuda_devices, random_states_kept
from nclightning.sharding import reshard

__all__ = ["compiled_parts", "eager", "frozen", "shared_buffers", "untouched"]


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Look at a module without a trace: eval mode, no gradients, and everything that it remembers put back.

    That is what :func:`nclightning.probe.sweep.snapshot.remembered` reaches, and the random states of Python, numpy and
    torch.

    Args:
        module: Its training flags are restored one by one, so that parts that were frozen stay so.

    Raises:
        TraceError: If the module changed in a way that cannot be put back.
    """
    reshard(module)  # The memory of gathered weights may be given up on the way.
    try:
        with remembered(module), random_states_kept(cuda_devices(module.modules())), measurement(), torch.no_grad():
            torch.clear_autocast_cache()  # Copies of weights in lower precision, of before they changed.
            with evaluating(module):
                yield
            reshard(module)  # Else its shards would be put back into the places of whole weights.
    finally:
        torch.clear_autocast_cache()  # Copies that were made without gradients are not for training.


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Run a module as it trains, without a trace.

    Its buffers, its modes, the states of the torchmetrics among its submodules, and the random states of Python, numpy
    and torch are put back afterwards.

    Args:
        module: Its modes are those of training, so that what is seen is what is trained.
    """
    modules = list(module.modules())
    with ExitStack() as stack:
        stack.enter_context(random_states_kept(cuda_devices(modules)))
        stack.enter_context(_buffers_kept(modules))
        stack.enter_context(_modes_kept(modules))
        kinds = _kinds_of_metrics()
        for child in modules:
            if isinstance(child, kinds):
                stack.enter_context(remembered(child))
        yield


def _kinds_of_metrics() -> tuple[type, ...]:
    """Classes of torchmetrics, which takes seconds to load: before that there is no object of them."""
    library = sys.modules.get("torchmetrics")
    return () if library is None else (library.Metric, library.MetricCollection)


@contextmanager
def _modes_kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    modes = [child.training for child in modules]
    try:
        yield
    finally:
        for child, mode in zip(modules, modes, strict=True):
            child.training = mode  # One by one: parts may be in eval mode while others train.


@contextmanager
def _buffers_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    buffers = [
        (child, name, buffer, buffer.detach().clone())
        for child in modules
        for name, buffer in buffers_of(child).items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for child, name, buffer, value in buffers:
                buffers_of(child)[name] = buffer.copy_(value)  # Some modules put a new tensor in its place.


@contextmanager
def shared_buffers(module: nn.Module, world_size: int) -> Iterator[None]:
    """Give all processes the buffers of the first, and put their own back afterwards.

    Batch norm keeps running statistics of its own on each process, so that processes would look at different models;
    the first one's is the model that checkpoints hold.

    Args:
        module: Any module.
        world_size: Number of processes, which must all come here.
    """
    if world_size == 1:
        yield
        return
    with _buffers_kept(module.modules()):
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, 0)
        yield


def eager() -> AbstractContextManager[Any]:
    """Run compiled modules uncompiled, since compiled ones do not see hooks that came later."""
    stance = getattr(torch.compiler, "set_stance", None)  # From torch 2.6 on.
    return nullcontext() if stance is None else stance("force_eager")


def compiled_parts(module: nn.Module) -> list[nn.Module]:
    """Return the parts of a module that ``torch.compile`` runs as graphs, in which hooks that came later do not fire.

    Args:
        module: Any module.

    Returns:
        Compiled submodules, and those that have a compiled function, such as a compiled ``validation_step``.
    """
    return [child for child in module.modules() if is_compiled(child)]
