"""Several labels per sample, with a logistic loss for each label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from nclightning.problems.cross_entropy import BinaryCrossEntropy
from nclightning.problems.problem import Problem

__all__ = ["multi_label_bce"]


def multi_label_bce(
    targets: Sequence[Sequence[float]] | Tensor,
    counts: Sequence[int],
    feature_dim: int,
    lambda_w: float,
    lambda_h: float,
    bias: Literal["none", "free"] | float = "none",
) -> Problem:
    r"""Make the problem of binary cross-entropy with several labels per sample.

    The loss is :math:`\sum_k \log(1 + e^{z_k}) - y_k z_k`, a sum over labels. Groups are the combinations of labels
    that occur. The optimum is numerical. ``torch.nn.BCEWithLogitsLoss`` divides the loss by K; to compare with it,
    divide both penalties by K, too. Source of the setting: Li et al. 2024 (2310.15903), with another loss.

    Args:
        targets: ``(M, K)``, rows of zeros and ones, or of numbers between them.
        counts: Number of samples with each combination.
        feature_dim: d.
        lambda_w: Penalty on the head.
        lambda_h: Penalty on the features.
        bias: ``"none"``, ``"free"`` or the penalty on the bias.

    Returns:
        The problem.

    Example:
        >>> from nclightning.problems import multi_label_bce
        >>> problem = multi_label_bce([[1, 0], [0, 1], [1, 1]], [5, 5, 2], 3, lambda_w=1e-3, lambda_h=1e-3)
        >>> problem.optimum.rank
        2
    """
    return Problem(BinaryCrossEntropy(), targets, counts, feature_dim, lambda_w, lambda_h, bias)
