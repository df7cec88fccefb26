"""Regression on vectors: neural regression collapse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from nclightning.problems.checks import read_numbers
from nclightning.problems.problem import Problem
from nclightning.problems.squared_error import SquaredError

__all__ = ["regression", "regression_gram"]


def regression(
    targets: Sequence[Sequence[float]] | Tensor,
    feature_dim: int,
    lambda_w: float,
    lambda_h: float,
    bias: Literal["none", "free"] | float = "free",
) -> Problem:
    r"""Squared error on real targets, one row for each sample.

    With :math:`\Sigma` the covariance of the targets (the second moment without a bias) the optimal head has
    :math:`W W^\top = \sqrt{N \lambda_H/\lambda_W} [\Sigma^{1/2} - \sqrt{N\lambda_W\lambda_H} I]_+`, and the features
    lie in its row space. Known for every feature dimension. Source: Andriopoulos et al. 2024 (2409.04180), whose
    penalty on the features is a mean over samples: their lambda_H is ours times N.

    Args:
        targets: ``(N, K)``.
        feature_dim: d.
        lambda_w: Penalty on the head.
        lambda_h: Penalty on the features, on the sum over samples.
        bias: ``"free"``, ``"none"`` or its penalty.

    Returns:
        The problem; sample i has the label i.

    Example:
        >>> problem = regression([[0.0, 1.0], [1.0, 0.0], [2.0, 2.0]], 2, lambda_w=1e-3, lambda_h=1e-3)
        >>> optimum = problem.random_optimum()
        >>> bool((optimum.weight @ optimum.weight.T - regression_gram(problem)).norm() < 1e-12)
        True
    """
    rows = read_numbers(targets, "targets must be numbers (N, K)")
    return Problem(SquaredError(), rows, [1] * len(rows), feature_dim, lambda_w, lambda_h, bias)


def regression_gram(problem: Problem) -> Tensor:
    r"""Predict :math:`W W^\top` ``(K, K)`` at the optimum, which NRC3 compares with the head's.

    Args:
        problem: Any problem.

    Returns:
        Float64.
    """
    factor = problem.optimal_set.weight_factor
    return factor @ factor.T
