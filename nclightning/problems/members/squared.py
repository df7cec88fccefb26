"""Squared error on hard labels of classes with any counts: without bias, with a free bias, with a penalized bias."""

from __future__ import annotations

from collections.abc import Sequence

from nclightning.problems.frames import one_hot
from nclightning.problems.members.counting import counts_of
from nclightning.problems.problem import Problem
from nclightning.problems.squared_error import SquaredError

__all__ = ["mse_with_penalized_bias", "mse_without_bias", "unbalanced_mse"]


def mse_without_bias(counts: Sequence[int], feature_dim: int, lambda_w: float, lambda_h: float) -> Problem:
    r"""Make the problem of squared error on one-hot targets without a bias.

    At the optimum class means are orthogonal, with a length for each class. The scaled optimal logits are diagonal with
    entries :math:`(\sqrt{n_k} - N\sqrt{\lambda_W\lambda_H})_+`: class k vanishes if and only if
    :math:`n_k \le N^2\lambda_W\lambda_H`. Source: Dang et al. 2023 and 2024 (2401.02058); Tirer and Bruna 2022
    (2202.08087) for balanced classes.

    Args:
        counts: Number of samples of each class.
        feature_dim: d.
        lambda_w: Penalty on the head.
        lambda_h: Penalty on the features.

    Returns:
        The problem.

    Example:
        >>> from nclightning.problems import mse_without_bias
        >>> problem = mse_without_bias([100, 100, 4], feature_dim=3, lambda_w=0.01, lambda_h=0.01)
        >>> problem.optimum.rank  # The class with 4 samples vanishes: 4 <= 204^2 1e-4 = 4.16.
        2
    """
    numbers = counts_of(counts)
    return Problem(SquaredError(), one_hot(len(numbers)), numbers, feature_dim, lambda_w, lambda_h)


def mse_with_penalized_bias(
    counts: Sequence[int], feature_dim: int, lambda_w: float, lambda_h: float, lambda_b: float
) -> Problem:
    r"""Make the problem of squared error on one-hot targets with a penalized bias.

    For balanced classes the optimal logits of class k are :math:`s (e_k - 1/K) + t/K + \beta` with
    :math:`q = \sqrt{n\lambda_W\lambda_H}`, :math:`s = (1 - Kq)_+`, :math:`t = (1 - Kq (1 + 1/\lambda_b))_+`, and the
    bias :math:`\beta = q/\lambda_b` if t is positive, else :math:`1/(K(1 + \lambda_b))`. This lies between the simplex
    ETF of a free bias and the orthogonal frame without a bias. For other counts the optimum is numerical. Source:
    2606.00344.

    Args:
        counts: Number of samples of each class.
        feature_dim: d.
        lambda_w: Penalty on the head.
        lambda_h: Penalty on the features.
        lambda_b: Penalty on the bias, positive.

    Returns:
        The problem.

    Example:
        >>> from nclightning.problems import mse_with_penalized_bias
        >>> problem = mse_with_penalized_bias([10] * 4, 4, lambda_w=1e-3, lambda_h=1e-3, lambda_b=0.1)
        >>> bias = problem.optimum.factors.bias  # q / lambda_b
        >>> [round(b, 6) for b in bias.tolist()]
        [0.031623, 0.031623, 0.031623, 0.031623]
    """
    numbers = counts_of(counts)
    return Problem(SquaredError(), one_hot(len(numbers)), numbers, feature_dim, lambda_w, lambda_h, lambda_b)


def unbalanced_mse(counts: Sequence[int], feature_dim: int, lambda_w: float, lambda_h: float) -> Problem:
    r"""Make the problem of squared error on one-hot targets with a free bias and any counts.

    Take :math:`\mathrm{diag}(\sqrt{n_k})` without its component along the vector of the :math:`\sqrt{n_k}`. The scaled
    optimal logits are its soft threshold at :math:`N\sqrt{\lambda_W\lambda_H}`: each singular value is reduced by this
    number, down to zero at least. The optimum is known for every feature dimension. Source: Thrampoulidis et al. 2022
    (2208.05512) for the centred targets.

    Args:
        counts: Number of samples of each class.
        feature_dim: d.
        lambda_w: Penalty on the head.
        lambda_h: Penalty on the features.

    Returns:
        The problem.

    Example:
        >>> from nclightning.problems import unbalanced_mse
        >>> unbalanced_mse([100, 10, 1], feature_dim=5, lambda_w=1e-3, lambda_h=1e-3).optimum.rank
        2
    """
    numbers = counts_of(counts)
    return Problem(SquaredError(), one_hot(len(numbers)), numbers, feature_dim, lambda_w, lambda_h, bias="free")
