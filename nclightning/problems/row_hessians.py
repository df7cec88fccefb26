"""Hessians of the loss of each row, in the forms that the solver needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from nclightning.problems.loss import Loss

__all__ = ["Flanks", "Peaks", "RowHessians"]


class RowHessians(NamedTuple):
    """The Hessian of the loss of each row, multiplied by a factor.

    Attributes:
        loss: The loss.
        logits: ``(R, K)``.
        targets: ``(R, K)``.
        row_factors: Factors of the Hessians, ``(R, 1)``.
    """

    loss: Loss
    logits: Tensor
    targets: Tensor
    row_factors: Tensor

    def product(self, direction: Tensor) -> Tensor:
        """Multiply each Hessian with its row of ``direction (R, K)``."""
        return self.row_factors * self.loss.curvature(self.logits, self.targets, direction)

    def square(self, direction: Tensor) -> Tensor:
        """Second derivative of each row along a row, ``(R,)``."""
        return (direction * self.product(direction)).sum(dim=1)

    def along(self, axes: Tensor) -> Tensor:
        """Second derivatives of each row along each column of ``axes (K, q)``, ``(R, q)``."""
        return self.row_factors * self.loss.curvature_along(self.logits, self.targets, axes)

    def summed(self, shares: Tensor) -> Tensor:
        """Sum the Hessians with weights ``shares (R,)``."""
        return self.loss.mean_hessian(self.logits, self.targets, shares * self.row_factors[:, 0])

    def peaks(self) -> Peaks | None:
        """Split each Hessian into its peak and the rest; None if the loss does not support it."""
        peaks = self.loss.peaks(self.logits, self.targets)
        if peaks is None:
            return None
        heights, axes, (masses, others) = peaks
        return Peaks(heights * self.row_factors, axes, Flanks(masses * self.row_factors, others))


class Flanks(NamedTuple):
    """Hessians without their peaks: ``m (diag(q) - q q^T)``.

    Attributes:
        masses: m, ``(R, 1)``.
        others: Distributions q, ``(R, K)``.
    """

    masses: Tensor
    others: Tensor

    def square(self, direction: Tensor) -> Tensor:
        """Second derivative of each row along a row, ``(R,)``."""
        mean = (self.others * direction).sum(dim=1, keepdim=True)
        return self.masses[:, 0] * (self.others * (direction - mean).square()).sum(dim=1)

    def along(self, axes: Tensor) -> Tensor:
        """Second derivatives of each row along each column of ``axes (K, q)``, ``(R, q)``."""
        return self.masses * (self.others @ axes.square() - (self.others @ axes).square()).clamp(min=0)

    def summed(self, shares: Tensor) -> Tensor:
        """Sum the Hessians with weights ``shares (R,)``."""
        pairs = ((shares * self.masses[:, 0]).unsqueeze(1) * self.others).T @ self.others
        pairs = pairs.fill_diagonal_(0.0)
        return torch.diag(pairs.sum(dim=1)) - pairs


class Peaks(NamedTuple):
    """Hessians ``c v v^T`` plus flanks. The first term, the peak, may be much larger than the second.

    For cross-entropy, v is the direction of the likeliest class against all others.

    Attributes:
        heights: c, ``(R, 1)``.
        axes: v, ``(R, K)``.
        flanks: The Hessians without their peaks.
    """

    heights: Tensor
    axes: Tensor
    flanks: Flanks
