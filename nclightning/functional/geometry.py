"""NC0 and NC2: how far the rows of the head, or the centred class means, are from a simplex ETF."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from nclightning.errors import UserError
from nclightning.functional.linear import cosines, distinct_pairs, power_of_two, triangular_factor

__all__ = ["equiangularity", "equinorm", "etf_deviation", "head_sum"]

# Number of elements of the rows that are converted to float64 at a time.
_ELEMENTS_PER_STEP = 2**22


def head_sum(weight: Tensor, relative: bool = False) -> Tensor:
    r"""Measure how far the rows of the head are from summing to zero (NC0).

    .. math:: \mathrm{NC}_0 = \|W 1_K\|_2

    arXiv 2602.16642. It is zero at every stationary point of cross-entropy with coupled weight decay. Where it is zero,
    the two forms of :func:`etf_deviation`, raw and centred, agree.

    Args:
        weight: Head ``(K, d)``.
        relative: Divide by :math:`\|W\|_F`.

    Returns:
        Non-negative scalar in the dtype of ``weight`` and the unit of the weights. With ``relative`` it is
        dimensionless, in :math:`[0, \sqrt K]`, and ``nan`` for a zero head.

    Raises:
        ValueError: If ``weight`` is not ``(K, d)`` with K at least 2.

    Example:
        >>> import torch
        >>> from nclightning.functional import head_sum
        >>> head_sum(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
        tensor(5.)
        >>> head_sum(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))  # an ETF of two classes
        tensor(0.)
    """
    check_rows("weight", weight)
    unit = power_of_two(weight)
    value: Tensor = torch.linalg.vector_norm((weight / unit).sum(dim=0))
    return value / torch.linalg.matrix_norm(weight / unit) if relative else value * unit


def etf_deviation(weight: Tensor, centred: bool = False, present: Tensor | None = None) -> Tensor:
    r"""Measure how far the Gram matrix of rows is from that of a simplex equiangular tight frame (NC2).

    .. math:: \mathrm{NC}_2 = \left\| \frac{W^\top W}{\|W^\top W\|_F}
        - \frac{1}{\sqrt{K-1}} \left(I_K - \tfrac1K 1_K 1_K^\top\right) \right\|_F

    Paper: Appendix, with erratum E1 (the 1/K). The columns of the paper's W are the rows here. For the class means pass
    ``stats.mean_offsets`` and ``stats.present``. With ``K > d + 1`` no simplex ETF exists, and the least value is
    :math:`\sqrt{2 - 2\sqrt{d/(K-1)}}`. For this case use :func:`hyperspherical_energy` and
    :func:`one_vs_rest_distance`.

    Args:
        weight: Head ``(K, d)`` or other rows, K at least 2.
        centred: Subtract the mean row first (Zhou et al., 2022). The default does not (Zhu et al., 2021, and the
            paper).
        present: Rows to compare, bool ``(K,)``; None takes all.

    Returns:
        Scalar in [0, sqrt(2)] in the dtype of ``weight``, dimensionless. It is 0 for an ETF of any size and
        orientation, up to the round-off of that dtype; ``nan`` if all rows are zero or fewer than two are present.

    Raises:
        ValueError: If ``weight`` is not ``(K, d)`` with K at least 2.

    Example:
        >>> import torch
        >>> from nclightning.functional import etf_deviation
        >>> etf = torch.eye(3) - 1 / 3
        >>> bool(etf_deviation(5 * etf) < 1e-6)
        True
        >>> round(float(etf_deviation(torch.eye(3))), 4)  # equal lengths, but right angles
        0.6058
        >>> bool(etf_deviation(torch.eye(3), centred=True) < 1e-6)
        True
    """
    present = check_rows("weight", weight, present)
    rows = weight * present.unsqueeze(1)
    if centred:
        rows = (rows - rows.sum(dim=0) / present.sum()) * present.unsqueeze(1)
    return deviation_from_etf(rows, rows, present)


def equinorm(rows: Tensor, present: Tensor | None = None, ddof: int = 1) -> Tensor:
    r"""Measure how much the norms of rows differ, by their coefficient of variation (NC2, equinorm).

    .. math:: \operatorname{std}_k \|m_k\| \,/\, \operatorname{mean}_k \|m_k\|

    Papyan, Han and Donoho (2020), Fig. 2, for the head and for the centred class means.

    Args:
        rows: ``(K, d)``: the head, or ``stats.mean_offsets`` with ``stats.present``.
        present: Rows to compare, bool ``(K,)``; None takes all.
        ddof: The variance divides by ``K - ddof``. The default 1 is that of ``torch.std``, which the published code
            uses.

    Returns:
        Non-negative scalar in the dtype of ``rows``, dimensionless. It is 0 for equal norms and ``nan`` if all rows
        are zero or fewer than two are present.

    Raises:
        ValueError: If ``rows`` is not ``(K, d)`` with K at least 2.

    Example:
        >>> import torch
        >>> from nclightning.functional import equinorm
        >>> equinorm(torch.tensor([[3.0, 4.0], [0.0, 5.0]]))
        tensor(0.)
        >>> round(float(equinorm(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))), 4)
        0.7071
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
    r"""Measure how far the cosines between rows are from those of a simplex ETF (NC2, equiangularity).

    .. math:: \operatorname*{mean}_{i \ne j} \left| \cos\angle(m_i, m_j) + \tfrac1{K-1} \right|

    Papyan, Han and Donoho (2020), Figs. 3 and 4. Pairs are formed in tiles, so that memory grows with K, not with K^2.

    Args:
        rows: ``(K, d)``: the head, or ``stats.centred_means`` with ``stats.present``.
        present: Rows to compare, bool ``(K,)``; None takes all.
        reduction: ``"mean"`` is over all pairs, ``"max"`` is the worst pair, and ``"none"`` gives each row the mean
            over its pairs, ``(K,)``, ``nan`` for a row that is not present.

    Returns:
        Value in [0, 2] in the dtype of ``rows``, dimensionless. It is 0 for an ETF and ``nan`` if a row is zero or
        fewer than two are present.

    Raises:
        ValueError: If ``rows`` is not ``(K, d)`` with K at least 2, or ``reduction`` is unknown.

    Example:
        >>> import torch
        >>> from nclightning.functional import equiangularity
        >>> equiangularity(torch.eye(3, dtype=torch.float64)).round(decimals=4)  # cosines 0 instead of -1/2
        tensor(0.5000, dtype=torch.float64)
        >>> equiangularity(torch.tensor([[2.0, 0.0], [-1.0, 0.0]]))  # an ETF of two classes, but for the lengths
        tensor(0.)
    """
    present = check_rows("rows", rows, present)
    if reduction not in ("mean", "max", "none"):
        raise UserError(f"reduction must be 'mean', 'max' or 'none', got {reduction!r}.")
    count = present.sum().to(rows)
    sums, largest = [], []
    for part, cosine in cosines(rows):
        excess = torch.where(distinct_pairs(part, present), (cosine + 1 / (count - 1)).abs(), 0)
        sums.append(excess.sum(dim=1))
        largest.append(excess.amax())
    if reduction == "max":
        return torch.where(count >= 2, torch.stack(largest).amax(), torch.nan)
    per_row = torch.cat(sums) / (count - 1)
    if reduction == "none":
        return torch.where(present, per_row, torch.nan)
    return torch.where(present, per_row, 0).sum() / count


def check_rows(name: str, rows: Tensor, present: Tensor | None = None) -> Tensor:
    """Raise an error unless rows are ``(K, d)`` with K at least 2; return which of them are present, bool ``(K,)``."""
    if rows.ndim != 2 or len(rows) < 2:
        raise UserError(f"{name} must be (K, d) with K >= 2, got {tuple(rows.shape)}.")
    if present is None:
        return torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    if present.dtype != torch.bool or present.shape != rows.shape[:1]:
        raise UserError(f"present must be bool of shape ({len(rows)},), got {present.dtype} {tuple(present.shape)}.")
    return present


def deviation_from_etf(left: Tensor, right: Tensor, present: Tensor) -> Tensor:
    r"""Frobenius distance of normalised inner products from the Gram matrix E of an ETF over the classes present.

    Let :math:`A = \mathrm{left}\,\mathrm{right}^\top`, and let E have norm 1. The distance of :math:`A / \|A\|` from E
    is computed in one of two ways:

    - With more than d + 1 classes, from its square :math:`2 - 2\langle A, E\rangle/\|A\|`. The inner product follows
      from sums of rows and the norm from ``d x d`` matrices, so that the ``K x K`` matrix A is not formed. E has rank
      ``K - 1`` and A at most d. So the square is at least about ``1/(d + 1)``, and the subtraction loses only as many
      digits as d has.
    - With at most d + 1 classes, from A itself. The distance may be 0, where the subtraction would lose all digits, and
      A is no larger than the rows.

    Args:
        left: Rows ``(K, d)``, zero for absent classes.
        right: Rows ``(K, d)``.
        present: Bool ``(K,)``.

    Returns:
        Scalar in the dtype of the rows; ``nan`` for rows that are zero, or orthogonal to each other up to rounding.
    """
    # The scale of the rows cancels. Without this division, products can overflow or underflow.
    left, right = _apply_to_both(lambda rows: rows / rows.abs().amax(), left, right)
    if len(left) > left.shape[1] + 1:  # Whether an ETF exists depends on the number of classes present.
        index = present.nonzero().squeeze(1)
        if len(index) < len(left):
            present = present.index_select(0, index)
            left, right = _apply_to_both(lambda rows: rows.index_select(0, index), left, right)
    if len(left) > left.shape[1] + 1:
        return _deviation_by_sums(left, right)
    gram = left @ right.T * present.unsqueeze(1)
    size = _nan_within_rounding(*(torch.linalg.matrix_norm(each) for each in (gram, left, right)))
    mask = present.to(gram)
    count = mask.sum()
    target = (torch.diag(mask) - torch.outer(mask, mask) / count) / (count - 1).sqrt()
    deviation: Tensor = torch.linalg.matrix_norm(gram / size - target)
    return torch.where(count >= 2, deviation, math.nan)


def _apply_to_both(change: Callable[[Tensor], Tensor], left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Apply a function to both tensors, only once if they are the same object."""
    changed = change(left)
    return changed, changed if left is right else change(right)


def _deviation_by_sums(left: Tensor, right: Tensor) -> Tensor:
    """Evaluate the distance from an ETF in float64 from ``d x d`` matrices, block of rows by block."""
    count, dim = left.shape
    wide = torch.promote_types(left.dtype, torch.float64)

    def parts(rows: Tensor) -> Iterator[Tensor]:
        return (part.to(wide) for part in torch.split(rows, max(_ELEMENTS_PER_STEP // dim, 1)))

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
        # The trace of the product of both Gram matrices would cancel where the rows are nearly orthogonal. The sum of
        # squares of left times the triangular factor of right does not.
        norm = torch.stack([(a @ factor.T).square().sum() for a in parts(left)]).sum().sqrt()
    norm = _nan_within_rounding(norm, squares[1].sqrt(), squares[2].sqrt())
    return (2 - 2 * product / norm).clamp(min=0).sqrt().to(left.dtype)


def _nan_within_rounding(norm: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return the norm of inner products, or ``nan`` if it is only rounding relative to the norms of both factors."""
    epsilon = torch.finfo(torch.promote_types(norm.dtype, torch.float32)).eps  # Products of half precision are exact.
    return torch.where(norm > 4 * epsilon * left * right, norm, torch.nan)
