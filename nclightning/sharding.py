"""Weights that torch's ``fully_shard`` splits between processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any

import torch
from torch import Tensor, nn

from nclightning.errors import UserError

__all__ = ["gathered", "in_step", "is_sharded", "own_shard", "reshard", "shard_of"]

# Sharded modules are recognised by the methods of their classes, because the import path of these classes depends on
# torch's version. Looking up a missing attribute of a module instance would take ten times as long.


def is_sharded(module: nn.Module) -> bool:
    """Return whether a part of a module is sharded, so that all processes must take part in each forward."""
    return any(hasattr(type(child), "set_reshard_after_forward") for child in module.modules())


def reshard(module: nn.Module) -> None:
    """Free the gathered weights that a forward without a backward leaves. The shards have the actual weights."""
    for child in module.modules():
        if hasattr(type(child), "set_reshard_after_forward"):
            child.reshard()  # type: ignore[operator]


def own_shard(tensor: Tensor) -> Tensor:
    """Return this process's shard of a sharded tensor, in the same memory; any other tensor unchanged."""
    shard = getattr(tensor, "to_local", None)
    return tensor if shard is None else shard()


def shard_of(tensor: Tensor, part: Any) -> Any:
    """Convert a tensor with the shape of a shard to a sharded tensor.

    Args:
        tensor: A tensor that gives the sharding. If it is not sharded, ``part`` is returned unchanged.
        part: A tensor with the shape of its shard. Any other object is returned unchanged.

    Returns:
        The sharded tensor, with a copy of ``part``.
    """
    if own_shard(tensor) is tensor or not isinstance(part, Tensor):
        return part
    from torch.distributed.tensor import DTensor  # noqa: PLC0415 - not part of all builds of torch

    assert isinstance(tensor, DTensor)
    part = part.clone()  # copy.deepcopy of torch 2.13 fails if the shard does not begin at the start of its memory.
    return DTensor.from_local(
        part, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def gathered(tensor: Tensor) -> Tensor:
    """Return a detached tensor, gathered from all processes if it is sharded. All processes must call it."""
    tensor = tensor.detach()
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def in_step(loader: Iterable[Any], device: torch.device) -> Iterator[tuple[Any, bool]]:
    """Yield equally many batches on each process, by repeating the last one.

    Args:
        loader: The loader of this process, with a length.
        device: Device for communication between processes.

    Yields:
        A batch, and whether it is yielded for the first time.

    Raises:
        ValueError: On all processes, if one of them has no batch.
    """
    assert isinstance(loader, Sized)
    count = len(loader)
    extremes = torch.tensor([count, -count], device=device)
    torch.distributed.all_reduce(extremes, torch.distributed.ReduceOp.MAX)
    most, least = int(extremes[0]), -int(extremes[1])
    if least == 0:
        raise UserError(
            "an evaluation pass with sharded weights needs a batch for each process: this data set has too few samples."
        )
    batch: Any = None
    for batch in loader:
        yield batch, True
    for _ in range(most - count):
        yield batch, False
