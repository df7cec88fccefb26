"""What processes that share a training set do together. On a single one, nothing."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from nclightning.errors import UserError

__all__ = [
    "count_over_ranks",
    "failing_together",
    "gather_rows",
    "gather_tensors",
    "own_rows",
    "raise_together",
    "rank",
    "rank_zero_warn",
    "sum_all_over_ranks",
    "sum_over_ranks",
    "world_size",
]


def world_size() -> int:
    """Count the processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def rank_zero_warn(message: str) -> None:
    """Warn on the first process, on behalf of all."""
    if rank() == 0:
        warnings.warn(message, stacklevel=3)


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
        raise UserError(f"{num_rows} samples cannot be shared by {world} processes: set trainer.devices lower.")
    first, end = num_rows * rank // world, num_rows * (rank + 1) // world
    return first, end - first


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place; the same bits on each."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_all_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Sum several floating tensors over all processes, in place, with one message in the widest of their dtypes."""
    if world_size() > 1 and tensors:
        total = sum_over_ranks(torch.cat([tensor.reshape(-1) for tensor in tensors]))
        for tensor, part in zip(tensors, torch.split(total, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


def count_over_ranks(count: int, device: torch.device) -> int:
    """Sum a number of things over all processes, which talk to each other on this device."""
    return count if world_size() == 1 else int(sum_over_ranks(torch.tensor(count, device=device)))


def raise_together(error: Exception | None, device: torch.device) -> None:
    """Raise on all processes if one of them failed, so that none waits for it. All must come here.

    Args:
        error: Of this process, or None.
        device: On which processes talk to each other.

    Raises:
        Exception: The error; a ``UserError`` where another process had one.
    """
    failed = count_over_ranks(int(error is not None), device)
    if error is not None:
        raise error
    if failed:
        raise UserError(f"{failed} of {world_size()} processes failed, which say why.")


@contextmanager
def failing_together(device: torch.device) -> Iterator[None]:
    """Raise on all processes if what runs inside failed on one of them; see :func:`raise_together`."""
    error: Exception | None = None
    try:
        yield
    except Exception as own:
        error = own
    raise_together(error, device)


def gather_rows(rows: Tensor, num_rows: int) -> Tensor:
    """Put the rows of all processes together on the host of the first, one process's rows at a time.

    All processes must come here.

    Args:
        rows: Those of this process, as :func:`own_rows` shares them out.
        num_rows: Of all.

    Returns:
        All rows on the first process; on others their own.
    """
    world = world_size()
    if world == 1:
        return rows
    if rank() > 0:
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


def gather_tensors(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Exchange tensors of equal shapes and dtypes with all processes, with one message. All must come here.

    Args:
        tensors: Those of this process.

    Returns:
        Those of each process, in the same order on each.
    """
    if world_size() == 1:
        return [list(tensors)]
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    everybody = [torch.empty_like(flat) for _ in range(world_size())]
    dist.all_gather(everybody, flat)
    sizes = [tensor.numel() for tensor in tensors]
    return [
        [part.view_as(tensor) for part, tensor in zip(torch.split(each, sizes), tensors, strict=True)]
        for each in everybody
    ]
