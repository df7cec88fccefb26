"""NC3: how far the head is from the dual of the class means, in its published forms."""

from __future__ import annotations

import torch
from torch import Tensor

from nclightning.errors import UserError
from nclightning.functional.geometry import deviation_from_etf
from nclightning.functional.linear import power_of_two, unit_rows
from nclightning.functional.statistics import ClassStatistics

__all__ = ["class_alignment", "duality_difference", "self_duality", "uniform_duality"]


def self_duality(stats: ClassStatistics, weight: Tensor, centred: bool = False) -> Tensor:
    r"""Measure how far head and class means are from self-dual ETFs (NC3, coherence form).

    .. math:: \mathrm{NC}_3 = \left\| \frac{W^\top \bar H}{\|W^\top \bar H\|_F}
        - \frac{1}{\sqrt{K-1}} \left(I_K - \tfrac1K 1_K 1_K^\top\right) \right\|_F

    with :math:`\bar H` the centred class means. Classes without samples are left out. Paper: Appendix, with
    erratum E1; Zhu et al. (2021). It vanishes for self-dual ETFs, and also for every pair with
    :math:`W^\top \bar H \propto P`; :func:`duality_difference` vanishes for every self-dual pair, ETF or not.

    Args:
        stats: Statistics of the features.
        weight: Head ``(K, d)``.
        centred: Subtract the mean row of the head first (Zhou et al., 2022).

    Returns:
        Scalar in [0, 2] in the dtype of the statistics, dimensionless; ``nan`` for a zero head, coinciding means, or
        a head orthogonal to all means up to rounding.

    Raises:
        ValueError: If ``weight`` does not fit the statistics.
    """
    weight, present = _fit(stats, weight), stats.present.unsqueeze(1)
    if centred:
        weight = weight - (weight * present).sum(dim=0) / stats.present.sum()
    return deviation_from_etf(weight * present, stats.mean_offsets, stats.present)


def duality_difference(stats: ClassStatistics, weight: Tensor, squared: bool = True) -> Tensor:
    r"""Measure the difference of head and centred class means, each divided by its norm (NC3, difference form).

    .. math:: \left\| \frac{W}{\|W\|_F} - \frac{\bar H}{\|\bar H\|_F} \right\|_F^2

    Papyan, Han and Donoho (2020), Fig. 5. Classes without samples are left out.

    Args:
        stats: Statistics of the features.
        weight: Head ``(K, d)``.
        squared: False takes the norm itself, as some later codes do.

    Returns:
        Scalar in [0, 4], or [0, 2] if not squared, in the dtype of the statistics; 0 for every self-dual pair,
        ``nan`` for a zero head or coinciding means.

    Raises:
        ValueError: If ``weight`` does not fit the statistics.
    """
    weight, means = _fit(stats, weight) * stats.present.unsqueeze(1), stats.mean_offsets
    weight, means = weight / power_of_two(weight), means / power_of_two(means)
    difference = weight / torch.linalg.matrix_norm(weight) - means / torch.linalg.matrix_norm(means)
    value: Tensor = difference.square().sum()
    return value if squared else value.sqrt()


def class_alignment(stats: ClassStatistics, weight: Tensor) -> Tensor:
    r"""Measure the cosine of each class mean, centred, with its row of the head (NC3, class by class).

    .. math:: \cos\angle(w_k, \mu_k - \mu_G)

    Args:
        stats: Statistics of the features.
        weight: Head ``(K, d)``.

    Returns:
        ``(K,)`` in [-1, 1], in the dtype of the statistics; 1 for a self-dual class, ``nan`` for an absent class, a
        zero row of the head, or a mean in the centre.

    Raises:
        ValueError: If ``weight`` does not fit the statistics.
    """
    cosine = (unit_rows(_fit(stats, weight)) * unit_rows(stats.centred_means)).sum(dim=1)
    return torch.where(stats.present, cosine, torch.nan)


def uniform_duality(stats: ClassStatistics, weight: Tensor, normalize: bool = True, ddof: int = 1) -> Tensor:
    r"""Measure how unevenly classes are aligned with the head (UNC3).

    .. math:: \operatorname{var}_k \langle \hat w_k, \hat\mu_k \rangle

    Wu and Papyan (2024). Zero when all classes are equally far from duality, fully dual ones included.

    Args:
        stats: Statistics of the features.
        weight: Head ``(K, d)``.
        normalize: Vary cosines; False varies the plain inner products of rows and centred means.
        ddof: The variance divides by ``K - ddof``.

    Returns:
        Non-negative scalar in the dtype of the statistics; ``nan`` where a class present has no cosine, or with
        fewer than two.

    Raises:
        ValueError: If ``weight`` does not fit the statistics.
    """
    rows = _fit(stats, weight)
    if normalize:
        # 1 - cos: near duality the cosines themselves differ by less than their rounding.
        products = (unit_rows(rows) - unit_rows(stats.centred_means)).square().sum(dim=1) / 2
    else:
        products = (rows * stats.mean_offsets).sum(dim=1)
    count = stats.present.sum()
    mean = torch.where(stats.present, products, 0).sum() / count
    value = torch.where(stats.present, (products - mean).square(), 0).sum() / (count - ddof)
    return torch.where(count > 0, value, torch.nan)


def _fit(stats: ClassStatistics, weight: Tensor) -> Tensor:
    """Head in the dtype of the statistics."""
    if weight.shape != stats.means.shape:
        raise UserError(
            f"weight must have shape {tuple(stats.means.shape)} like the class means, got {tuple(weight.shape)}."
        )
    return weight.detach().to(stats.means)
