"""NC4: the decisions of the network and of the nearest class centre classifier (NCC)."""

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
        stats: Statistics with the class means, usually those of the training set, also for features of other data.

    Returns:
        Classes ``(N,)`` int64, among the classes present. If several means are equally near, the first one wins. -1
        means no decision: features or class means are not finite, or no class has samples.

    Raises:
        ValueError: If the features do not fit the statistics.

    Example:
        >>> import torch
        >>> from nclightning.functional import class_statistics, nearest_class_centre
        >>> stats = class_statistics(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]), num_classes=2)
        >>> nearest_class_centre(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), stats)
        tensor([0, 1])
    """
    if features.ndim != 2 or features.shape[1] != stats.means.shape[1]:
        raise UserError(f"features must have shape (N, {stats.means.shape[1]}), got {tuple(features.shape)}.")
    # Without subtracting the global mean, a large common offset of all features would cost digits of the score.
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
        Classes ``(N,)`` int64. If several scores are equal, the first one wins. -1 where the highest score is not
        finite: ``argmax`` alone would return the position of a ``nan``.
    """
    highest = scores.max(dim=1)
    return torch.where(highest.values.isfinite(), highest.indices, -1)


def ncc_accuracy(features: Tensor, labels: Tensor, stats: ClassStatistics) -> Tensor:
    """Measure the accuracy of the nearest class centre classifier (NC4 of Galanti et al. and Jiang et al.).

    Args:
        features: ``(N, d)``.
        labels: ``(N,)`` int64.
        stats: As for :func:`nearest_class_centre`.

    Returns:
        Scalar in [0, 1] in the dtype of the statistics: the share of samples whose nearest class mean is that of their
        label. 1 at collapse, ``nan`` without samples. A sample without a decision counts as wrong.

    Raises:
        ValueError: If the features do not fit the statistics.

    Example:
        >>> import torch
        >>> from nclightning.functional import class_statistics, ncc_accuracy
        >>> stats = class_statistics(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]), num_classes=2)
        >>> ncc_accuracy(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]), stats)
        tensor(0.5000, dtype=torch.float64)
    """
    return accuracy(nearest_class_centre(features, stats), labels).to(stats.means)


def ncc_mismatch(features: Tensor, predictions: Tensor, stats: ClassStatistics) -> Tensor:
    """Measure how often the nearest class centre classifier and the network disagree (NC4).

    Papyan, Han and Donoho (2020), Fig. 7.

    Args:
        features: ``(N, d)``.
        predictions: Decisions of the network ``(N,)``: the argmax of its logits, bias included.
        stats: As for :func:`nearest_class_centre`.

    Returns:
        Scalar in [0, 1] in the dtype of the statistics: the share of samples. 0 at collapse, ``nan`` without samples. A
        sample without a decision counts as a disagreement.

    Raises:
        ValueError: If the features do not fit the statistics.

    Example:
        >>> import torch
        >>> from nclightning.functional import class_statistics, ncc_mismatch
        >>> stats = class_statistics(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]), num_classes=2)
        >>> ncc_mismatch(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]), stats)
        tensor(0.5000, dtype=torch.float64)
    """
    nearest = nearest_class_centre(features, stats)
    return ((nearest != predictions) | (nearest < 0)).to(stats.means.dtype).mean()


def accuracy(predictions: Tensor, labels: Tensor) -> Tensor:
    """Measure the share of predictions that equal the label.

    Args:
        predictions: Classes ``(N,)``.
        labels: ``(N,)``.

    Returns:
        Float64 scalar in [0, 1]; ``nan`` without samples.

    Example:
        >>> import torch
        >>> from nclightning.functional import accuracy
        >>> accuracy(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 2, 2]))
        tensor(0.7500, dtype=torch.float64)
    """
    return (predictions == labels).double().mean()


def bias_collapse(
    stats: ClassStatistics, weight: Tensor, bias: Tensor | None = None, global_mean: GlobalMean = "sample"
) -> Tensor:
    r"""Measure the norm of the logits of the mean feature (NC4 of Zhu et al., 2021).

    .. math:: \| W \mu_G + b \|_2

    Args:
        stats: Statistics of the features. Light statistics suffice.
        weight: Head ``(K, d)``.
        bias: Bias of the head ``(K,)``; None for a head without one.
        global_mean: ``"sample"`` is the mean of all features (Zhu et al.; the default), ``"class"`` that of the class
            means.

    Returns:
        Non-negative scalar in the dtype of the statistics and the unit of the logits. 0 at collapse; ``nan`` without
        samples, ``inf`` if it overflows.

    Raises:
        ValueError: If the head does not fit the statistics.

    Example:
        >>> import torch
        >>> from nclightning.functional import bias_collapse, class_statistics
        >>> stats = class_statistics(torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([0, 1]), num_classes=2)
        >>> bias_collapse(stats, weight=torch.tensor([[2.0, 0.0], [-2.0, 0.0]]), bias=torch.tensor([-4.0, 1.0]))
        tensor(3., dtype=torch.float64)
    """
    if weight.shape != stats.means.shape or (bias is not None and bias.shape != stats.counts.shape):
        raise UserError(
            f"weight must have shape {tuple(stats.means.shape)} and bias ({len(stats.counts)},), "
            f"got {tuple(weight.shape)} and {None if bias is None else tuple(bias.shape)}."
        )
    mean = stats.global_mean(global_mean).unsqueeze(0)
    # Against overflow, the logits are computed as (factor * logits + divisor * bias) / divisor.
    logits, factor, divisor = product(mean, weight.detach().to(mean))
    logits = factor * logits
    if bias is not None:
        logits = logits + divisor * bias.detach().to(logits)
    return torch.where(stats.present.any(), norm(logits.flatten(), dim=0) / divisor, torch.nan)


def cosine_margin(features: Tensor, labels: Tensor, weight: Tensor, centre: Tensor | None = None) -> Tensor:
    r"""Measure how much larger the cosine with the row of the own class is than with any other row of the head.

    .. math:: \cos\angle(h_i - c, w_{y_i}) - \max_{k \ne y_i} \cos\angle(h_i - c, w_k)

    Zhou et al. (2022); their c is the global mean.

    Args:
        features: ``(N, d)``.
        labels: ``(N,)`` int64 within ``0..K-1``.
        weight: Head ``(K, d)``.
        centre: c, ``(d,)``, usually ``stats.global_mean()``; None is zero.

    Returns:
        Margins ``(N,)``, float64, in [-2, 2]. K/(K-1) at collapse; positive where the cosine with the right row is
        the largest; ``nan`` for a feature equal to c, and if a row of the head is zero.

    Example:
        >>> import torch
        >>> from nclightning.functional import cosine_margin
        >>> weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> cosine_margin(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0]), weight)
        tensor([2., 0.], dtype=torch.float64)
    """
    rows = features.detach().double()
    if centre is not None:
        rows = rows - centre.to(rows)
    cosine = unit_rows(rows) @ unit_rows(weight.detach().to(rows)).T
    own = labels.unsqueeze(1)
    others = cosine.scatter(1, own, -torch.inf)
    return cosine.gather(1, own).squeeze(1) - others.amax(dim=1)
