"""Squared error on hard labels of classes with any counts, by the bias."""

from __future__ import annotations

from collections.abc import Sequence

from nclightning.problems.frames import one_hot
from nclightning.problems.members.counting import counts_of
from nclightning.problems.problem import Problem
from nclightning.problems.squared_error import SquaredError

__all__ = ["mse_with_penalized_bias", "mse_without_bias", "unbalanced_mse"]


def mse_without_bias(counts: Sequence[int], feature_dim: int, lambda_w: float, lambda_h: float) -> Problem:
    r"""Squared error on one-hot targets without a bias: an orthogonal frame, each class with a length of its own.

    The scaled logits are diagonal with entries :math:`(\sqrt{n_k} - N\sqrt{\lambda_W\lambda_H})_+`: class k vanishes
    iff :math:`n_k \le N^2\lambda_W\lambda_H`. Source: Dang et al. 2023 and 2024 (2401.02058); Tirer and Bruna 2022
    (2202.08087) for balanced classes.

    Args:
        counts: Samples of each class.
        feature_dim: d.
        lambda_w: Penalty on the head.
        lambda_h: Penalty on the features.

    Returns:
        The problem.

    Example:
        >>> problem = mse_without_bias([100, 100, 4], feature_dim=3, lambda_w=0.01, lambda_h=0.01)
        >>> problem.optimum.rank  # The class with 4 samples vanishes: 4 <= 204^2 1e-4 = 4.16.
        2
    """
    numbers = counts_of(counts)
    return Problem(SquaredError(), one_hot(len(numbers)), numbers, feature_dim, lambda_w, lambda_h)


def mse_with_penalized_bias(
    counts: Sequence[int], feature_dim: int, lambda_w: float, lambda_h: float, lambda_b: float
) -> Problem:
    r"""Squared error on one-hot targets with a penalized bias.

    For balanced classes the optimal logits of class k are :math:`s (e_k - 1/K) + t/K + \beta` with
    :math:`q = \sqrt{n\lambda_W\lambda_H}`, :math:`s = (1 - Kq)_+`, :math:`t = (1 - Kq (1 + 1/\lambda_b))_+`, and the
    bias :math:`\beta = q/\lambda_b` if t is positive, else :math:`1/(K(1 + \lambda_b))`: between the simplex ETF of a
    free bias and the orthogonal frame without one. Source: 2606.00344. Other counts have no formula.

    Args:
        counts: Samples of each class.
        feature_dim: d.
        lambda_w: Penalty on the head.
        lambda_h: Penalty on the features.
        lambda_b: Penalty on the bias, positive.

    Returns:
        The problem.

    Example:
        >>> problem = mse_with_penalized_bias([10] * 4, 4, lambda_w=1e-3, lambda_h=1e-3, lambda_b=0.1)
        >>> bias = problem.optimum.factors.bias  # q / lambda_b
        >>> [round(b, 6) for b in bias.tolist()]
        [0.031623, 0.031623, 0.031623, 0.031623]
    """
    numbers = counts_of(counts)
    return Problem(SquaredError(), one_hot(len(numbers)), numbers, feature_dim, lambda_w, lambda_h, lambda_b)


def unbalanced_mse(counts: Sequence[int], feature_dim: int, lambda_w: float, lambda_h: float) -> Problem:
    r"""Squared error on one-hot targets with a free bias and any counts.

    The scaled logits are :math:`\mathrm{diag}(\sqrt{n_k})` without its component along the roots of the counts, with
    its singular values lowered by :math:`N\sqrt{\lambda_W\lambda_H}` where they are larger. Known for every feature
    dimension. Source: Thrampoulidis et al. 2022 (2208.05512) for the centred targets.

    Args:
        counts: Samples of each class.
        feature_dim: d.
        lambda_w: Penalty on the head.
        lambda_h: Penalty on the features.

    Returns:
        The problem.

    Example:
        >>> unbalanced_mse([100, 10, 1], feature_dim=5, lambda_w=1e-3, lambda_h=1e-3).optimum.rank
        2
    """
    numbers = counts_of(counts)
    return Problem(SquaredError(), one_hot(len(numbers)), numbers, feature_dim, lambda_w, lambda_h, bias="free")
