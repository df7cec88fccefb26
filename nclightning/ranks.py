"""Communication between processes of torch.distributed. On a single process, nothing is communicated."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nclightning.compat.torch import default_store
from nclightning.errors import UserError

__all__ = [
    "alone",
    "are_several",
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
    "wait_for_all",
    "world_size",
]

# Packages whose frames are skipped to find the user's line for a warning. contextlib is in between for with blocks.
_NOT_THE_USERS = {"nclightning", "lightning", "pytorch_lightning", "transformers", "torch", "contextlib"}


_alone = [False]
_PATIENCE = timedelta(seconds=30)  # After this time a warning says for which processes this one waits.


@contextmanager
def alone() -> Iterator[None]:
    """Let all functions of this module act in the block as if this process were the only one."""
    before, _alone[0] = _alone[0], True
    try:
        yield
    finally:
        _alone[0] = before


def world_size() -> int:
    """Return the number of processes."""
    return 1 if _alone[0] or not (dist.is_available() and dist.is_initialized()) else dist.get_world_size()


def are_several() -> bool:
    """Return whether there are several processes."""
    return world_size() > 1


def rank() -> int:
    """Return the number of this process."""
    return 0 if world_size() == 1 else dist.get_rank()


def wait_for_all(what: str, repair: str) -> None:
    """Wait until all processes have called this function, before they communicate.

    A collective is not safe for this: other processes may be in another one, for example in the backward of
    ``DistributedDataParallel``, and the numbers of the two would mix. Processes therefore wait at the store of
    torch.distributed.

    Args:
        what: What the processes are about to do, for messages.
        repair: What to do if only some processes should do it.

    Raises:
        ValueError: If some processes have not called it within the timeout of ``init_process_group``.
    """
    store = default_store() if world_size() > 1 else None
    if store is None:
        return
    time = store.add(f"nclightning/{rank()}", 1)
    places = [f"nclightning/{each}/{time}" for each in range(world_size())]
    store.set(places[rank()], "here")
    if _all_there(store, places, _PATIENCE):
        return
    missing = [i for i, place in enumerate(places) if not store.check([place])]
    sentence = f"process {rank()} of {world_size()} reached {what}, and processes {missing} did not"
    warnings.warn(f"{sentence} within {_PATIENCE.total_seconds():g} s: it waits. {repair}", stacklevel=2)
    if not _all_there(store, places, store.timeout):
        store.add(f"nclightning/{rank()}", -1)
        store.delete_key(places[rank()])
        raise UserError(f"{sentence}. {repair}")


def _all_there(store: Any, places: list[str], patience: timedelta) -> bool:
    """Return whether all keys are in the store within a time."""
    try:
        store.wait(places, patience)
    except RuntimeError:  # Stores raise it after the timeout.
        return False
    return True


def rank_zero_warn(message: str) -> None:
    """Warn on the first process only. The warning points to the user's line of code."""
    if rank() != 0:
        return
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_USERS:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level if frame is not None else 2)


def own_rows(num_rows: int, rank: int, world: int) -> tuple[int, int]:
    """Divide rows between processes, in order and as evenly as possible.

    Args:
        num_rows: Total number of rows.
        rank: Rank of this process.
        world: Number of processes.

    Returns:
        The first row of this process, and its number of rows.

    Raises:
        ValueError: If there are fewer rows than processes.
    """
    if num_rows < world:
        raise UserError(f"{num_rows} samples cannot be divided between {world} processes: lower trainer.devices.")
    first, end = num_rows * rank // world, num_rows * (rank + 1) // world
    return first, end - first


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes in place. The result is bitwise the same on each."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_all_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Sum several floating tensors over all processes in place, with one message in the widest of their dtypes."""
    if world_size() > 1 and tensors:
        total = sum_over_ranks(torch.cat([tensor.reshape(-1) for tensor in tensors]))
        for tensor, part in zip(tensors, torch.split(total, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


def count_over_ranks(count: int, device: torch.device) -> int:
    """Sum an integer over all processes, with communication on this device."""
    return count if world_size() == 1 else int(sum_over_ranks(torch.tensor(count, device=device)))


def raise_together(error: Exception | None, device: torch.device) -> None:
    """Raise on all processes if one of them failed, so that none waits for it. All processes must call it.

    Args:
        error: The error of this process, or None.
        device: Device for communication between processes.

    Raises:
        Exception: The error of this process, or a ``UserError`` if only other processes failed.
    """
    failed = count_over_ranks(int(error is not None), device)
    if error is not None:
        raise error
    if failed:
        raise UserError(f"{failed} of {world_size()} processes failed: see their errors.")


@contextmanager
def failing_together(device: torch.device) -> Iterator[None]:
    """Raise on all processes if the block failed on one of them; see :func:`raise_together`."""
    error: Exception | None = None
    try:
        yield
    except Exception as own:
        error = own
    raise_together(error, device)


def gather_rows(rows: Tensor, num_rows: int) -> Tensor:
    """Gather the rows of all processes on the CPU of the first one, process by process. All processes must call it.

    Args:
        rows: The rows of this process, divided as by :func:`own_rows`.
        num_rows: Total number of rows.

    Returns:
        All rows on the first process; on others their own rows.
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
    """Gather tensors of equal shapes and dtypes from all processes with one message. All processes must call it.

    Args:
        tensors: The tensors of this process.

    Returns:
        The tensors of each process, in the same order on each.
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
