"""Balanced classes with hard labels: the two problems of the paper."""

from __future__ import annotations

from typing import Literal

from nclightning.problems.cross_entropy import CrossEntropy
from nclightning.problems.frames import one_hot
from nclightning.problems.members.counting import balanced
from nclightning.problems.problem import Problem
from nclightning.problems.squared_error import SquaredError

__all__ = ["balanced_ce", "balanced_mse"]


def balanced_mse(
    num_classes: int, samples_per_class: int, feature_dim: int, lambda_w: float, lambda_h: float
) -> Problem:
    r"""Make the problem of squared error on one-hot targets with a free bias, for balanced classes.

    The optimal logits of class k are :math:`(1 - Kq)(e_k - 1/K) + 1/K` with :math:`q = \sqrt{n\lambda_W\lambda_H}`, and
    :math:`1/K` where :math:`Kq \ge 1`. The optimum is known for every feature dimension. Source: Zhou et al. 2022
    (2203.01238).

    Args:
        num_classes: K.
        samples_per_class: n.
        feature_dim: d.
        lambda_w: Penalty on the head.
        lambda_h: Penalty on the features.

    Returns:
        The problem.

    Example:
        >>> from nclightning.problems import balanced_mse
        >>> round(balanced_mse(10, 10, 20, lambda_w=5e-3, lambda_h=5e-4).optimal_value, 6)
        0.043875
    """
    counts = balanced(num_classes, samples_per_class)
    return Problem(SquaredError(), one_hot(num_classes), counts, feature_dim, lambda_w, lambda_h, bias="free")


def balanced_ce(
    num_classes: int,
    samples_per_class: int,
    feature_dim: int,
    lambda_w: float,
    lambda_h: float,
    bias: Literal["none", "free"] | float = "none",
) -> Problem:
    r"""Make the problem of cross-entropy with balanced classes.

    The optimal logits of class k are :math:`s (e_k - 1/K)` with :math:`s = \log(1/q - K + 1)` and
    :math:`q = \sqrt{n\lambda_W\lambda_H}`, and zero where :math:`Kq \ge 1`. The optimal bias is zero, or any constant
    if it is free. Source: Zhu et al. 2021 (2105.02375).

    Args:
        num_classes: K.
        samples_per_class: n.
        feature_dim: d. The optimum is known if d is at least ``K - 1``.
        lambda_w: Penalty on the head.
        lambda_h: Penalty on the features.
        bias: ``"none"``, ``"free"`` or the penalty on the bias.

    Returns:
        The problem.

    Example:
        >>> from nclightning.problems import balanced_ce
        >>> round(balanced_ce(10, 10, 20, lambda_w=5e-3, lambda_h=5e-4).optimal_value, 6)
        0.282396
    """
    counts = balanced(num_classes, samples_per_class)
    return Problem(CrossEntropy(), one_hot(num_classes), counts, feature_dim, lambda_w, lambda_h, bias)
