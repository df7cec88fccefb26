"""Looking at a model over a data set without a trace."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Subset, SubsetRandomSampler

__all__ = ["eager", "frozen", "num_own_samples", "sequential_loader", "shared_buffers", "untouched"]


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Look at a module without a trace: eval mode, no gradients, and all random states put back afterwards.

    Args:
        module: Its training flags are restored one by one, so that parts that were frozen stay so.
    """
    modes = [(child, child.training) for child in module.modules()]
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global state is what is protected
    try:
        with untouched(module), torch.no_grad():
            for child, _ in modes:  # Not eval(): what layers do when their mode changes, such as merging, is a trace.
                child.training = False
            yield
    finally:
        for child, training in modes:
            child.training = training
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Run a module as it trains, without a trace: its buffers and torch's random states are put back afterwards.

    Args:
        module: Its modes stay, so that what is seen is what is trained.
    """
    with _buffers_kept(module), torch.random.fork_rng(devices=_cuda_devices(module)):
        yield


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    buffers = [
        (child, name, buffer, buffer.detach().clone())
        for child in module.modules()
        for name, buffer in child.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for child, name, buffer, value in buffers:
                child._buffers[name] = buffer.copy_(value)  # Some modules put a new tensor in its place.


def _cuda_devices(module: nn.Module) -> list[int]:
    return sorted(
        {p.device.index for p in module.parameters() if p.device.type == "cuda" and p.device.index is not None}
    )


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
    with _buffers_kept(module):
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, 0)
        yield


def eager() -> AbstractContextManager[Any]:
    """Run compiled modules uncompiled, since compiled ones do not see hooks that came later."""
    stance = getattr(torch.compiler, "set_stance", None)  # From torch 2.6 on.
    return nullcontext() if stance is None else stance("force_eager")


def sequential_loader(loader: Iterable[Any], rank: int = 0, world_size: int = 1) -> Iterable[Any]:
    """Make a loader over the same samples in order, each exactly once over all ranks.

    Shuffling, dropped last batches and the duplicates that a distributed sampler pads with would make a reading
    depend on the epoch, leave samples out or count some twice.

    Args:
        loader: A ``DataLoader`` over a map-style dataset; an iterable that is no ``DataLoader`` is returned as it is.
        rank: Of this process.
        world_size: Number of processes.

    Returns:
        The loader.

    Raises:
        ValueError: If samples cannot be shared out over several processes, or a subclass of ``DataLoader`` has an
            ``__iter__`` of its own: what it yields cannot be had from the dataset, and to run it would move it on.
    """
    if isinstance(loader, DataLoader) and type(loader).__iter__ is not DataLoader.__iter__:
        raise ValueError(
            f"{type(loader).__name__} is a DataLoader with an __iter__ of its own: a sweep over its dataset may see "
            "other samples than it yields. Use source='online', or a plain DataLoader."
        )
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        if world_size > 1:
            raise ValueError(
                f"a {type(loader).__name__} without a map-style dataset cannot be shared out over {world_size} "
                "processes without counting samples twice."
            )
        return _apart(loader) if isinstance(loader, DataLoader) else loader
    dataset = loader.dataset
    if isinstance(loader.sampler, SubsetRandomSampler):
        dataset = Subset(dataset, sorted(loader.sampler.indices))
    if world_size > 1:
        dataset = Subset(dataset, range(rank, len(dataset), world_size))  # type: ignore[arg-type]
    unbatched = loader.batch_size is None and loader.batch_sampler is None
    batch_size = None if unbatched else loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 1
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=False,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        generator=torch.Generator(),
    )


def _apart(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Make a loader over the same iterable data set with workers of its own, which the running pass does not lose."""
    return DataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        drop_last=loader.drop_last,
        worker_init_fn=loader.worker_init_fn,
        generator=torch.Generator(),
    )


def num_own_samples(loader: Any) -> int | None:
    """Count the samples of an epoch of this process that are not duplicates.

    A ``DistributedSampler`` pads the last places with samples that another process, or an earlier place, has too.

    Args:
        loader: Any loader.

    Returns:
        How many samples from the start of the epoch are real; None if all are.
    """
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, DistributedSampler) or sampler.drop_last:
        return None
    return len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))  # type: ignore[arg-type]
