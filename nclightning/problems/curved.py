"""Hessians of the rows of a loss, as the solver asks for them: second derivatives in some directions, and their sum."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from nclightning.problems.loss import Loss

__all__ = ["Curved", "Flanks", "Peaks"]


class Curved(NamedTuple):
    """Hessians of a loss, each with a factor.

    Attributes:
        loss: The loss.
        logits: ``(R, K)``.
        targets: ``(R, K)``.
        stress: ``(R, 1)``.
    """

    loss: Loss
    logits: Tensor
    targets: Tensor
    stress: Tensor

    def product(self, direction: Tensor) -> Tensor:
        """Product of each Hessian with a row."""
        return self.stress * self.loss.curvature(self.logits, self.targets, direction)

    def square(self, direction: Tensor) -> Tensor:
        """Second derivative of each row along a row, ``(R,)``."""
        return (direction * self.product(direction)).sum(dim=1)

    def along(self, axes: Tensor) -> Tensor:
        """Second derivatives of each row along each column of ``axes (K, q)``, ``(R, q)``."""
        return self.stress * self.loss.curvature_along(self.logits, self.targets, axes)

    def summed(self, shares: Tensor) -> Tensor:
        """Sum of the Hessians with weights ``(R,)``."""
        return self.loss.mean_hessian(self.logits, self.targets, shares * self.stress[:, 0])

    def peaks(self) -> Peaks | None:
        """Split off one direction of each row."""
        peaks = self.loss.peaks(self.logits, self.targets)
        if peaks is None:
            return None
        heights, axes, (masses, others) = peaks
        return Peaks(heights * self.stress, axes, Flanks(masses * self.stress, others))


class Flanks(NamedTuple):
    """Hessians ``m (diag(q) - q q^T)``.

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
        """Sum of the Hessians with weights ``(R,)``."""
        pairs = ((shares * self.masses[:, 0]).unsqueeze(1) * self.others).T @ self.others
        pairs = pairs.fill_diagonal_(0.0)
        return torch.diag(pairs.sum(dim=1)) - pairs


class Peaks(NamedTuple):
    """Hessians ``c v v^T`` plus flanks, of which the first may be far the larger: the likeliest class against the rest.

    Attributes:
        heights: c, ``(R, 1)``.
        axes: v, ``(R, K)``.
        flanks: What is left.
    """

    heights: Tensor
    axes: Tensor
    flanks: Flanks
