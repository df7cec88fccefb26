"""Weights of which each process holds a part, as torch's ``fully_shard`` leaves them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any

import torch
from torch import Tensor, nn

from nclightning.errors import UserError

__all__ = ["gathered", "in_step", "is_sharded", "own_shard", "reshard", "shard_of"]

# Told by the methods of their classes: where these are to be imported from changes with torch's version, and to ask a
# module for what it has not takes ten times as long.


def is_sharded(module: nn.Module) -> bool:
    """Whether a part of a module gathers its weights at each forward, in which all processes must take part."""
    return any(hasattr(type(child), "set_reshard_after_forward") for child in module.modules())


def reshard(module: nn.Module) -> None:
    """Give up the weights that a forward without a backward left gathered; those in the shards are the true ones."""
    for child in module.modules():
        if hasattr(type(child), "set_reshard_after_forward"):
            child.reshard()  # type: ignore[operator]


def own_shard(tensor: Tensor) -> Tensor:
    """Return the part of a sharded tensor that this process has, in the same memory; any other tensor as it is."""
    shard = getattr(tensor, "to_local", None)
    return tensor if shard is None else shard()


def shard_of(tensor: Tensor, part: Any) -> Any:
    """Make a copy of the part that this process has of something shaped like a sharded tensor a sharded tensor.

    Args:
        tensor: Sharded or not.
        part: Tensor of the shape of its shard, which comes back as it is if the other is not sharded; so does what is
            no tensor.
    """
    if own_shard(tensor) is tensor or not isinstance(part, Tensor):
        return part
    from torch.distributed.tensor import DTensor  # noqa: PLC0415 - not part of all builds of torch

    assert isinstance(tensor, DTensor)
    part = part.clone()  # copy.deepcopy of torch 2.13 fails on a sharded tensor whose part begins within its memory.
    return DTensor.from_local(
        part, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def gathered(tensor: Tensor) -> Tensor:
    """Return a tensor detached and, if it is sharded, gathered from all processes, which must all ask for it."""
    tensor = tensor.detach()
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def in_step(loader: Iterable[Any], device: torch.device) -> Iterator[tuple[Any, bool]]:
    """Run as many batches on each process as on the one with the most: the last one comes again.

    Args:
        loader: Of this process, with a length.
        device: On which processes talk to each other.

    Yields:
        A batch, and whether it is seen for the first time.

    Raises:
        ValueError: On all processes, if one of them has no batch.
    """
    assert isinstance(loader, Sized)
    count = len(loader)
    extremes = torch.tensor([count, -count], device=device)
    torch.distributed.all_reduce(extremes, torch.distributed.ReduceOp.MAX)
    most, least = int(extremes[0]), -int(extremes[1])
    if least == 0:
        raise UserError("a sweep of sharded weights needs a batch for each process: this data set has too few samples.")
    batch: Any = None
    for batch in loader:
        yield batch, True
    for _ in range(most - count):
        yield batch, False
