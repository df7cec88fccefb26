"""Distance to the neural-collapse configurations whose scales are fitted."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nclightning.errors import UserError
from nclightning.functional.linear import power_of_two
from nclightning.functional.statistics import ClassStatistics

__all__ = ["CollapseDistance", "distance_to_collapse"]


class CollapseDistance(NamedTuple):
    """Distance to the nearest collapsed configuration and the scales of that configuration.

    Attributes:
        distance: Relative distance in [0, 1].
        head: Relative distance of the head alone.
        features: Relative distance of the features alone.
        head_scale: Singular value of the nearest head.
        feature_scale: Singular value of the matrix of its class means.
    """

    distance: Tensor
    head: Tensor
    features: Tensor
    head_scale: Tensor
    feature_scale: Tensor


def distance_to_collapse(stats: ClassStatistics, weight: Tensor) -> CollapseDistance:
    r"""Measure the distance of head and features to neural collapse where no penalties set its scale.

    .. math:: \left( \frac12 \frac{\|W - aM\|_F^2}{\|W\|_F^2}
        + \frac12 \frac{\sum_i \|h_i - \mu_G - \beta M_{y_i}\|^2}{\sum_i \|h_i - \mu_G\|^2} \right)^{1/2}

    The rows of M are a simplex ETF over the classes present, a partial isometry of rank ``min(d, K - 1)`` with
    zero column sums. Fitted are M, as the polar factor of the sum of head and centred class means, each divided by
    its norm; then the scales :math:`a, \beta \ge 0` by least squares; and the shift of the features, the mean of the
    class means. With the penalties known, :class:`nclightning.theory.UFMProblem` fixes the scales and no shift is
    free. From residuals, so that nothing cancels near collapse.

    Args:
        stats: Statistics of the features; the light form suffices.
        weight: Head ``(K, d)``.

    Returns:
        Scalars in the dtype of the statistics. Distances are 0 at collapse of any size, orientation and shift, where
        head and means are dual ETFs and nothing spreads; ``nan`` for a zero head, coinciding class means or features
        that are not finite.

    Raises:
        ValueError: If ``weight`` does not fit the statistics.
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
