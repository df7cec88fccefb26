"""The optimal set X of the unconstrained feature model: a member, the nearest member, the distance.

Legend in :mod:`nclightning.theory.problem`. Tensors are float64 and were checked by the caller.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from nclightning.theory.problem import UFMProblem

__all__ = ["Solution", "distance", "isometry", "member", "nearest"]


class Solution(NamedTuple):
    """A point of the unconstrained feature model, in the argument order of objective, gap and distance.

    Attributes:
        weight: Head ``(K, d)``.
        features: ``(N, d)``.
        labels: ``(N,)`` int64.
        bias: ``(K,)`` for MSE, None for CE.
    """

    weight: Tensor
    features: Tensor
    labels: Tensor
    bias: Tensor | None


def nearest(problem: UFMProblem, weight: Tensor, features: Tensor, labels: Tensor, bias: Tensor | None) -> Solution:
    """Project a point on X."""
    sums = torch.zeros_like(weight).index_add_(0, labels, features)
    return member(problem, weight + problem.ratio * sums, labels)


def distance(problem: UFMProblem, weight: Tensor, features: Tensor, labels: Tensor, bias: Tensor | None) -> Tensor:
    """Norm of the residual to the projection; the expanded square would lose half of the digits."""
    closest = nearest(problem, weight, features, labels, bias)
    squared = (weight - closest.weight).square().sum() + (features - closest.features).square().sum()
    if bias is not None and closest.bias is not None:
        squared = squared + (bias - closest.bias).square().sum()
    return squared.sqrt()


def member(problem: UFMProblem, direction: Tensor, labels: Tensor) -> Solution:
    """Build the member of X whose isometry is closest to ``direction (K, d)``."""
    K = problem.num_classes
    bias = direction.new_full((K,), 1.0 / K) if problem.loss == "mse" else None
    frame = isometry(direction) if problem.collapses else torch.zeros_like(direction)
    return Solution(problem.weight_scale * frame, problem.feature_scale * frame.index_select(0, labels), labels, bias)


def isometry(direction: Tensor) -> Tensor:
    r"""Find the nearest partial isometry of rank ``min(d, K - 1)`` with zero column sums.

    Args:
        direction: ``(K, d)``.

    Returns:
        M ``(K, d)`` with :math:`\mathbf 1^\top M = 0` and M M^T = P (d >= K - 1) or M^T M = I (d < K - 1). It is nan
        where ``direction`` is not finite, as in a run that diverged.
    """
    finite = torch.isfinite(direction).all()
    rows = _reflect(torch.where(finite, direction, 0)).narrow(0, 1, len(direction) - 1)
    left, _, right = torch.linalg.svd(rows, full_matrices=False)
    inside = left @ right
    return torch.where(finite, _reflect(torch.cat([inside.new_zeros(1, inside.shape[1]), inside])), torch.nan)


def _reflect(rows: Tensor) -> Tensor:
    """Reflect ``(K, d)`` along the classes so that the ones vector becomes the first axis, and back."""
    first = torch.arange(len(rows), device=rows.device).unsqueeze(1) == 0
    axis = first.to(rows) + len(rows) ** -0.5
    reflected: Tensor = rows - axis @ (axis.T @ rows) * (2 / axis.square().sum())
    return reflected
