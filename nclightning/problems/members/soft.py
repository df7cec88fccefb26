"""Cross-entropy with distributions as targets: label smoothing, mixup, and any soft labels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from nclightning.errors import UserError
from nclightning.problems.cross_entropy import CrossEntropy
from nclightning.problems.frames import one_hot
from nclightning.problems.members.counting import balanced, counts_of
from nclightning.problems.problem import Problem

__all__ = ["label_smoothing", "mixup", "soft_labels"]


def label_smoothing(
    counts: Sequence[int],
    smoothing: float,
    feature_dim: int,
    lambda_w: float,
    lambda_h: float,
    bias: Literal["none", "free"] | float = "none",
) -> Problem:
    r"""Make the problem of cross-entropy with smoothed labels, as with ``label_smoothing`` in torch.

    The targets are :math:`(1 - \delta) e_k + \delta/K`. For balanced classes the optimal logits of class k are
    :math:`s (e_k - 1/K)` with :math:`s = \log(1/q' - K + 1)` and :math:`q' = \sqrt{n\lambda_W\lambda_H} + \delta/K`.
    For other counts the optimum is numerical. Source: Zhou et al. 2022 (2210.02192).

    Args:
        counts: Number of samples of each class.
        smoothing: delta, at least 0 and below 1.
        feature_dim: d.
        lambda_w: Penalty on the head.
        lambda_h: Penalty on the features.
        bias: ``"none"``, ``"free"`` or the penalty on the bias.

    Returns:
        The problem.

    Example:
        >>> from nclightning.problems import label_smoothing
        >>> label_smoothing([10] * 4, 0.1, feature_dim=3, lambda_w=1e-3, lambda_h=1e-3).optimum.method
        'closed form'
    """
    numbers = counts_of(counts)
    if not 0 <= smoothing < 1:
        raise UserError(f"smoothing must be from 0 to below 1, got {smoothing!r}.")
    targets = (1 - smoothing) * one_hot(len(numbers)) + smoothing / len(numbers)
    return Problem(CrossEntropy(), targets, numbers, feature_dim, lambda_w, lambda_h, bias)


def soft_labels(
    targets: Sequence[Sequence[float]] | Tensor,
    counts: Sequence[int],
    feature_dim: int,
    lambda_w: float,
    lambda_h: float,
    bias: Literal["none", "free"] | float = "none",
) -> Problem:
    """Make the problem of cross-entropy with any finite set of target distributions. The optimum is numerical.

    Args:
        targets: ``(M, K)``, rows of probabilities.
        counts: Number of samples with each target.
        feature_dim: d.
        lambda_w: Penalty on the head.
        lambda_h: Penalty on the features.
        bias: ``"none"``, ``"free"`` or the penalty on the bias.

    Returns:
        The problem.

    Example:
        >>> from nclightning.problems import soft_labels
        >>> problem = soft_labels([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]], [5, 5, 2], 2, lambda_w=1e-3, lambda_h=1e-3)
        >>> problem.optimum.rank
        1
    """
    return Problem(CrossEntropy(), targets, counts, feature_dim, lambda_w, lambda_h, bias)


def mixup(
    num_classes: int,
    samples_per_class: int,
    samples_per_pair: int,
    feature_dim: int,
    lambda_w: float,
    lambda_h: float,
    shares: Sequence[float] = (0.5,),
    bias: Literal["none", "free"] | float = "none",
) -> Problem:
    r"""Make the problem of cross-entropy with mixup: pure classes, and mixed targets of every pair of classes.

    The mixed targets are :math:`\mu e_j + (1 - \mu) e_k` for finitely many shares :math:`\mu`. The optimum is
    numerical. Source of the setting: Fisher et al. 2024 (2402.06171).

    Args:
        num_classes: K.
        samples_per_class: Number of samples of each pure class.
        samples_per_pair: Number of samples of each ordered pair and share. For a share of one half both orders of a
            pair are the same target, which is included once.
        feature_dim: d.
        lambda_w: Penalty on the head.
        lambda_h: Penalty on the features.
        shares: The shares mu, each between 0 and 1.
        bias: ``"none"``, ``"free"`` or the penalty on the bias.

    Returns:
        The problem.

    Example:
        >>> from nclightning.problems import mixup
        >>> problem = mixup(3, 10, 2, feature_dim=4, lambda_w=1e-3, lambda_h=1e-3)
        >>> problem.num_groups, problem.num_samples
        (6, 36)
    """
    counts = balanced(num_classes, samples_per_class)
    if not all(0 < share < 1 for share in shares):
        raise UserError(f"shares must lie between 0 and 1, got {tuple(shares)}.")
    pure = one_hot(num_classes)
    mixed = []
    for share in shares:
        pairs = list(combinations(range(num_classes), 2))
        if share != 0.5:
            pairs += [(k, j) for j, k in pairs]
        mixed += [share * pure[j] + (1 - share) * pure[k] for j, k in pairs]
    counts += [samples_per_pair] * len(mixed)
    return Problem(CrossEntropy(), torch.stack([*pure, *mixed]), counts, feature_dim, lambda_w, lambda_h, bias)
