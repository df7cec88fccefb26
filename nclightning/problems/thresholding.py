r"""The nuclear norm as a proximal method sees it: the soft threshold of singular values, and its derivative.

For :math:`Y = U \mathrm{diag}(y) V^\top` the threshold t keeps :math:`U (y - t)_+ V^\top`, and takes off
:math:`U \min(y, t) V^\top`, t times a subgradient. In the axes U and V the derivative P of what is kept is diagonal, on
the symmetric and the skew part of a matrix each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Scales", "Threshold", "Turned", "apply", "inverse"]


class Turned(NamedTuple):
    """A matrix D in the axes of another: ``U^T D V``, and what ``D V`` has outside of U if U has not all axes."""

    inner: Tensor
    rest: Tensor


class Scales(NamedTuple):
    """An operator that is diagonal on the symmetric and the skew part of the square, and on what is beside it.

    Attributes:
        same: ``(q, q)`` symmetric: factor of each entry.
        swapped: ``(q, q)`` symmetric: factor of its mirror image.
        right: ``(q, 1)`` or ``(q, K - q)``, of the columns beyond the square.
        below: ``(q,)`` or ``(p - q, q)``, of the rows beyond the square.
        rest: ``(q,)`` or ``(M, q)``, of the rows outside of U.
        square_there: Where the square is not excluded, ``(q, q)``.
        there: Which singular values are not excluded, ``(q,)``.
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
        # All axes, but of the rows only those that are needed if there are many.
        full = rows <= 2 * columns
        self.left, self.values, right = torch.linalg.svd(matrix, full_matrices=full)
        self.right, self.size, self.threshold = right.T, len(self.values), threshold
        self.kept_values = (self.values - threshold).clamp(min=0)
        self.has_rest = not full

    @property
    def kept(self) -> Tensor:
        """What the threshold keeps."""
        return self._with(self.kept_values)

    @property
    def subgradient(self) -> Tensor:
        """Subgradient of the nuclear norm at what is kept."""
        return self._with((self.values / self.threshold).clamp(max=1))

    def _with(self, values: Tensor) -> Tensor:
        matrix: Tensor = self.left[:, : self.size] * values @ self.right[:, : self.size].T
        return matrix

    def turn(self, matrix: Tensor) -> Turned:
        """Take a matrix into the axes."""
        turned = matrix @ self.right
        inner = self.left.T @ turned
        return Turned(inner, turned - self.left @ inner if self.has_rest else inner[:0, : self.size])

    def turn_back(self, turned: Turned) -> Tensor:
        """Inverse of :meth:`turn`."""
        columns = self.left @ turned.inner
        matrix: Tensor = (columns + turned.rest if self.has_rest else columns) @ self.right.T
        return matrix

    def without_left(self, rest: Tensor) -> Tensor:
        """Take off what rounding leaves within U."""
        return rest - self.left @ (self.left.T @ rest) if self.has_rest else rest

    def bend(self, smoothed: bool) -> tuple[Scales, Scales]:
        """Two operators, and where they are finite as factors of 1 and 0.

        Args:
            smoothed: Whether it is (1 - P)/t, the Hessian of the smoothed norm, or (1/P - 1)/t, that of the norm
                itself along its smooth directions, which is infinite across them.
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
            square_there, there = torch.ones_like(symmetric), torch.ones_like(y)
        else:
            square_there, there = (larger > t).to(y), (y > t).to(y)
            symmetric = torch.where(larger > t, below / (larger - t).clamp(min=tiny), 0)
            skew = torch.where(larger > t, (low.unsqueeze(1) + low) / (s.unsqueeze(1) + s).clamp(min=tiny), 0)
            beside = torch.where(y > t, t / s.clamp(min=tiny), 0)
        bent = Scales(
            (symmetric + skew) / (2 * t), (symmetric - skew) / (2 * t), beside.unsqueeze(1) / t, beside / t, beside / t
        )
        return bent, Scales(square_there, torch.zeros_like(square_there), there.unsqueeze(1), there, there)


def apply(scales: Scales, turned: Turned) -> Turned:
    """Apply the operator."""
    size = len(scales.same)
    image = torch.empty_like(turned.inner)
    square = turned.inner[:size, :size]
    torch.addcmul(scales.same * square, scales.swapped, square.T, out=image[:size, :size])
    image[:size, size:] = scales.right * turned.inner[:size, size:]
    image[size:, :size] = scales.below * turned.inner[size:, :size]
    return Turned(image, scales.rest * turned.rest)


def inverse(bent: Scales, there: Scales, inner: Tensor, rest: Tensor) -> Scales:
    """Invert the operator plus a diagonal, where it is finite; zero elsewhere."""
    size = len(bent.same)
    square = inner[:size, :size]
    other = square.T + bent.same
    # The determinant of the two by two matrix of an entry and its mirror image, of terms that are not negative.
    alpha, beta = bent.same + bent.swapped, bent.same - bent.swapped
    det = square * square.T + bent.same * (square + square.T) + alpha * beta
    tiny = torch.finfo(det.dtype).tiny
    det = det.clamp(min=tiny)
    return Scales(
        there.same * other / det,
        -there.same * bent.swapped / det,
        there.right / (inner[:size, size:] + bent.right).clamp(min=tiny),
        there.below / (inner[size:, :size] + bent.below).clamp(min=tiny),
        there.rest / (rest + bent.rest).clamp(min=tiny),
    )
