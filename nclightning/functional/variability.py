"""NC1: how far features are from their class means, relative to the spread of the means, in its published forms."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from nclightning.functional.linear import apart, distances, singular_vectors
from nclightning.functional.statistics import BetweenWeights, ClassStatistics, GlobalMean

__all__ = [
    "class_distance_normalized_variance",
    "variability_collapse_index",
    "within_between_ratio",
    "within_class_variability",
]


def within_class_variability(
    stats: ClassStatistics,
    global_mean: GlobalMean = "class",
    between_weights: BetweenWeights = "uniform",
    divide_by_classes: bool = True,
) -> Tensor:
    r"""Measure within-class variability through the pseudo-inverse of the between-class covariance (NC1).

    .. math:: \mathrm{NC}_1 = \tfrac1K \operatorname{tr}(\Sigma_W \Sigma_B^{\dagger}),\quad
        \Sigma_W = \tfrac1N \sum_i (h_i - \mu_{y_i})(h_i - \mu_{y_i})^\top,\quad
        \Sigma_B = \sum_k w_k (\mu_k - \mu_G)(\mu_k - \mu_G)^\top

    Read in the coordinates of the singular value decomposition of the centred means, whose rank is taken to be
    exactly ``min(K - 1, d)``: no pseudo-inverse of a d x d matrix, no cutoff that drops or adds a direction near
    collapse. Classes without samples are left out and K counts those present. Paper: Appendix; Papyan, Han and Donoho
    (2020), Fig. 6. Conventions differ on unbalanced data only, but for the last.

    Args:
        stats: Statistics of the features, with scatter.
        global_mean: Of ``"class"`` means (Papyan et al.; the default) or of ``"sample"`` (Zhu et al., 2021).
        between_weights: ``"uniform"`` 1/K (everybody; the default) or ``"count"`` n_k/N (discriminant analysis).
        divide_by_classes: False leaves out the 1/K, as the notebook of Papyan et al. does, not their caption.

    Returns:
        Non-negative scalar in the dtype of the statistics, dimensionless. 0 at exact collapse; ``inf`` where the
        class means coincide along a direction of that rank in which the features spread; ``nan`` where they
        coincide and nothing spreads, with fewer than two classes present, or with features that are not finite.

    Raises:
        ValueError: If the statistics have no scatter, or a convention does not exist.
    """
    num_present = stats.present.sum()
    singular, right = singular_vectors(stats.between_root(global_mean, between_weights))
    spread = stats.spread_along(right)
    kept = torch.arange(len(singular), device=singular.device) < num_present - 1
    value = torch.where(kept, spread / singular.square(), 0).sum() / stats.counts.sum()
    if divide_by_classes:
        value = value / num_present
    return torch.where(num_present >= 2, value, torch.nan)


def within_between_ratio(
    stats: ClassStatistics, global_mean: GlobalMean = "class", between_weights: BetweenWeights = "uniform"
) -> Tensor:
    r"""Divide the traces of within-class and between-class covariance (NC1 as a trace quotient).

    .. math:: \operatorname{tr}\Sigma_W / \operatorname{tr}\Sigma_B

    Tirer, Huang and Niles-Weed (2023). Unlike :func:`within_class_variability` it counts spread outside the span of
    the means, too, and is not invariant to linear maps. Light statistics suffice.

    Args:
        stats: Statistics of the features.
        global_mean: As for :func:`within_class_variability`.
        between_weights: As for :func:`within_class_variability`.

    Returns:
        Non-negative scalar; 0 at exact collapse, ``inf`` where the means coincide, ``nan`` where nothing spreads
        either or with fewer than two classes present.
    """
    between = stats.between_root(global_mean, between_weights).square().sum()
    value = stats.spreads.sum() / stats.counts.sum() / between
    return torch.where(stats.present.sum() >= 2, value, torch.nan)


def class_distance_normalized_variance(
    stats: ClassStatistics, reduction: Literal["mean", "max", "none"] = "mean"
) -> Tensor:
    r"""Compare variances with the distances of class means, pair by pair (CDNV).

    .. math:: V_{ij} = \frac{v_i + v_j}{2 \|\mu_i - \mu_j\|^2},\qquad
        v_k = \tfrac1{n_k} \sum_{i: y_i = k} \|h_i - \mu_k\|^2

    Galanti, György and Hutter (2022). Pairs are formed tile by tile: memory grows with K, not with K^2. Light
    statistics suffice.

    Args:
        stats: Statistics of the features.
        reduction: ``"mean"`` over all pairs of distinct classes present, ``"max"`` for the worst pair, ``"none"``
            for each class its mean over the others ``(K,)``, ``nan`` where absent.

    Returns:
        Non-negative; 0 at exact collapse, ``inf`` for a pair of coinciding means, ``nan`` if its features do not
        spread either, or with fewer than two classes present.

    Raises:
        ValueError: If there is no such reduction.
    """
    if reduction not in ("mean", "max", "none"):
        raise ValueError(f"reduction must be 'mean', 'max' or 'none', got {reduction!r}.")
    present, means = stats.present, stats.centred_means
    variances = stats.spreads / stats.counts.clamp(min=1)
    sums, largest = [], []
    for rows, squared in distances(means):
        pair = apart(rows, present)
        values = (variances.narrow(0, rows.start, len(rows)).unsqueeze(1) + variances) / (2 * squared.square())
        sums.append(torch.where(pair, values, 0).sum(dim=1))
        largest.append(torch.where(pair, values, 0).amax(dim=1))
    num_present = present.sum()
    per_class = torch.where(present & (num_present >= 2), torch.cat(sums) / (num_present - 1), torch.nan)
    if reduction == "none":
        return per_class
    value = torch.cat(largest).amax() if reduction == "max" else per_class.nansum() / num_present
    # nansum must not hide a pair that is not a number.
    return torch.where(torch.where(present, per_class.isnan(), num_present < 2).any(), torch.nan, value)


def variability_collapse_index(stats: ClassStatistics) -> Tensor:
    r"""Measure the share of the total covariance that the class means do not explain (VCI).

    .. math:: \mathrm{VCI} = 1 - \frac{\operatorname{tr}(\Sigma_T^\dagger \Sigma_B)}{\min(d, K-1)},\qquad
        \Sigma_T = \Sigma_W + \Sigma_B

    Xu and Liu (2023), with :math:`\Sigma_B` of uniform weights. Evaluated on the span of the means, where
    :math:`\Sigma_B = \Lambda`, as :math:`\operatorname{tr}\,E(E+\Lambda)^{-1}/r` with E the Schur complement of
    :math:`\Sigma_W`, so that nothing is subtracted from 1. The Schur complement regresses on all directions outside
    that span: with fewer than d samples more than classes the regression explains everything and the index is 0.

    Args:
        stats: Statistics of the features, with scatter.

    Returns:
        Scalar in [0, 1]; 0 at exact collapse, 1 where the class means coincide, ``nan`` where nothing spreads
        either, with fewer than two classes present, or with features that are not finite.

    Raises:
        ValueError: If the statistics have no scatter.
    """
    num_present = stats.present.sum()
    within = stats.scatter / stats.counts.sum()
    singular, span = singular_vectors(stats.between_root(), full=True)
    rank = (num_present - 1).clamp(max=len(within))
    inside = torch.arange(len(within), device=within.device) < rank
    outside = inside.logical_not()
    finite = within.isfinite().all()
    rotated = span @ torch.where(finite, within, 0) @ span.T
    outer = torch.where(outside.unsqueeze(1) & outside, rotated, 0)
    cross = torch.where(inside.unsqueeze(1) & outside, rotated, 0)
    unexplained = rotated - cross @ torch.linalg.pinv(outer, hermitian=True) @ cross.T
    unexplained = torch.where(inside.unsqueeze(1) & inside, unexplained, 0)
    between = torch.cat([singular.square(), singular.new_zeros(len(within) - len(singular))])
    total = unexplained + torch.where(inside, between, 1).diag()
    scale = total.diagonal().sqrt()
    scale = scale.unsqueeze(1) * scale
    share = torch.linalg.solve_ex(total / scale, unexplained / scale).result.diagonal().sum() / rank
    return torch.where((num_present >= 2) & finite, share.clamp(0, 1), torch.nan)
