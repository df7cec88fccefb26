"""Value and gradient of an objective at one point, in numbers that decisions can be made on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from nclightning.ranks import sum_over_ranks, world_size
from nclightning.sharding import own_shard

__all__ = ["Carried", "Evaluation", "average_over_ranks", "inner_product", "parameters_of", "sum_of_products"]

_Version = tuple[int, int, int] | None


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


class Carried:
    """An evaluation for as long as nobody writes to the parameters or their gradients.

    Args:
        evaluation: At the parameters as they are.
        params: Whose gradients are those of the evaluation.
    """

    def __init__(self, evaluation: Evaluation, params: Sequence[Tensor]) -> None:
        self.evaluation = evaluation
        self._versions = [(_version(p), _version(p.grad)) for p in params]

    def holds(self, params: Sequence[Tensor]) -> bool:
        """Whether it still is the evaluation there; gradients may be set to None."""
        return all(
            (p.grad is None or p.grad is g) and versions == (_version(p), _version(g))
            for p, g, versions in zip(params, self.evaluation.gradients, self._versions, strict=True)
        )


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """List what an optimizer moves, group by group."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def _version(tensor: Tensor | None) -> _Version:
    """Count the writes to a tensor, of which a sharded one and its shard count apart, and tell its memory."""
    if tensor is None:
        return None
    shard = own_shard(tensor)
    return tensor._version, shard._version, shard.data_ptr()


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
    return sum_over_ranks(parts.sum())


def average_over_ranks(value: Tensor) -> Tensor:
    """Mean over all processes in float64, the same bits on each; the value itself on a single one."""
    if world_size() == 1:
        return value
    return sum_over_ranks(value.to(torch.float64, copy=True)) / world_size()
