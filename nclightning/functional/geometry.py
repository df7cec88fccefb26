"""NC0 and NC2: how close rows - the head's, or the centred class means - are to a simplex equiangular tight frame."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from nclightning.errors import UserError
from nclightning.functional.linear import apart, cosines, power_of_two, triangular_factor

__all__ = ["equiangularity", "equinorm", "etf_deviation", "head_sum"]

# Elements of the rows that are taken to float64 at a time.
_ELEMENTS_AT_A_TIME = 2**22


def head_sum(weight: Tensor, relative: bool = False) -> Tensor:
    r"""Measure how far the rows of the head are from summing to zero (NC0).

    .. math:: \mathrm{NC}_0 = \|W 1_K\|_2

    arXiv 2602.16642. Zero at every stationary point of cross-entropy with coupled weight decay, and a condition for
    the raw and the centred form of :func:`etf_deviation` to agree.

    Args:
        weight: Head ``(K, d)``.
        relative: Divide by :math:`\|W\|_F`.

    Returns:
        Non-negative scalar in the dtype of ``weight`` and the unit of the weights; with ``relative`` in
        :math:`[0, \sqrt K]`, ``nan`` for a zero head.

    Raises:
        ValueError: If ``weight`` is not ``(K, d)`` with K at least 2.
    """
    check_rows("weight", weight)
    unit = power_of_two(weight)
    value: Tensor = torch.linalg.vector_norm((weight / unit).sum(dim=0))
    return value / torch.linalg.matrix_norm(weight / unit) if relative else value * unit


def etf_deviation(weight: Tensor, centred: bool = False, present: Tensor | None = None) -> Tensor:
    r"""Measure how far rows are from a simplex equiangular tight frame by their Gram matrix (NC2).

    .. math:: \mathrm{NC}_2 = \left\| \frac{W^\top W}{\|W^\top W\|_F}
        - \frac{1}{\sqrt{K-1}} \left(I_K - \tfrac1K 1_K 1_K^\top\right) \right\|_F

    Paper: Appendix, with erratum E1 (the 1/K). For the class means pass ``stats.mean_offsets`` and
    ``stats.present``. With ``K > d + 1`` no simplex ETF fits and the least value is
    :math:`\sqrt{2 - 2\sqrt{d/(K-1)}}`; the measures of :mod:`nclightning.functional.uniformity` are meant for that.

    Args:
        weight: Head ``(K, d)`` or other rows, K at least 2.
        centred: Subtract the mean row first (Zhou et al., 2022); raw is Zhu et al. (2021) and the seed paper.
        present: Rows to compare, bool ``(K,)``; None takes all.

    Returns:
        Scalar in [0, 2] in the dtype of ``weight``, dimensionless; 0 for an ETF of any size and orientation, up to
        the round-off of that dtype; ``nan`` for zero rows or fewer than two of them.

    Raises:
        ValueError: If ``weight`` is not ``(K, d)`` with K at least 2.
    """
    present = check_rows("weight", weight, present)
    rows = weight * present.unsqueeze(1)
    if centred:
        rows = (rows - rows.sum(dim=0) / present.sum()) * present.unsqueeze(1)
    return deviation_from_etf(rows, rows, present)


def equinorm(rows: Tensor, present: Tensor | None = None, ddof: int = 1) -> Tensor:
    r"""Measure how much the norms of rows differ: their coefficient of variation (NC2, equinorm).

    .. math:: \operatorname{std}_k \|m_k\| \,/\, \operatorname{mean}_k \|m_k\|

    Papyan, Han and Donoho (2020), Fig. 2, for the head and for the centred class means.

    Args:
        rows: ``(K, d)``: the head, or ``stats.mean_offsets`` with ``stats.present``.
        present: Rows to compare, bool ``(K,)``; None takes all.
        ddof: The standard deviation divides by ``K - ddof``; 1 as ``torch.std`` does in the published code.

    Returns:
        Non-negative scalar in the dtype of ``rows``; 0 for equal norms, ``nan`` for zero rows or fewer than two.

    Raises:
        ValueError: If ``rows`` is not ``(K, d)`` with K at least 2.
    """
    present = check_rows("rows", rows, present)
    norms = torch.linalg.vector_norm(rows / power_of_two(rows), dim=1)
    count = present.sum()
    mean = torch.where(present, norms, 0).sum() / count
    variance = torch.where(present, (norms - mean).square(), 0).sum() / (count - ddof)
    return variance.sqrt() / mean


def equiangularity(
    rows: Tensor, present: Tensor | None = None, reduction: Literal["mean", "max", "none"] = "mean"
) -> Tensor:
    r"""Measure how far angles between rows are from those of a simplex ETF (NC2, equiangularity).

    .. math:: \operatorname*{mean}_{i \ne j} \left| \cos\angle(m_i, m_j) + \tfrac1{K-1} \right|

    Papyan, Han and Donoho (2020), Figs. 3 and 4. Pairs are formed tile by tile.

    Args:
        rows: ``(K, d)``: the head, or ``stats.centred_means`` with ``stats.present``.
        present: Rows to compare, bool ``(K,)``; None takes all.
        reduction: ``"mean"``, ``"max"`` for the worst pair, or ``"none"`` for each row its mean over the others
            ``(K,)``, ``nan`` where absent.

    Returns:
        In [0, 2], in the dtype of ``rows``; 0 for an ETF, ``nan`` with a zero row or fewer than two.

    Raises:
        ValueError: If ``rows`` is not ``(K, d)`` with K at least 2, or there is no such reduction.
    """
    present = check_rows("rows", rows, present)
    if reduction not in ("mean", "max", "none"):
        raise UserError(f"reduction must be 'mean', 'max' or 'none', got {reduction!r}.")
    count = present.sum().to(rows)
    sums, largest = [], []
    for part, cosine in cosines(rows):
        excess = torch.where(apart(part, present), (cosine + 1 / (count - 1)).abs(), 0)
        sums.append(excess.sum(dim=1))
        largest.append(excess.amax())
    if reduction == "max":
        return torch.where(count >= 2, torch.stack(largest).amax(), torch.nan)
    per_row = torch.cat(sums) / (count - 1)
    if reduction == "none":
        return torch.where(present, per_row, torch.nan)
    return torch.where(present, per_row, 0).sum() / count


def check_rows(name: str, rows: Tensor, present: Tensor | None = None) -> Tensor:
    """Raise unless rows are ``(K, d)`` with K at least 2; return which of them count."""
    if rows.ndim != 2 or len(rows) < 2:
        raise UserError(f"{name} must be (K, d) with K >= 2, got {tuple(rows.shape)}.")
    if present is None:
        return torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    if present.dtype != torch.bool or present.shape != rows.shape[:1]:
        raise UserError(f"present must be bool of shape ({len(rows)},), got {present.dtype} {tuple(present.shape)}.")
    return present


def deviation_from_etf(left: Tensor, right: Tensor, present: Tensor) -> Tensor:
    r"""Frobenius distance of normalised inner products to the Gram matrix E of an ETF over the classes present.

    With more than d + 1 classes the ``K x K`` matrix :math:`A = \mathrm{left}\,\mathrm{right}^\top` is not formed:
    both it and E have norm 1, so that the square of the distance is :math:`2 - 2\langle A, E\rangle/\|A\|`, with the
    product from sums of rows and the norm from what is ``d x d``. E has rank ``K - 1`` and A at most d, so that
    the square is at least about ``1/(d + 1)``, and the difference loses no more digits than d has. Up to d + 1 classes
    it may be 0, and the difference would lose all of them: there the ``K x K`` matrix is no larger than the rows.

    Args:
        left: Rows ``(K, d)``, zero for absent classes.
        right: Rows ``(K, d)``.
        present: Bool ``(K,)``.

    Returns:
        Scalar in the dtype of the rows; ``nan`` for rows that are zero, or orthogonal to each other up to rounding.
    """
    # Products overflow in half precision and underflow in any, and a scale drops out.
    left, right = _each(lambda rows: rows / rows.abs().amax(), left, right)
    if len(left) > left.shape[1] + 1:  # Absent classes would be in the way of telling whether an ETF fits.
        index = present.nonzero().squeeze(1)
        if len(index) < len(left):
            present = present.index_select(0, index)
            left, right = _each(lambda rows: rows.index_select(0, index), left, right)
    if len(left) > left.shape[1] + 1:
        return _deviation_by_sums(left, right)
    gram = left @ right.T * present.unsqueeze(1)
    size = _beyond_rounding(*(torch.linalg.matrix_norm(each) for each in (gram, left, right)))
    mask = present.to(gram)
    count = mask.sum()
    target = (torch.diag(mask) - torch.outer(mask, mask) / count) / (count - 1).sqrt()
    deviation: Tensor = torch.linalg.matrix_norm(gram / size - target)
    return torch.where(count >= 2, deviation, math.nan)


def _each(change: Callable[[Tensor], Tensor], left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Change both, once if they are the same."""
    changed = change(left)
    return changed, changed if left is right else change(right)


def _deviation_by_sums(left: Tensor, right: Tensor) -> Tensor:
    """Evaluate the distance to an ETF in float64 from what is no larger than ``d x d``, some rows at a time."""
    count, dim = left.shape
    wide = torch.promote_types(left.dtype, torch.float64)

    def parts(rows: Tensor) -> Iterator[Tensor]:
        return (part.to(wide) for part in torch.split(rows, max(_ELEMENTS_AT_A_TIME // dim, 1)))

    sums, squares = left.new_zeros(2, dim, dtype=wide), left.new_zeros(3, dtype=wide)
    gram, factor = left.new_zeros(dim, dim, dtype=wide), left.new_zeros(0, dim, dtype=wide)
    for a, b in zip(parts(left), parts(right), strict=True):
        sums += torch.stack([a.sum(dim=0), b.sum(dim=0)])
        flat = a.reshape(-1), b.reshape(-1)
        squares += torch.stack([torch.dot(x, y) for x, y in (flat, flat[:1] * 2, flat[1:] * 2)])
        if left is right:
            gram.addmm_(a.T, a)
        else:
            factor = triangular_factor([factor, b])
    product = (squares[0] - torch.dot(sums[0], sums[1]) / count) / math.sqrt(count - 1)
    if left is right:
        norm = torch.linalg.matrix_norm(gram)
    else:
        # The product of both Gram matrices would cancel where the rows are nearly orthogonal; squares of the rows of
        # one in the coordinates of a triangular factor of the other do not.
        norm = torch.stack([(a @ factor.T).square().sum() for a in parts(left)]).sum().sqrt()
    norm = _beyond_rounding(norm, squares[1].sqrt(), squares[2].sqrt())
    return (2 - 2 * product / norm).clamp(min=0).sqrt().to(left.dtype)


def _beyond_rounding(norm: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Norm of inner products of rows of these norms; ``nan`` if they are orthogonal up to rounding."""
    epsilon = torch.finfo(torch.promote_types(norm.dtype, torch.float32)).eps  # Products of half precision are exact.
    return torch.where(norm > 4 * epsilon * left * right, norm, torch.nan)
