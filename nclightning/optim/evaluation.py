"""Value and gradient of an objective at one point, in numbers that decisions can be made on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nclightning.sharding import own_shard

__all__ = ["Evaluation", "average_over_ranks", "inner_product", "sum_of_products"]


@dataclass(frozen=True)
class Evaluation:
    """Value and gradient at one point.

    Attributes:
        value: The objective.
        epsilon: Machine epsilon of the dtype in which it was computed.
        gradients: One per parameter; None where the objective does not depend on it.
        square: Squared norm of the gradient.
    """

    value: float
    epsilon: float
    gradients: list[Tensor | None]
    square: float

    @property
    def finite(self) -> bool:
        """Whether value and gradient are."""
        return math.isfinite(self.value) and math.isfinite(self.square)


def inner_product(left: list[Tensor | None], right: list[Tensor | None]) -> float:
    """Inner product of two gradients in float64; a missing entry is zero."""
    return float(sum_of_products(left, right))


def sum_of_products(left: list[Tensor | None], right: list[Tensor | None]) -> Tensor:
    """Inner product of two gradients as a scalar on the device; of sharded ones over all processes."""
    pairs = [(a, b) for a, b in zip(left, right, strict=True) if a is not None and b is not None]
    if not pairs:
        return torch.zeros((), dtype=torch.float64)
    sharded = [own_shard(a) is not a for a, _ in pairs]
    parts = torch.stack([torch.dot(own_shard(a).double().flatten(), own_shard(b).double().flatten()) for a, b in pairs])
    if not any(sharded):
        return parts.sum()
    if dist.get_rank() > 0:  # What all processes have counts once.
        parts = torch.where(torch.tensor(sharded, device=parts.device), parts, 0)
    total = parts.sum()
    dist.all_reduce(total)
    return total


def average_over_ranks(value: Tensor) -> Tensor:
    """Mean over all processes in float64, the same bits on each; the value itself on a single one."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return value
    total = value.to(torch.float64, copy=True)
    dist.all_reduce(total)
    return total / dist.get_world_size()
