"""Value and gradient of an objective at one point, in numbers that decisions can be made on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Evaluation", "average_over_ranks", "inner_product"]


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
    parts = [
        torch.dot(a.double().flatten(), b.double().flatten())
        for a, b in zip(left, right, strict=True)
        if a is not None and b is not None
    ]
    return float(torch.stack(parts).sum()) if parts else 0.0


def average_over_ranks(value: Tensor) -> Tensor:
    """Mean over all processes in float64, the same bits on each; the value itself on a single one."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return value
    total = value.to(torch.float64, copy=True)
    dist.all_reduce(total)
    return total / dist.get_world_size()
