"""Regression with vector targets, whose optimum shows neural regression collapse."""

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
    r"""Make the problem of squared error on real targets, one row for each sample.

    Let :math:`\Sigma` be the covariance of the targets (their second moment for a head without a bias). The optimal
    head has :math:`W W^\top = \sqrt{N \lambda_H/\lambda_W} [\Sigma^{1/2} - \sqrt{N\lambda_W\lambda_H} I]_+`, and the
    features lie in its row space. The optimum is known for every feature dimension. Source: Andriopoulos et al. 2024
    (2409.04180). Their penalty on the features is a mean over samples, so that their lambda_H is ours times N.

    Args:
        targets: ``(N, K)``.
        feature_dim: d.
        lambda_w: Penalty on the head.
        lambda_h: Penalty on the features, on the sum over samples.
        bias: ``"free"``, ``"none"`` or the penalty on the bias.

    Returns:
        The problem. Each sample is a group; sample i has the label i.

    Example:
        >>> from nclightning.problems import regression, regression_gram
        >>> problem = regression([[0.0, 1.0], [1.0, 0.0], [2.0, 2.0]], 2, lambda_w=1e-3, lambda_h=1e-3)
        >>> optimum = problem.random_optimum()
        >>> bool((optimum.weight @ optimum.weight.T - regression_gram(problem)).norm() < 1e-12)
        True
    """
    rows = read_numbers(targets, "targets must be numbers (N, K)")
    return Problem(SquaredError(), rows, [1] * len(rows), feature_dim, lambda_w, lambda_h, bias)


def regression_gram(problem: Problem) -> Tensor:
    r"""Compute the Gram matrix :math:`W W^\top` of the optimal head, with which NRC3 compares the trained head.

    Args:
        problem: Any problem.

    Returns:
        ``(K, K)``, float64.

    Example:
        >>> from nclightning.problems import regression, regression_gram
        >>> problem = regression([[1.0, 0.0], [0.0, 1.0]], 2, lambda_w=0.01, lambda_h=0.01, bias="none")
        >>> regression_gram(problem).round(decimals=4)  # sqrt(2) (sqrt(1 / 2) - sqrt(2) / 100) I
        tensor([[0.9800, 0.0000],
                [0.0000, 0.9800]], dtype=torch.float64)
    """
    factor = problem.optimal_set.weight_factor
    return factor @ factor.T
