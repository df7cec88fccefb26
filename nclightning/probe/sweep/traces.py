"""Contexts in which a model runs without a trace."""

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
    """Run a module in eval mode without gradients, and restore all its state after the block.

    The state is that of :func:`nclightning.probe.sweep.snapshot.remembered`, and the random states of Python, numpy and
    torch.

    Args:
        module: The module. The training mode of each submodule is restored.

    Raises:
        TraceError: If the module changed in a way that cannot be undone.
    """
    reshard(module)  # The memory of gathered weights may be freed within the block.
    try:
        with remembered(module), random_states_kept(cuda_devices(module.modules())), measurement(), torch.no_grad():
            torch.clear_autocast_cache()  # It may have outdated copies of weights in lower precision.
            with evaluating(module):
                yield
            reshard(module)  # The snapshot has shards, which must not be restored into gathered weights.
    finally:
        torch.clear_autocast_cache()  # Training must not use copies that were made without gradients.


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Run a module in its training modes without a trace.

    After the block its buffers, its modes, the states of torchmetrics among its submodules, and the random states of
    Python, numpy and torch are restored. Other attributes are not; see :func:`frozen`.

    Args:
        module: The module.
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
    """Return the classes of torchmetrics; none if it is not imported, because then no metric exists."""
    library = sys.modules.get("torchmetrics")
    return () if library is None else (library.Metric, library.MetricCollection)


@contextmanager
def _modes_kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Restore the training modes of modules after the block."""
    modes = [child.training for child in modules]
    try:
        yield
    finally:
        for child, mode in zip(modules, modes, strict=True):
            child.training = mode  # For each submodule, because some may be in eval mode while others train.


@contextmanager
def _buffers_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Restore the buffers of modules after the block."""
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
                buffers_of(child)[name] = buffer.copy_(value)  # Some modules replace the tensor.


@contextmanager
def shared_buffers(module: nn.Module, world_size: int) -> Iterator[None]:
    """Give all processes the buffers of the first one, and restore their own after the block.

    Batch norm has different running statistics on each process, so that processes would measure different models.
    Checkpoints contain those of the first process.

    Args:
        module: Any module.
        world_size: Number of processes, which must all call this function.
    """
    if world_size == 1:
        yield
        return
    with _buffers_kept(module.modules()):
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, 0)
        yield


def eager() -> AbstractContextManager[Any]:
    """Return a context in which compiled modules run without compilation, because compiled graphs ignore new hooks."""
    stance = getattr(torch.compiler, "set_stance", None)  # From torch 2.6 on.
    return nullcontext() if stance is None else stance("force_eager")


def compiled_parts(module: nn.Module) -> list[nn.Module]:
    """Return the submodules that run as compiled graphs, in which hooks do not fire that are added after compilation.

    Args:
        module: Any module.

    Returns:
        Compiled submodules, and submodules with a compiled method, such as a compiled ``validation_step``.
    """
    return [child for child in module.modules() if is_compiled(child)]
