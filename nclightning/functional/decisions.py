"""NC4: what the network decides, against the nearest class centre."""

from __future__ import annotations

import torch
from torch import Tensor

from nclightning.errors import UserError
from nclightning.functional.linear import norm, power_of_two, product, unit_rows
from nclightning.functional.statistics import ClassStatistics, GlobalMean

__all__ = ["accuracy", "bias_collapse", "cosine_margin", "ncc_accuracy", "ncc_mismatch", "nearest_class_centre"]


def nearest_class_centre(features: Tensor, stats: ClassStatistics) -> Tensor:
    r"""Classify by the nearest class mean (NCC).

    .. math:: \arg\min_k \|h - \mu_k\|_2

    Args:
        features: ``(N, d)`` of any floating dtype.
        stats: Statistics whose means are the centres; usually those of the training set, whatever the features.

    Returns:
        Classes ``(N,)`` int64, only classes present; of equally near ones the first. -1 where there is no nearest one:
        for features or centres that are not finite, and without samples of any class.

    Raises:
        ValueError: If the features do not fit the statistics.
    """
    if features.ndim != 2 or features.shape[1] != stats.means.shape[1]:
        raise UserError(f"features must have shape (N, {stats.means.shape[1]}), got {tuple(features.shape)}.")
    # Around the global mean, so that a common offset of all features does not cost digits.
    centre, means = stats.global_mean(), stats.mean_offsets
    unit, centred = power_of_two(means), features.detach().to(means) - centre
    means = means / unit
    score = centred @ means.T - means.square().sum(dim=1) * (unit / 2)
    return decide(torch.where(stats.present, score, -torch.inf))


def decide(scores: Tensor) -> Tensor:
    """Take the class of the highest score.

    Args:
        scores: ``(N, K)``, for example logits.

    Returns:
        Classes ``(N,)`` int64; of equally high ones the first. -1 where the highest is not finite: ``argmax`` alone
        takes ``nan`` for the highest of all.
    """
    highest = scores.max(dim=1)
    return torch.where(highest.values.isfinite(), highest.indices, -1)


def ncc_accuracy(features: Tensor, labels: Tensor, stats: ClassStatistics) -> Tensor:
    """Measure how often the nearest class centre is the label (NC4, as Galanti et al. and Jiang et al. read it).

    Args:
        features: ``(N, d)``.
        labels: ``(N,)`` int64.
        stats: As for :func:`nearest_class_centre`.

    Returns:
        Scalar in [0, 1] in the dtype of the statistics; ``nan`` without samples. Features without a nearest centre
        count as wrong.
    """
    return accuracy(nearest_class_centre(features, stats), labels).to(stats.means)


def ncc_mismatch(features: Tensor, predictions: Tensor, stats: ClassStatistics) -> Tensor:
    """Measure how often the nearest class centre is not the network's decision (NC4 of Papyan, Han and Donoho).

    Args:
        features: ``(N, d)``.
        predictions: The network's classes ``(N,)``: the argmax of its logits, bias included.
        stats: As for :func:`nearest_class_centre`.

    Returns:
        Scalar in [0, 1] in the dtype of the statistics; 0 at collapse, ``nan`` without samples. Features without a
        nearest centre count as mismatched.
    """
    nearest = nearest_class_centre(features, stats)
    return ((nearest != predictions) | (nearest < 0)).to(stats.means.dtype).mean()


def accuracy(predictions: Tensor, labels: Tensor) -> Tensor:
    """Measure how often a decision is the label.

    Args:
        predictions: Classes ``(N,)``.
        labels: ``(N,)``.

    Returns:
        Float64 scalar in [0, 1]; ``nan`` without samples.
    """
    return (predictions == labels).double().mean()


def bias_collapse(
    stats: ClassStatistics, weight: Tensor, bias: Tensor | None = None, global_mean: GlobalMean = "sample"
) -> Tensor:
    r"""Measure the logits of the mean feature (NC4 of Zhu et al., 2021).

    .. math:: \| W \mu_G + b \|_2

    Args:
        stats: Statistics of the features; the light form suffices.
        weight: Head ``(K, d)``.
        bias: Its bias ``(K,)``; None is zero.
        global_mean: Of all ``"sample"`` (Zhu et al.; the default) or of ``"class"`` means.

    Returns:
        Non-negative scalar in the dtype of the statistics and the unit of the logits; ``nan`` without samples, ``inf``
        where the dtype cannot hold it.

    Raises:
        ValueError: If the head does not fit the statistics.
    """
    if weight.shape != stats.means.shape or (bias is not None and bias.shape != stats.counts.shape):
        raise UserError(
            f"weight must have shape {tuple(stats.means.shape)} and bias its first, "
            f"got {tuple(weight.shape)} and {None if bias is None else tuple(bias.shape)}."
        )
    mean = stats.global_mean(global_mean).unsqueeze(0)
    logits, own, other = product(mean, weight.detach().to(mean))
    logits = own * logits
    if bias is not None:
        logits = logits + other * bias.detach().to(logits)
    return torch.where(stats.present.any(), norm(logits.flatten(), dim=0) / other, torch.nan)


def cosine_margin(features: Tensor, labels: Tensor, weight: Tensor, centre: Tensor | None = None) -> Tensor:
    r"""Measure by how much a feature is closer in angle to its own row of the head than to any other.

    .. math:: \cos\angle(h_i - c, w_{y_i}) - \max_{k \ne y_i} \cos\angle(h_i - c, w_k)

    Zhou et al. (2022), who take the global mean for c.

    Args:
        features: ``(N, d)``.
        labels: ``(N,)`` int64 within ``0..K-1``.
        weight: Head ``(K, d)``.
        centre: ``(d,)``, usually ``stats.global_mean()``; None is zero.

    Returns:
        ``(N,)`` float64 in [-2, 2]; K/(K-1) at collapse, positive where angles decide rightly, ``nan`` for a feature
        in the centre or a zero row.
    """
    rows = features.detach().double()
    if centre is not None:
        rows = rows - centre.to(rows)
    cosine = unit_rows(rows) @ unit_rows(weight.detach().to(rows)).T
    own = labels.unsqueeze(1)
    others = cosine.scatter(1, own, -torch.inf)
    return cosine.gather(1, own).squeeze(1) - others.amax(dim=1)
