r"""Approximate inverses of the matrix of a Newton step, for conjugate gradients.

In the axes of the threshold the nuclear norm is diagonal. :class:`Diagonal` takes what is of the loss to be
so too. But the Hessian of a row of cross-entropy is :math:`c v v^\top` plus little else, with v the likeliest class
against the others, and far from diagonal. :class:`Peaked` takes only what is left to be diagonal. With these vectors as
columns of P it inverts :math:`D + P P^\top` as :math:`D^{-1} - D^{-1} P (I + P^\top D^{-1} P)^{-1} P^\top D^{-1}`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nclightning.problems.thresholding import Scales, Turned, apply, inverse

__all__ = ["Bends", "Diagonal", "Leads", "Peaked", "Pieces"]

_TINY = torch.finfo(torch.float64).tiny
# Part of the leads that is let be in the diagonal, so that it is zero only where the matrix is.
_FLOOR = 1e-9
# Numbers in one batch of products.
_BATCH = 1 << 20


class Pieces(NamedTuple):
    """A direction in the axes of the threshold.

    Attributes:
        inner: ``(p, q)``.
        rest: ``(0, q)`` or ``(R, q)``: outside of the left axes.
        apart: Of kinds with more than one class.
        bias: ``(C,)`` or empty.
    """

    inner: Tensor
    rest: Tensor
    apart: Tensor
    bias: Tensor

    def flat(self) -> Tensor:
        """One vector."""
        return torch.cat([part.reshape(-1) for part in self])


class Bends(NamedTuple):
    """What does not come from the loss.

    Attributes:
        core: On inner and rest.
        core_there: Factors 1 and 0: where it is finite.
        apart: Diagonal.
        apart_there: Factors 1 and 0.
        bias: A number.
    """

    core: Scales
    core_there: Scales
    apart: Tensor
    apart_there: Tensor
    bias: float


class Leads(NamedTuple):
    """Columns of P, one for each row of the loss: ``left_k right_k^T`` in inner, and nothing in rest.

    Attributes:
        left: ``(R, p)``.
        right: ``(R, q)``.
        apart: ``(R, number of kinds with more than one class)``.
        bias: ``(R, C)``.
    """

    left: Tensor
    right: Tensor
    apart: Tensor
    bias: Tensor

    def transposed(self, pieces: Pieces) -> Tensor:
        """``P^T`` times a direction, ``(R,)``."""
        core = ((self.left @ pieces.inner) * self.right).sum(dim=1)
        return core + self.apart @ pieces.apart + self.bias @ pieces.bias

    def combined(self, factors: Tensor, rest: Tensor) -> Pieces:
        """P times a vector."""
        inner = (self.left * factors.unsqueeze(1)).T @ self.right
        return Pieces(inner, torch.zeros_like(rest), factors @ self.apart, factors @ self.bias)

    def squares(self) -> tuple[Tensor, Tensor, Tensor]:
        """``P P^T``: diagonal of inner and of apart, and all of the bias."""
        return self.left.square().T @ self.right.square(), self.apart.square().sum(dim=0), self.bias.T @ self.bias


class Diagonal:
    """Inverse of a matrix that is diagonal but for the bias.

    Args:
        bends: What does not come from the loss.
        curvatures: Second derivatives of the loss; of the bias its Hessian.
    """

    def __init__(self, bends: Bends, curvatures: Pieces) -> None:
        self.core = inverse(bends.core, bends.core_there, curvatures.inner, curvatures.rest)
        self.apart = bends.apart_there / (curvatures.apart + bends.apart).clamp(min=_TINY)
        hessian = curvatures.bias.clone()
        hessian.diagonal().add_(bends.bias)
        roots = hessian.diagonal().clamp(min=_TINY).sqrt()
        # Classes of many samples and of few have curvatures that differ by more digits than a pseudo-inverse keeps.
        bias = torch.linalg.pinv(hessian / roots / roots.unsqueeze(1), hermitian=True)
        self.bias = bias / roots / roots.unsqueeze(1)

    def __call__(self, pieces: Pieces) -> Pieces:
        """Apply it."""
        core = apply(self.core, Turned(pieces.inner, pieces.rest))
        return Pieces(*core, self.apart * pieces.apart, self.bias @ pieces.bias)


class Peaked:
    """Inverse of such a matrix plus ``P P^T``.

    Args:
        bends: What does not come from the loss.
        flanks: Second derivatives of the loss without the leads.
        leads: P.
    """

    def __init__(self, bends: Bends, flanks: Pieces, leads: Leads) -> None:
        inner, apart, bias = (_FLOOR * part for part in leads.squares())
        kept = Pieces(flanks.inner + inner, flanks.rest, flanks.apart + apart, flanks.bias + bias)
        self.diagonal, self.leads = Diagonal(bends, kept), leads
        matrix = self._products()
        matrix.diagonal().add_(1)
        self.root, failed = torch.linalg.cholesky_ex(matrix)
        self.is_valid = not int(failed) and bool(self.root.isfinite().all())

    def __call__(self, pieces: Pieces) -> Pieces:
        """Apply it."""
        first = self.diagonal(pieces)
        factors = torch.cholesky_solve(self.leads.transposed(first).unsqueeze(1), self.root)[:, 0]
        second = self.diagonal(self.leads.combined(factors, pieces.rest))
        return Pieces(*(a - b for a, b in zip(first, second, strict=True)))

    def _products(self) -> Tensor:
        """``P^T D^-1 P``, a batch of rows at a time, each against those after it."""
        (left, right, apart, bias), scales = self.leads, self.diagonal.core
        size, count = len(scales.same), len(left)
        same = left.new_empty(left.shape[1], right.shape[1])
        same[:size, :size], same[:size, size:] = scales.same, scales.right
        same[size:, :size] = scales.below.expand(len(same) - size, size)
        matrix = (self.diagonal.apart * apart) @ apart.T + bias @ self.diagonal.bias @ bias.T
        batch = max(1, _BATCH // max(1, same.numel()))
        for start in range(0, count, batch):
            rows = slice(start, start + batch)
            images = left[rows].unsqueeze(2) * same * right[rows].unsqueeze(1)
            swapped = left[rows, :size].unsqueeze(2) * scales.swapped * right[rows, :size].unsqueeze(1)
            images[:, :size, :size] += swapped.mT
            matrix[rows, start:] += ((left[start:] @ images) * right[start:]).sum(dim=2)
        upper: Tensor = matrix.triu()
        return upper + upper.triu(1).T
