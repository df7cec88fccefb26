"""NC3: how far head and class means are from being proportional, by the published definitions."""

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

    with :math:`\bar H` the centred class means. The columns of W and :math:`\bar H` here are rows in the code. Classes
    without samples are left out. Paper: Appendix, with erratum E1; Zhu et al. (2021). It is zero exactly if
    :math:`W^\top \bar H` is proportional to the Gram matrix of an ETF, as for self-dual ETFs.
    :func:`duality_difference` is zero for every self-dual pair, ETF or not.

    Args:
        stats: Statistics of the features.
        weight: Head ``(K, d)``.
        centred: Subtract the mean row of the head first (Zhou et al., 2022).

    Returns:
        Scalar in [0, 2] in the dtype of the statistics, dimensionless. 0 at collapse; ``nan`` for a zero head,
        coinciding class means, or a head that is orthogonal to all class means up to rounding.

    Raises:
        ValueError: If ``weight`` does not fit the statistics.

    Example:
        >>> import torch
        >>> from nclightning.functional import class_statistics, self_duality
        >>> etf = torch.eye(3, dtype=torch.float64) - 1 / 3
        >>> stats = class_statistics(2 * etf, torch.arange(3), num_classes=3)
        >>> bool(self_duality(stats, weight=etf) < 1e-12)
        True
        >>> round(float(self_duality(stats, weight=-etf)), 6)  # the opposite of duality
        2.0
    """
    weight, present = _checked_weight(stats, weight), stats.present.unsqueeze(1)
    if centred:
        weight = weight - (weight * present).sum(dim=0) / stats.present.sum()
    return deviation_from_etf(weight * present, stats.mean_offsets, stats.present)


def duality_difference(stats: ClassStatistics, weight: Tensor, squared: bool = True) -> Tensor:
    r"""Measure the difference between head and centred class means, each divided by its norm (NC3).

    .. math:: \left\| \frac{W}{\|W\|_F} - \frac{\bar H}{\|\bar H\|_F} \right\|_F^2

    Papyan, Han and Donoho (2020), Fig. 5. Classes without samples are left out.

    Args:
        stats: Statistics of the features.
        weight: Head ``(K, d)``.
        squared: False returns the norm itself, as some later implementations do.

    Returns:
        Scalar in [0, 4], or in [0, 2] if not squared, in the dtype of the statistics, dimensionless. 0 for every
        self-dual pair; ``nan`` for a zero head or coinciding class means.

    Raises:
        ValueError: If ``weight`` does not fit the statistics.

    Example:
        >>> import torch
        >>> from nclightning.functional import class_statistics, duality_difference
        >>> means = torch.tensor([[3.0, 0.0], [-3.0, 0.0]])
        >>> stats = class_statistics(means, torch.arange(2), num_classes=2)
        >>> duality_difference(stats, weight=2 * means).round(decimals=6)
        tensor(0., dtype=torch.float64)
        >>> duality_difference(stats, weight=torch.tensor([[0.0, 1.0], [0.0, -1.0]])).round(decimals=6)
        tensor(2., dtype=torch.float64)
    """
    weight, means = _checked_weight(stats, weight) * stats.present.unsqueeze(1), stats.mean_offsets
    weight, means = weight / power_of_two(weight), means / power_of_two(means)
    difference = weight / torch.linalg.matrix_norm(weight) - means / torch.linalg.matrix_norm(means)
    value: Tensor = difference.square().sum()
    return value if squared else value.sqrt()


def class_alignment(stats: ClassStatistics, weight: Tensor) -> Tensor:
    r"""Measure the cosine between each centred class mean and its row of the head (NC3 of each class).

    .. math:: \cos\angle(w_k, \mu_k - \mu_G)

    Args:
        stats: Statistics of the features.
        weight: Head ``(K, d)``.

    Returns:
        Cosines ``(K,)`` in [-1, 1], in the dtype of the statistics. 1 for a self-dual class; ``nan`` for an absent
        class, a zero row of the head, or a class mean that equals the global mean.

    Raises:
        ValueError: If ``weight`` does not fit the statistics.

    Example:
        >>> import torch
        >>> from nclightning.functional import class_alignment, class_statistics
        >>> stats = class_statistics(torch.tensor([[3.0, 0.0], [-3.0, 0.0]]), torch.arange(2), num_classes=2)
        >>> class_alignment(stats, weight=torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        tensor([1., 0.], dtype=torch.float64)
    """
    cosine = (unit_rows(_checked_weight(stats, weight)) * unit_rows(stats.centred_means)).sum(dim=1)
    return torch.where(stats.present, cosine, torch.nan)


def uniform_duality(stats: ClassStatistics, weight: Tensor, normalize: bool = True, ddof: int = 1) -> Tensor:
    r"""Measure how unevenly classes are aligned with the head (UNC3).

    .. math:: \operatorname{var}_k \langle \hat w_k, \hat\mu_k \rangle

    Wu and Papyan (2024). It is zero if all classes have the same cosine, as at collapse, where each cosine is 1.

    Args:
        stats: Statistics of the features.
        weight: Head ``(K, d)``.
        normalize: True takes the variance of cosines, False that of the inner products of rows and centred class means.
        ddof: The variance divides by ``K - ddof``.

    Returns:
        Non-negative scalar in the dtype of the statistics; dimensionless with ``normalize``. ``nan`` if the cosine of a
        class with samples is undefined, or with fewer than two classes present.

    Raises:
        ValueError: If ``weight`` does not fit the statistics.

    Example:
        >>> import torch
        >>> from nclightning.functional import class_statistics, uniform_duality
        >>> stats = class_statistics(torch.tensor([[3.0, 0.0], [-3.0, 0.0]]), torch.arange(2), num_classes=2)
        >>> uniform_duality(stats, weight=torch.tensor([[1.0, 0.0], [0.0, 2.0]]))  # the variance of cosines 1 and 0
        tensor(0.5000, dtype=torch.float64)
    """
    rows = _checked_weight(stats, weight)
    if normalize:
        # This is 1 minus the cosine, which has the same variance. Near duality the cosines differ by less than their
        # rounding errors.
        products = (unit_rows(rows) - unit_rows(stats.centred_means)).square().sum(dim=1) / 2
    else:
        products = (rows * stats.mean_offsets).sum(dim=1)
    count = stats.present.sum()
    mean = torch.where(stats.present, products, 0).sum() / count
    value = torch.where(stats.present, (products - mean).square(), 0).sum() / (count - ddof)
    return torch.where(count > 0, value, torch.nan)


def _checked_weight(stats: ClassStatistics, weight: Tensor) -> Tensor:
    """Check the shape of the head and convert it to the dtype of the statistics."""
    if weight.shape != stats.means.shape:
        raise UserError(
            f"weight must have shape {tuple(stats.means.shape)} like the class means, got {tuple(weight.shape)}."
        )
    return weight.detach().to(stats.means)
