r"""The soft threshold of singular values, the proximal map of the nuclear norm, and its derivative.

For :math:`Y = U \mathrm{diag}(y) V^\top` the soft threshold is :math:`U (y - t)_+ V^\top`. What it removes,
:math:`U \min(y, t) V^\top`, is t times a subgradient of the nuclear norm. In the axes U and V, the derivative P of the
soft threshold is diagonal on the symmetric part and on the skew part of a matrix.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["InAxes", "Scales", "Threshold", "apply", "inverse"]


class InAxes(NamedTuple):
    """A matrix D in the axes U and V: ``U^T D V``, and the part of ``D V`` outside of U if U is not square."""

    inner: Tensor
    rest: Tensor


class Scales(NamedTuple):
    """An operator on matrices in the axes, which couples only mirror images in the leading square.

    The image of entry (i, j) of the leading square is ``same[i, j] * entry(i, j) + swapped[i, j] * entry(j, i)``.
    Other entries are multiplied by one factor.

    Attributes:
        same: ``(q, q)``, symmetric.
        swapped: ``(q, q)``, symmetric.
        right: Factors of the columns beyond the square, ``(q, 1)`` or ``(q, K - q)``.
        below: Factors of the rows beyond the square, ``(q,)`` or ``(p - q, q)``.
        rest: Factors of the rows outside of U, ``(q,)`` or ``(M, q)``.
    """

    same: Tensor
    swapped: Tensor
    right: Tensor
    below: Tensor
    rest: Tensor


class Threshold:
    """The soft threshold of a matrix."""

    def __init__(self, matrix: Tensor, threshold: float) -> None:
        rows, columns = matrix.shape
        # With many more rows than columns, U has only as many axes as there are columns.
        full = rows <= 2 * columns
        self.left, self.values, right = torch.linalg.svd(matrix, full_matrices=full)
        self.right, self.size, self.threshold = right.T, len(self.values), threshold
        self.kept_values = (self.values - threshold).clamp(min=0)
        self.has_rest = not full

    @property
    def kept(self) -> Tensor:
        """The soft threshold of the matrix."""
        return self._with(self.kept_values)

    @property
    def subgradient(self) -> Tensor:
        """A subgradient of the nuclear norm at the soft threshold."""
        return self._with((self.values / self.threshold).clamp(max=1))

    def _with(self, values: Tensor) -> Tensor:
        """Make the matrix with the same singular vectors and other singular values."""
        matrix: Tensor = self.left[:, : self.size] * values @ self.right[:, : self.size].T
        return matrix

    def to_axes(self, matrix: Tensor) -> InAxes:
        """Transform a matrix into the axes."""
        in_axes = matrix @ self.right
        inner = self.left.T @ in_axes
        return InAxes(inner, in_axes - self.left @ inner if self.has_rest else inner[:0, : self.size])

    def from_axes(self, in_axes: InAxes) -> Tensor:
        """Inverse of :meth:`to_axes`."""
        columns = self.left @ in_axes.inner
        matrix: Tensor = (columns + in_axes.rest if self.has_rest else columns) @ self.right.T
        return matrix

    def without_left(self, rest: Tensor) -> Tensor:
        """Remove the component within U that rounding leaves."""
        return rest - self.left @ (self.left.T @ rest) if self.has_rest else rest

    def hessian_of_norm(self, smoothed: bool) -> tuple[Scales, Scales]:
        """Return the Hessian of the nuclear norm, and a mask that is 1 where it is finite and 0 elsewhere.

        Args:
            smoothed: True returns (1 - P)/t, the Hessian of the smoothed norm, which is finite everywhere. False
                returns (1/P - 1)/t, the Hessian of the norm itself, which is infinite across its smooth directions.
        """
        y, t, s = self.values, self.threshold, self.kept_values
        low = torch.minimum(y, torch.full_like(y, t))
        lesser, larger = torch.minimum(y.unsqueeze(1), y), torch.maximum(y.unsqueeze(1), y)
        tiny = torch.finfo(y.dtype).tiny
        below = (t - lesser).clamp(min=0)
        if smoothed:
            symmetric = torch.where(larger > t, below / (larger - lesser).clamp(min=tiny), 1)
            skew = torch.where(larger > 0, (low.unsqueeze(1) + low) / (y.unsqueeze(1) + y).clamp(min=tiny), 1)
            beside = torch.where(y > 0, low / y.clamp(min=tiny), 1)
            square_mask, finite = torch.ones_like(symmetric), torch.ones_like(y)
        else:
            square_mask, finite = (larger > t).to(y), (y > t).to(y)
            symmetric = torch.where(larger > t, below / (larger - t).clamp(min=tiny), 0)
            skew = torch.where(larger > t, (low.unsqueeze(1) + low) / (s.unsqueeze(1) + s).clamp(min=tiny), 0)
            beside = torch.where(y > t, t / s.clamp(min=tiny), 0)
        operator = Scales(
            (symmetric + skew) / (2 * t), (symmetric - skew) / (2 * t), beside.unsqueeze(1) / t, beside / t, beside / t
        )
        return operator, Scales(square_mask, torch.zeros_like(square_mask), finite.unsqueeze(1), finite, finite)


def apply(scales: Scales, in_axes: InAxes) -> InAxes:
    """Apply an operator to a matrix in the axes."""
    size = len(scales.same)
    image = torch.empty_like(in_axes.inner)
    square = in_axes.inner[:size, :size]
    torch.addcmul(scales.same * square, scales.swapped, square.T, out=image[:size, :size])
    image[:size, size:] = scales.right * in_axes.inner[:size, size:]
    image[size:, :size] = scales.below * in_axes.inner[size:, :size]
    return InAxes(image, scales.rest * in_axes.rest)


def inverse(operator: Scales, finite: Scales, inner: Tensor, rest: Tensor) -> Scales:
    """Invert the operator plus the diagonal (inner, rest), where the operator is finite; zero elsewhere."""
    size = len(operator.same)
    square = inner[:size, :size]
    other = square.T + operator.same
    # Determinant of the two by two matrix of an entry and its mirror image, a sum of non-negative terms.
    alpha, beta = operator.same + operator.swapped, operator.same - operator.swapped
    det = square * square.T + operator.same * (square + square.T) + alpha * beta
    tiny = torch.finfo(det.dtype).tiny
    det = det.clamp(min=tiny)
    return Scales(
        finite.same * other / det,
        -finite.same * operator.swapped / det,
        finite.right / (inner[:size, size:] + operator.right).clamp(min=tiny),
        finite.below / (inner[size:, :size] + operator.below).clamp(min=tiny),
        finite.rest / (rest + operator.rest).clamp(min=tiny),
    )
