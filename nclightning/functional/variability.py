"""NC1: how far features are from their class means, relative to the spread of the means, in its published forms."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from nclightning.errors import UserError
from nclightning.functional.linear import apart, distances, norm, power_of_two, singular_vectors
from nclightning.functional.rounding import FINE, averaged, least_spread, noise_of, rounding_along
from nclightning.functional.statistics import BetweenWeights, ClassStatistics, GlobalMean

__all__ = [
    "between_class_rank",
    "class_distance_normalized_variance",
    "variability_collapse_index",
    "within_between_ratio",
    "within_class_variability",
]

# Root mean square of a rounding, relative to the largest one; generous.
_STANDARD_ROUNDING = 0.3
# Up to so many roundings of the largest spread of the means may be left in directions in which features do not spread:
# behind a LayerNorm that subtracts a mean of 80 times the spread. The second for half precision.
_FAR = (256, 2)


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

    Read in the coordinates of the singular value decomposition of the centred means: no pseudo-inverse of a d x d
    matrix. A direction counts if the spread of the means along it exceeds what rounding of the features explains:
    features behind a LayerNorm, with dead or duplicated units or behind a
    bottleneck spread along fewer than ``min(K - 1, d)`` directions, and along the others round-off would be divided by
    round-off. :func:`between_class_rank` reads how many count. The relative error is about eps times the ratio of the
    largest to the smallest spread of the means that counts, and, with spread O orthogonal to the means and w along
    them, up to eps O^2 / w for means of size 1: 2e-7 for O = 1e4 and w = 0.1. Classes without samples are left out and
    K counts those present. Paper: Appendix; Papyan, Han and Donoho (2020), Fig. 6. Conventions differ on unbalanced
    data only, but for the last.

    Args:
        stats: Statistics of the features, with scatter.
        global_mean: Of ``"class"`` means (Papyan et al.; the default) or of ``"sample"`` (Zhu et al., 2021).
        between_weights: ``"uniform"`` 1/K (everybody; the default) or ``"count"`` n_k/N (discriminant analysis).
        divide_by_classes: False leaves out the 1/K, as the notebook of Papyan et al. does, not their caption.

    Returns:
        Non-negative scalar in the dtype of the statistics, dimensionless. 0 at exact collapse; ``inf`` where the
        class means coincide and features spread; ``nan`` where nothing spreads either, with fewer than two classes
        present, or with features that are not finite.

    Raises:
        ValueError: If the statistics have no scatter, or a convention does not exist.
    """
    num_present = stats.present.sum()
    singular, _, counts, spread = _between_directions(stats, global_mean, between_weights)
    value = torch.where(counts, (spread / singular).square(), 0).sum()
    # Without a direction that counts all spread is within classes.
    value = torch.where(counts.any(), value, stats.norms.sum() / torch.zeros_like(value))
    if divide_by_classes:
        value = value / num_present
    return torch.where((num_present >= 2) & singular.isfinite().all(), value, torch.nan)


def between_class_rank(
    stats: ClassStatistics, global_mean: GlobalMean = "class", between_weights: BetweenWeights = "uniform"
) -> Tensor:
    """Count the directions along which class means spread by more than rounding of the features.

    Those over which :func:`within_class_variability` and :func:`variability_collapse_index` sum: at most
    ``min(K - 1, d)``, and less where features are confined to fewer dimensions.

    Args:
        stats: Statistics of the features, with scatter.
        global_mean: As for :func:`within_class_variability`.
        between_weights: As for :func:`within_class_variability`.

    Returns:
        Scalar in the dtype of the statistics; ``nan`` with fewer than two classes present, or with features that are
        not finite.
    """
    singular, _, counts, _ = _between_directions(stats, global_mean, between_weights)
    defined = (stats.present.sum() >= 2) & singular.isfinite().all()
    return torch.where(defined, counts.sum().to(singular), torch.nan)


def _between_directions(
    stats: ClassStatistics, global_mean: GlobalMean, between_weights: BetweenWeights
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Find the directions of the centred means that count.

    One counts if it exceeds rounding of the features. What rounding before the last operation may leave does not count,
    either, where features spread further in other directions, unless the means spread more than means of so many
    samples do by chance, twice the standard deviation, and not far less than in other directions.

    Returns:
        Singular values, right singular vectors, which count, and root mean squares of the spread within classes.
    """
    singular, right = singular_vectors(stats.between_root(global_mean, between_weights))
    num_present, total, dim = stats.present.sum().to(singular), stats.counts.sum(), stats.means.shape[1]
    epsilon = torch.finfo(singular.dtype).eps
    spread = stats.norms_along(right) / total.sqrt()
    one = rounding_along(stats, right)
    # The largest singular value of independent roundings: each is 0.3 times what a number may be off (Marchenko and
    # Pastur, 1967).
    edge = (_STANDARD_ROUNDING * (1 + (dim / num_present).sqrt())).clamp(min=1)
    per_class = num_present / torch.where(stats.present, 1 / stats.counts, 0).sum()
    rounding = edge * averaged(one, spread, per_class)
    both, far = torch.maximum(singular, spread), torch.where(stats.epsilon <= FINE, *_FAR)
    possible = torch.arange(len(singular), device=singular.device) < num_present - 1
    close = both <= noise_of(stats, one)
    by_chance = close & (possible & close.logical_not()).any() & (singular <= 2 * spread * (num_present / total).sqrt())
    far_below = (both <= far * one) & (singular <= far * stats.epsilon * singular.amax())
    exact = epsilon * max(stats.means.shape) * singular.amax()
    counts = possible & (singular > torch.maximum(rounding, exact)) & (by_chance | far_below).logical_not()
    return singular, right, counts, spread


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
        Non-negative scalar; 0 at exact collapse, ``inf`` where the means coincide up to rounding of the features,
        ``nan`` where nothing spreads either, with fewer than two classes present, or with features that are not finite.
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
        Non-negative; 0 at exact collapse, ``inf`` for a pair of means that coincide up to rounding of the features,
        ``nan`` if its features do not spread either, with fewer than two classes present, or with features that are not
        finite.

    Raises:
        ValueError: If there is no such reduction.
    """
    if reduction not in ("mean", "max", "none"):
        raise UserError(f"reduction must be 'mean', 'max' or 'none', got {reduction!r}.")
    present, means = stats.present, stats.mean_offsets
    unit = power_of_two(means)
    variances = (stats.norms / unit).square() / stats.counts.clamp(min=1)
    rounding, sums, largest = stats.mean_rounding / unit, [], []
    for rows, distance in distances(means / unit):
        pair = apart(rows, present)
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
    # nansum must not hide a pair that is not a number.
    return torch.where(torch.where(present, per_class.isnan(), num_present < 2).any(), torch.nan, value)


def variability_collapse_index(stats: ClassStatistics) -> Tensor:
    r"""Measure the share of the total covariance that the class means do not explain (VCI).

    .. math:: \mathrm{VCI} = 1 - \frac{\operatorname{tr}(\Sigma_T^\dagger \Sigma_B)}{\min(d, K-1)},\qquad
        \Sigma_T = \Sigma_W + \Sigma_B

    Xu and Liu (2023), with :math:`\Sigma_B` of uniform weights and its rank :func:`between_class_rank` for
    ``min(d, K - 1)``, which is the same for features of full rank. On the span of the means, where
    :math:`\Sigma_B = \Lambda`, it is :math:`\operatorname{tr}\,E(E+\Lambda)^{-1}/r` with E the part of
    :math:`\Sigma_W` on that span that the directions outside of it do not explain by regression. Everything is
    a sum of squares of a square root of the scatter, so that nothing is subtracted, neither from 1 nor from the
    scatter. With fewer than d samples more than classes the regression explains everything and the index is 0.

    Args:
        stats: Statistics of the features, with scatter.

    Returns:
        Scalar in [0, 1]; 0 at exact collapse, 1 where the class means coincide, ``nan`` where nothing spreads
        either, with fewer than two classes present, or with features that are not finite.

    Raises:
        ValueError: If the statistics have no scatter.
    """
    stats = stats.folded  # The scatter is needed as a whole, and tells the spread along the means, too.
    root, num_present = stats.root, stats.present.sum()
    singular, _, counts, _ = _between_directions(stats, "class", "uniform")
    _, span = singular_vectors(stats.between_root(), full=True)
    inside = torch.nn.functional.pad(counts, (0, len(span) - len(counts)))
    finite = root.isfinite().all() & singular.isfinite().all()
    rotated = torch.where(finite, root, 0) @ span.T / stats.counts.sum().clamp(min=1).sqrt()
    unit = power_of_two(rotated)
    explaining = torch.where(inside, 0, rotated / unit)
    left, sizes, right = torch.linalg.svd(explaining, full_matrices=False)
    # Directions in which only rounding spreads explain nothing, that of the directions themselves included.
    rounding = least_spread(stats, rounding_along(stats, right @ span) / unit, sizes.amax())
    tilt = 8 * torch.finfo(sizes.dtype).eps * len(sizes) * torch.linalg.matrix_norm(rotated / unit)
    left = left * (sizes > torch.maximum(rounding, tilt))
    rest = torch.where(inside, rotated / unit, 0)
    for _ in range(2):  # What the first projection leaves by rounding goes in the second.
        rest = rest - left @ (left.T @ rest)
    # Whitened by the means: the eigenvalues of E / (E + Lambda) are those of x^2 / (1 + x^2).
    scale = torch.where(counts, singular / unit, 1)
    whitened = rest / torch.nn.functional.pad(scale, (0, len(span) - len(scale)), value=1.0)
    ratios = torch.linalg.svdvals(whitened)
    share = (1 / (1 + ratios.square().reciprocal())).sum() / counts.sum()
    coincide = stats.norms.sum() / stats.norms.sum()  # 1, or nan where nothing spreads either.
    share = torch.where(counts.any(), share, coincide)
    return torch.where((num_present >= 2) & finite, share.clamp(0, 1), torch.nan)
