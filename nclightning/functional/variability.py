"""NC1: how far features are from their class means, relative to the spread of the means, by several definitions."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from nclightning.errors import UserError
from nclightning.functional.linear import distances, distinct_pairs, norm, power_of_two, singular_vectors
from nclightning.functional.rounding import (
    FINE,
    accumulated_rounding,
    rounding_along,
    rounding_of_mean,
    spread_of_rounding,
)
from nclightning.functional.statistics import BetweenWeights, ClassStatistics, GlobalMean

__all__ = [
    "between_class_rank",
    "class_distance_normalized_variance",
    "variability_collapse_index",
    "within_between_ratio",
    "within_class_variability",
]

# Root mean square of a rounding error relative to the largest one, rounded up.
_RMS_ROUNDING = 0.3
# Along directions in which features do not spread, the computed spread of the means may reach this multiple of the
# rounding error of the largest spread, for example behind a LayerNorm that subtracts a mean of 80 times the spread. The
# second number is for half precision.
_MOST_ROUNDINGS = (256, 2)


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

    Paper: Appendix; Papyan, Han and Donoho (2020), Fig. 6. Classes without samples are left out, and K is the number of
    classes present.

    The value is computed from the singular value decomposition of the centred class means, without the pseudo-inverse
    of a ``(d, d)`` matrix. A direction is significant if the spread of the means along it exceeds rounding of the
    features; the sum is over significant directions only. Behind a LayerNorm or a bottleneck, or with dead or
    duplicated units, features spread along fewer than ``min(K - 1, d)`` directions. Along the other directions
    round-off would be divided by round-off. :func:`between_class_rank` is the number of significant directions.

    The relative error is about eps times the ratio of the largest to the smallest significant spread of the means. A
    large within-class spread orthogonal to the means adds to it: with c orthogonal to means of size 1 and w along them,
    up to eps c^2 / w, which is 2e-7 for c = 1e4 and w = 0.1.

    Args:
        stats: Statistics of the features, with scatter.
        global_mean: ``"class"`` is the mean of the class means (Papyan et al.; the default), ``"sample"`` that of all
            features (Zhu et al., 2021). The choice matters on unbalanced data only.
        between_weights: ``"uniform"`` weights 1/K (the usual choice and the default) or ``"count"`` weights n_k/N
            (discriminant analysis). The choice matters on unbalanced data only.
        divide_by_classes: False leaves out the factor 1/K, as the published notebook of Papyan et al. does, in contrast
            to their caption.

    Returns:
        Non-negative scalar in the dtype of the statistics, dimensionless. It is 0 at exact collapse, and ``inf`` where
        the class means coincide but features spread. It is ``nan`` where nothing spreads at all, with fewer than two
        classes present, or with features that are not finite.

    Raises:
        ValueError: If the statistics have no scatter, or a convention is unknown.

    Example:
        >>> import torch
        >>> from nclightning.functional import class_statistics, within_class_variability
        >>> means = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).repeat_interleave(2, dim=0)
        >>> deviations = torch.tensor([[0.1, 5.0], [-0.1, -5.0]]).repeat(2, 1)
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> stats = class_statistics(means + deviations, labels, num_classes=2)
        >>> round(float(within_class_variability(stats)), 6)  # the spread of 5 is orthogonal to the class means
        0.005
        >>> float(within_class_variability(class_statistics(means, labels, num_classes=2)))
        0.0
    """
    num_present = stats.present.sum()
    singular, _, significant, spread = _significant_directions(stats, global_mean, between_weights)
    value = torch.where(significant, (spread / singular).square(), 0).sum()
    # Without a significant direction, all spread is within classes.
    value = torch.where(significant.any(), value, stats.norms.sum() / torch.zeros_like(value))
    if divide_by_classes:
        value = value / num_present
    return torch.where((num_present >= 2) & singular.isfinite().all(), value, torch.nan)


def between_class_rank(
    stats: ClassStatistics, global_mean: GlobalMean = "class", between_weights: BetweenWeights = "uniform"
) -> Tensor:
    """Count the significant directions: those along which class means spread by more than rounding of the features.

    :func:`within_class_variability` and :func:`variability_collapse_index` sum over these directions. Their number is
    at most ``min(K - 1, d)``, and less where features are confined to fewer dimensions.

    Args:
        stats: Statistics of the features, with scatter.
        global_mean: As for :func:`within_class_variability`.
        between_weights: As for :func:`within_class_variability`.

    Returns:
        Scalar in the dtype of the statistics; ``nan`` with fewer than two classes present, or with features that are
        not finite.

    Raises:
        ValueError: If the statistics have no scatter, or a convention is unknown.

    Example:
        >>> import torch
        >>> from nclightning.functional import between_class_rank, class_statistics
        >>> features = torch.tensor([[1.0, 0.0], [2.0, 0.0], [4.0, 0.0]])  # the second unit is dead
        >>> between_class_rank(class_statistics(features, torch.arange(3), num_classes=3))
        tensor(1., dtype=torch.float64)
    """
    singular, _, significant, _ = _significant_directions(stats, global_mean, between_weights)
    defined = (stats.present.sum() >= 2) & singular.isfinite().all()
    return torch.where(defined, significant.sum().to(singular), torch.nan)


def _significant_directions(
    stats: ClassStatistics, global_mean: GlobalMean, between_weights: BetweenWeights
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Find the significant directions of the centred class means.

    A direction is significant if the spread of the means along it exceeds rounding of the features. One more test
    applies where features spread further in other directions: a spread that could be the accumulated rounding of the
    whole network is significant only if it is more than twice what random means of this number of samples would have,
    and not far less than the largest spread.

    Returns:
        Singular values, right singular vectors, a bool mask of the significant ones, and the root mean square
        within-class spread along each.
    """
    singular, right = singular_vectors(stats.between_root(global_mean, between_weights))
    num_present, total, dim = stats.present.sum().to(singular), stats.counts.sum(), stats.means.shape[1]
    epsilon = torch.finfo(singular.dtype).eps
    spread = stats.norms_along(right) / total.sqrt()
    one = rounding_along(stats, right)
    # Largest singular value of a matrix of independent rounding errors (Marchenko and Pastur, 1967).
    edge = (_RMS_ROUNDING * (1 + (dim / num_present).sqrt())).clamp(min=1)
    per_class = num_present / torch.where(stats.present, 1 / stats.counts, 0).sum()
    rounding = edge * rounding_of_mean(one, spread, per_class)
    both, far = torch.maximum(singular, spread), torch.where(stats.epsilon <= FINE, *_MOST_ROUNDINGS)
    possible = torch.arange(len(singular), device=singular.device) < num_present - 1
    close = both <= accumulated_rounding(stats, one)
    by_chance = close & (possible & close.logical_not()).any() & (singular <= 2 * spread * (num_present / total).sqrt())
    far_below = (both <= far * one) & (singular <= far * stats.epsilon * singular.amax())
    exact = epsilon * max(stats.means.shape) * singular.amax()
    significant = possible & (singular > torch.maximum(rounding, exact)) & (by_chance | far_below).logical_not()
    return singular, right, significant, spread


def within_between_ratio(
    stats: ClassStatistics, global_mean: GlobalMean = "class", between_weights: BetweenWeights = "uniform"
) -> Tensor:
    r"""Divide the traces of within-class and between-class covariance (NC1 as a trace quotient).

    .. math:: \operatorname{tr}\Sigma_W / \operatorname{tr}\Sigma_B

    Tirer, Huang and Niles-Weed (2023). Unlike :func:`within_class_variability` it includes the spread outside the span
    of the means, and it is not invariant to linear maps. Light statistics suffice.

    Args:
        stats: Statistics of the features.
        global_mean: As for :func:`within_class_variability`.
        between_weights: As for :func:`within_class_variability`.

    Returns:
        Non-negative scalar in the dtype of the statistics, dimensionless. It is 0 at exact collapse, and ``inf`` where
        the means coincide up to rounding of the features. It is ``nan`` where nothing spreads at all, with fewer than
        two classes present, or with features that are not finite.

    Raises:
        ValueError: If a convention is unknown.

    Example:
        >>> import torch
        >>> from nclightning.functional import class_statistics, within_between_ratio
        >>> features = torch.tensor([[1.5, 0.0], [0.5, 0.0], [-1.0, 0.5], [-1.0, -0.5]])
        >>> stats = class_statistics(features, torch.tensor([0, 0, 1, 1]), num_classes=2)
        >>> round(float(within_between_ratio(stats)), 6)
        0.25
    """
    root = stats.between_root(global_mean, between_weights)
    weights = norm(root, dim=1) / norm(stats.centre_means(global_mean), dim=1)
    between, rounding = norm(root.flatten(), dim=0), norm(weights.nan_to_num(0) * stats.mean_rounding, dim=0)
    between = torch.where(between <= rounding, 0, between)
    value = (norm(stats.norms, dim=0) / stats.counts.sum().sqrt() / between).square()
    return torch.where(stats.present.sum() >= 2, value, torch.nan)


def class_distance_normalized_variance(
    stats: ClassStatistics, reduction: Literal["mean", "max", "none"] = "mean"
) -> Tensor:
    r"""Divide the variances of two classes by the squared distance of their means, for all pairs (CDNV).

    .. math:: V_{ij} = \frac{v_i + v_j}{2 \|\mu_i - \mu_j\|^2},\qquad
        v_k = \tfrac1{n_k} \sum_{i: y_i = k} \|h_i - \mu_k\|^2

    Galanti, György and Hutter (2022). Pairs are formed in tiles, so that memory grows with K, not with K^2. Light
    statistics suffice.

    Args:
        stats: Statistics of the features.
        reduction: ``"mean"`` is over all pairs of distinct classes present, ``"max"`` is the worst pair, and ``"none"``
            gives each class the mean over its pairs, ``(K,)``, ``nan`` for an absent class.

    Returns:
        Non-negative value in the dtype of the statistics, dimensionless. It is 0 at exact collapse, and ``inf`` for a
        pair of means that coincide up to rounding of the features. It is ``nan`` if the features of such a pair do not
        spread either, with fewer than two classes present, or with features that are not finite.

    Raises:
        ValueError: If ``reduction`` is unknown.

    Example:
        >>> import torch
        >>> from nclightning.functional import class_distance_normalized_variance, class_statistics
        >>> features = torch.tensor([[1.5, 0.0], [0.5, 0.0], [-1.0, 0.5], [-1.0, -0.5]])
        >>> stats = class_statistics(features, torch.tensor([0, 0, 1, 1]), num_classes=2)
        >>> round(float(class_distance_normalized_variance(stats)), 6)  # (1/4 + 1/4) / (2 * 2^2)
        0.0625
    """
    if reduction not in ("mean", "max", "none"):
        raise UserError(f"reduction must be 'mean', 'max' or 'none', got {reduction!r}.")
    present, means = stats.present, stats.mean_offsets
    unit = power_of_two(means)
    variances = (stats.norms / unit).square() / stats.counts.clamp(min=1)
    rounding, sums, largest = stats.mean_rounding / unit, [], []
    for rows, distance in distances(means / unit):
        pair = distinct_pairs(rows, present)
        least = torch.hypot(rounding.narrow(0, rows.start, len(rows)).unsqueeze(1), rounding)
        squared = torch.where(distance <= least, 0, distance).square()
        values = (variances.narrow(0, rows.start, len(rows)).unsqueeze(1) + variances) / (2 * squared)
        sums.append(torch.where(pair, values, 0).sum(dim=1))
        largest.append(torch.where(pair, values, 0).amax(dim=1))
    num_present = present.sum()
    per_class = torch.where(present & (num_present >= 2), torch.cat(sums) / (num_present - 1), torch.nan)
    if reduction == "none":
        return per_class
    value = torch.cat(largest).amax() if reduction == "max" else per_class.nansum() / num_present
    # nansum skips nan, but the result must be nan if one class is.
    return torch.where(torch.where(present, per_class.isnan(), num_present < 2).any(), torch.nan, value)


def variability_collapse_index(stats: ClassStatistics) -> Tensor:
    r"""Measure the share of the total covariance that the class means do not explain (VCI).

    .. math:: \mathrm{VCI} = 1 - \frac{\operatorname{tr}(\Sigma_T^\dagger \Sigma_B)}{\min(d, K-1)},\qquad
        \Sigma_T = \Sigma_W + \Sigma_B

    Xu and Liu (2023). Here :math:`\Sigma_B` has uniform weights. Its rank r, :func:`between_class_rank`, replaces
    ``min(d, K - 1)``; the two agree for features of full rank.

    The index is computed as :math:`\operatorname{tr}\,E(E+\Lambda)^{-1}/r` on the span of the means, where
    :math:`\Sigma_B = \Lambda`. E is the part of :math:`\Sigma_W` on this span that remains after regression on the
    directions outside of it. Everything is a sum of squares of a square root of the scatter: subtracting from 1, or
    from the scatter, would lose small values. With fewer than ``K + d`` samples the regression leaves nothing, and the
    index is 0.

    Args:
        stats: Statistics of the features, with scatter.

    Returns:
        Scalar in [0, 1] in the dtype of the statistics, dimensionless. It is 0 at exact collapse, and 1 where the class
        means coincide but features spread. It is ``nan`` where nothing spreads at all, with fewer than two classes
        present, or with features that are not finite.

    Raises:
        ValueError: If the statistics have no scatter.

    Example:
        >>> import torch
        >>> from nclightning.functional import class_statistics, variability_collapse_index
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> stats = class_statistics(torch.tensor([[4.0], [2.0], [-2.0], [-4.0]]), labels, num_classes=2)
        >>> round(float(variability_collapse_index(stats)), 6)  # S_W = 1, S_B = 9
        0.1
    """
    stats = stats.folded  # The scatter is needed below. Without folding, the stored samples would be processed twice.
    root, num_present = stats.root, stats.present.sum()
    singular, _, significant, _ = _significant_directions(stats, "class", "uniform")
    _, span = singular_vectors(stats.between_root(), full=True)
    inside = torch.nn.functional.pad(significant, (0, len(span) - len(significant)))
    finite = root.isfinite().all() & singular.isfinite().all()
    rotated = torch.where(finite, root, 0) @ span.T / stats.counts.sum().clamp(min=1).sqrt()
    unit = power_of_two(rotated)
    outside = torch.where(inside, 0, rotated / unit)
    left, sizes, right = torch.linalg.svd(outside, full_matrices=False)
    # Leave out directions outside the span along which the spread is only rounding, of the features or of the computed
    # directions.
    rounding = spread_of_rounding(stats, rounding_along(stats, right @ span) / unit, sizes.amax())
    tilt = 8 * torch.finfo(sizes.dtype).eps * len(sizes) * torch.linalg.matrix_norm(rotated / unit)
    left = left * (sizes > torch.maximum(rounding, tilt))
    rest = torch.where(inside, rotated / unit, 0)
    for _ in range(2):  # The second projection removes the rounding error of the first.
        rest = rest - left @ (left.T @ rest)
    # Divided by the spread of the means, E has eigenvalues x^2, and E (E + Lambda)^-1 has eigenvalues x^2 / (1 + x^2).
    scale = torch.where(significant, singular / unit, 1)
    whitened = rest / torch.nn.functional.pad(scale, (0, len(span) - len(scale)), value=1.0)
    ratios = torch.linalg.svdvals(whitened)
    share = (1 / (1 + ratios.square().reciprocal())).sum() / significant.sum()
    coincide = stats.norms.sum() / stats.norms.sum()  # 1, or nan where nothing spreads at all.
    share = torch.where(significant.any(), share, coincide)
    return torch.where((num_present >= 2) & finite, share.clamp(0, 1), torch.nan)
