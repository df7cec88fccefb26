"""Distance of head and features from the nearest collapsed configuration of any scale."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nclightning.errors import UserError
from nclightning.functional.linear import power_of_two
from nclightning.functional.statistics import ClassStatistics

__all__ = ["CollapseDistance", "distance_to_collapse"]


class CollapseDistance(NamedTuple):
    """Distance from the nearest collapsed configuration, and the scales of that configuration.

    Attributes:
        distance: Relative distance in [0, 1].
        head: Relative distance of the head alone.
        features: Relative distance of the features alone.
        head_scale: Singular value of the collapsed head.
        feature_scale: Singular value of the matrix of the collapsed class means.
    """

    distance: Tensor
    head: Tensor
    features: Tensor
    head_scale: Tensor
    feature_scale: Tensor


def distance_to_collapse(stats: ClassStatistics, weight: Tensor) -> CollapseDistance:
    r"""Measure the relative distance of head and features from neural collapse of any scale.

    .. math:: \left( \frac12 \frac{\|W - aM\|_F^2}{\|W\|_F^2}
        + \frac12 \frac{\sum_i \|h_i - \mu_G - \beta M_{y_i}\|^2}{\sum_i \|h_i - \mu_G\|^2} \right)^{1/2}

    M, a and :math:`\beta` are fitted. The rows of M are a simplex ETF over the classes present, that is, M is a partial
    isometry of rank ``min(d, K - 1)`` with zero column sums. It is the polar factor of the sum of the head and the
    centred class means, each divided by its norm. The scales :math:`a, \beta \ge 0` follow by least squares.
    :math:`\mu_G` is the mean of the class means.

    If the penalties are known, :meth:`nclightning.theory.UFMProblem.distance` gives the distance from the optimal set,
    where the scales are fixed and no shift is free. Both are computed from residuals, so that nothing cancels near
    collapse.

    Args:
        stats: Statistics of the features. Light statistics suffice.
        weight: Head ``(K, d)``.

    Returns:
        Scalars in the dtype of the statistics. The distances are 0 at collapse of any size, orientation and shift. They
        are ``nan`` for a zero head, coinciding class means, or features that are not finite.

    Raises:
        ValueError: If ``weight`` does not fit the statistics.

    Example:
        >>> import torch
        >>> from nclightning.functional import class_statistics, distance_to_collapse
        >>> etf = torch.eye(3, dtype=torch.float64) - 1 / 3
        >>> stats = class_statistics(2 * etf, torch.arange(3), num_classes=3)
        >>> found = distance_to_collapse(stats, weight=5 * etf)
        >>> bool(found.distance < 1e-12), round(float(found.head_scale), 6), round(float(found.feature_scale), 6)
        (True, 5.0, 2.0)
        >>> round(float(distance_to_collapse(stats, weight=torch.eye(3)).head), 6)  # 1/3 of the squared norm is left
        0.57735
    """
    if weight.shape != stats.means.shape:
        raise UserError(
            f"weight must have shape {tuple(stats.means.shape)} like the class means, got {tuple(weight.shape)}."
        )
    present, means = stats.present.unsqueeze(1), stats.mean_offsets
    head = weight.detach().to(means) * present
    unit, other = power_of_two(means), power_of_two(head)
    means, head = means / unit, head / other
    direction = head / torch.linalg.matrix_norm(head) + means / torch.linalg.matrix_norm(means)
    direction = (direction - direction.sum(dim=0) / present.sum()) * present
    finite = direction.isfinite().all()
    left, singular, right = torch.linalg.svd(torch.where(finite, direction, 0), full_matrices=False)
    rank = (present.sum() - 1).clamp(max=len(singular))
    frame = (left * (torch.arange(len(singular), device=left.device) < rank)) @ right

    head_scale = ((head * frame).sum() / rank).clamp(min=0)
    counts = stats.counts.unsqueeze(1)
    feature_scale = ((counts * means * frame).sum() / (counts * frame.square()).sum()).clamp(min=0)
    head_part = (head - head_scale * frame).square().sum() / head.square().sum()
    spread = (stats.norms / unit).square().sum()
    feature_part = (spread + (counts * (means - feature_scale * frame).square()).sum()) / (
        spread + (counts * means.square()).sum()
    )
    distances = ((head_part + feature_part) / 2).sqrt(), head_part.sqrt(), feature_part.sqrt()
    values = *distances, head_scale * other, feature_scale * unit
    return CollapseDistance(*(torch.where(finite, value, torch.nan) for value in values))
