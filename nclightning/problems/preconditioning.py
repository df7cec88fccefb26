r"""Preconditioners for the conjugate gradients of a Newton step: approximate inverses of its matrix.

The matrix is the Hessian of the nuclear norm plus the Hessian of the loss. In the axes of the soft threshold the first
is diagonal. :class:`DiagonalInverse` approximates the second by its diagonal, too. For cross-entropy this is a poor
approximation: the Hessian of a row is nearly :math:`c v v^\top`, with v the direction of the likeliest class against
the others. :class:`LowRankInverse` approximates only the rest by its diagonal. With the scaled vectors v as columns of
P it inverts :math:`D + P P^\top` as :math:`D^{-1} - D^{-1} P (I + P^\top D^{-1} P)^{-1} P^\top D^{-1}` (Woodbury).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nclightning.problems.thresholding import InAxes, Scales, apply, inverse

__all__ = ["DiagonalInverse", "LowRankInverse", "LowRankTerm", "NormHessian", "Pieces"]

_TINY = torch.finfo(torch.float64).tiny
# Fraction of the low-rank term's diagonal that is added to D, so that D is zero only where the whole matrix is.
_FLOOR = 1e-9
# Number of elements in one batch of products.
_BATCH = 1 << 20


class Pieces(NamedTuple):
    """A direction in the axes of the soft threshold.

    Attributes:
        inner: Part of the core within both sets of axes, ``(p, q)``.
        rest: Part of the core outside of the left axes, ``(R, q)``; ``(0, q)`` if there is none.
        differences: As in :class:`nclightning.problems.invariant_points.Parts`.
        bias: ``(C,)`` or empty.
    """

    inner: Tensor
    rest: Tensor
    differences: Tensor
    bias: Tensor

    def flat(self) -> Tensor:
        """Concatenate all parts to one vector."""
        return torch.cat([part.reshape(-1) for part in self])


class NormHessian(NamedTuple):
    """The Hessian of everything but the loss: of the nuclear norm and of the penalty on the bias.

    Attributes:
        core: Its action on inner and rest.
        core_mask: 1 where it is finite, 0 where it is infinite.
        differences: Its diagonal on the differences.
        differences_mask: 1 where it is finite, 0 where it is infinite.
        bias: Its factor on the bias, one number.
    """

    core: Scales
    core_mask: Scales
    differences: Tensor
    differences_mask: Tensor
    bias: float


class LowRankTerm(NamedTuple):
    """The columns of P, one for each row of the loss: ``left_k right_k^T`` in inner, and zero in rest.

    Attributes:
        left: ``(R, p)``.
        right: ``(R, q)``.
        differences: ``(R, number of kinds with more than one class)``.
        bias: ``(R, C)``.
    """

    left: Tensor
    right: Tensor
    differences: Tensor
    bias: Tensor

    def transposed(self, pieces: Pieces) -> Tensor:
        """Multiply ``P^T`` with a direction, ``(R,)``."""
        core = ((self.left @ pieces.inner) * self.right).sum(dim=1)
        return core + self.differences @ pieces.differences + self.bias @ pieces.bias

    def combined(self, factors: Tensor, rest: Tensor) -> Pieces:
        """Multiply P with a vector."""
        inner = (self.left * factors.unsqueeze(1)).T @ self.right
        return Pieces(inner, torch.zeros_like(rest), factors @ self.differences, factors @ self.bias)

    def squares(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return parts of ``P P^T``: the diagonals on inner and on differences, and the full block of the bias."""
        return self.left.square().T @ self.right.square(), self.differences.square().sum(dim=0), self.bias.T @ self.bias


class DiagonalInverse:
    """Inverse of a matrix that is diagonal except for the block of the bias.

    Args:
        norm_hessian: The Hessian of everything but the loss.
        curvatures: Second derivatives of the loss; its full Hessian for the bias.
    """

    def __init__(self, norm_hessian: NormHessian, curvatures: Pieces) -> None:
        self.core = inverse(norm_hessian.core, norm_hessian.core_mask, curvatures.inner, curvatures.rest)
        self.differences = norm_hessian.differences_mask / (curvatures.differences + norm_hessian.differences).clamp(
            min=_TINY
        )
        hessian = curvatures.bias.clone()
        hessian.diagonal().add_(norm_hessian.bias)
        roots = hessian.diagonal().clamp(min=_TINY).sqrt()
        # The curvatures of large and small classes may differ by more than 1e16. Without this scaling, the
        # pseudo-inverse would drop the small ones.
        bias = torch.linalg.pinv(hessian / roots / roots.unsqueeze(1), hermitian=True)
        self.bias = bias / roots / roots.unsqueeze(1)

    def __call__(self, pieces: Pieces) -> Pieces:
        """Multiply the inverse with a direction."""
        core = apply(self.core, InAxes(pieces.inner, pieces.rest))
        return Pieces(*core, self.differences * pieces.differences, self.bias @ pieces.bias)


class LowRankInverse:
    """Inverse of such a matrix plus ``P P^T``.

    Args:
        norm_hessian: The Hessian of everything but the loss.
        flanks: Second derivatives of the loss without the low-rank term.
        low_rank: P.
    """

    def __init__(self, norm_hessian: NormHessian, flanks: Pieces, low_rank: LowRankTerm) -> None:
        inner, differences, bias = (_FLOOR * part for part in low_rank.squares())
        kept = Pieces(flanks.inner + inner, flanks.rest, flanks.differences + differences, flanks.bias + bias)
        self.diagonal, self.low_rank = DiagonalInverse(norm_hessian, kept), low_rank
        matrix = self._products()
        matrix.diagonal().add_(1)
        self.root, failed = torch.linalg.cholesky_ex(matrix)
        self.is_valid = not int(failed) and bool(self.root.isfinite().all())

    def __call__(self, pieces: Pieces) -> Pieces:
        """Multiply the inverse with a direction."""
        first = self.diagonal(pieces)
        factors = torch.cholesky_solve(self.low_rank.transposed(first).unsqueeze(1), self.root)[:, 0]
        second = self.diagonal(self.low_rank.combined(factors, pieces.rest))
        return Pieces(*(a - b for a, b in zip(first, second, strict=True)))

    def _products(self) -> Tensor:
        """Compute ``P^T D^-1 P``, batch of rows by batch. It is symmetric, so that only its upper half is formed."""
        (left, right, differences, bias), scales = self.low_rank, self.diagonal.core
        size, count = len(scales.same), len(left)
        same = left.new_empty(left.shape[1], right.shape[1])
        same[:size, :size], same[:size, size:] = scales.same, scales.right
        same[size:, :size] = scales.below.expand(len(same) - size, size)
        matrix = (self.diagonal.differences * differences) @ differences.T + bias @ self.diagonal.bias @ bias.T
        batch = max(1, _BATCH // max(1, same.numel()))
        for start in range(0, count, batch):
            rows = slice(start, start + batch)
            images = left[rows].unsqueeze(2) * same * right[rows].unsqueeze(1)
            swapped = left[rows, :size].unsqueeze(2) * scales.swapped * right[rows, :size].unsqueeze(1)
            images[:, :size, :size] += swapped.mT
            matrix[rows, start:] += ((left[start:] @ images) * right[start:]).sum(dim=2)
        upper: Tensor = matrix.triu()
        return upper + upper.triu(1).T
