"""What processes that share a training set do together. On a single one, nothing."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nclightning.functional import ClassStatistics

__all__ = ["gather_rows", "merge_over_ranks", "own_rows", "sum_over_ranks", "world_size"]


def world_size() -> int:
    """Count the processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def own_rows(num_rows: int, rank: int, world: int) -> tuple[int, int]:
    """Share rows out among processes, in order and as evenly as can be.

    Args:
        num_rows: Of all.
        rank: Of this process.
        world: Number of processes.

    Returns:
        First row of this process, and how many it has.

    Raises:
        ValueError: If there are fewer rows than processes.
    """
    if num_rows < world:
        raise ValueError(f"{num_rows} samples cannot be shared by {world} processes: set trainer.devices lower.")
    first, end = num_rows * rank // world, num_rows * (rank + 1) // world
    return first, end - first


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place; the same bits on each."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_rows(rows: Tensor, num_rows: int) -> Tensor:
    """Put the rows of all processes together on the host of the first, one process's rows at a time.

    All processes must come here.

    Args:
        rows: Those of this process, as :func:`own_rows` shares them out.
        num_rows: Of all.

    Returns:
        All rows on the first process; on others their own.
    """
    world, rank = world_size(), dist.get_rank() if world_size() > 1 else 0
    if world == 1:
        return rows
    if rank > 0:
        dist.send(rows.contiguous(), dst=0)
        return rows
    gathered = torch.empty(num_rows, *rows.shape[1:], dtype=rows.dtype)
    for source in range(world):
        first, count = own_rows(num_rows, source, world)
        part = rows
        if source > 0:
            part = rows.new_empty(count, *rows.shape[1:])
            dist.recv(part, src=source)
        gathered.narrow(0, first, count).copy_(part)
    return gathered


def merge_over_ranks(stats: ClassStatistics) -> ClassStatistics:
    """Merge the statistics of all processes, in the same order on each. All must come here.

    Args:
        stats: Of the samples of this process.

    Returns:
        Of all samples.
    """
    world = world_size()
    if world == 1:
        return stats
    stats = stats.fold_()
    tensors = {name: value for name, value in vars(stats).items() if isinstance(value, Tensor)}
    flat = torch.cat([value.reshape(-1).double() for value in tensors.values()])
    everybody = [torch.empty_like(flat) for _ in range(world)]
    dist.all_gather(everybody, flat)
    merged: ClassStatistics | None = None
    for each in everybody:
        parts = torch.split(each, [value.numel() for value in tensors.values()])
        own: dict[str, Any] = {
            name: part.view_as(value).to(value.dtype)
            for (name, value), part in zip(tensors.items(), parts, strict=True)
        }
        other = ClassStatistics(**({"lower": None} | own))
        merged = other if merged is None else merged.merge(other)
    assert merged is not None
    return merged
