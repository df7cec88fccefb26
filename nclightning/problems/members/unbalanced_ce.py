"""Cross-entropy of classes with any counts: plain, with class weights, and with logit adjustment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch

from nclightning.errors import UserError
from nclightning.problems.checks import read_numbers
from nclightning.problems.cross_entropy import CrossEntropy
from nclightning.problems.frames import one_hot
from nclightning.problems.members.counting import counts_of
from nclightning.problems.problem import Problem

__all__ = ["logit_adjusted_ce", "unbalanced_ce", "weighted_ce"]


def unbalanced_ce(
    counts: Sequence[int],
    feature_dim: int,
    lambda_w: float,
    lambda_h: float,
    bias: Literal["none", "free"] | float = "none",
) -> Problem:
    r"""Make the problem of cross-entropy with any counts, where small classes may merge (minority collapse).

    The optimum is found numerically and certified. Two classes have merged if their rows of
    ``problem.optimum.logits`` are equal; :func:`nclightning.problems.rank_thresholds` finds the penalties at which
    this happens. Sources: Fang et al. 2021; Thrampoulidis et al. 2022 (2208.05512); Hong and Ling 2023.

    Args:
        counts: Number of samples of each class; 0 for an absent class.
        feature_dim: d, at least the rank of the optimum, which is at most ``K - 1``.
        lambda_w: Penalty on the head.
        lambda_h: Penalty on the features.
        bias: ``"none"``, ``"free"`` or the penalty on the bias.

    Returns:
        The problem.

    Example:
        >>> from nclightning.problems import unbalanced_ce
        >>> problem = unbalanced_ce([100, 100, 2, 2], feature_dim=3, lambda_w=0.01, lambda_h=0.01)
        >>> problem.optimum.rank  # The two minorities share one feature.
        2
    """
    numbers = counts_of(counts)
    return Problem(CrossEntropy(), one_hot(len(numbers)), numbers, feature_dim, lambda_w, lambda_h, bias)


def weighted_ce(
    counts: Sequence[int],
    class_weights: Sequence[float] | Literal["inverse"],
    feature_dim: int,
    lambda_w: float,
    lambda_h: float,
    bias: Literal["none", "free"] | float = "none",
) -> Problem:
    r"""Make the problem of cross-entropy with class weights, averaged as in ``torch.nn.CrossEntropyLoss(weight=..)``.

    .. math:: \frac{\sum_i w_{y_i} \mathrm{CE}(z_i, y_i)}{\sum_i w_{y_i}}

    The optimum is numerical. With weights inversely proportional to the counts, the loss gives all classes the same
    weight. The optimum is still not a simplex ETF, since the penalty on the features is a sum over samples.

    Args:
        counts: Number of samples of each class.
        class_weights: A positive number for each class, up to a common factor. ``"inverse"`` takes one over the counts.
        feature_dim: d.
        lambda_w: Penalty on the head.
        lambda_h: Penalty on the features.
        bias: ``"none"``, ``"free"`` or the penalty on the bias.

    Returns:
        The problem.

    Example:
        >>> from nclightning.problems import weighted_ce
        >>> problem = weighted_ce([40, 10], "inverse", feature_dim=2, lambda_w=1e-3, lambda_h=1e-3)
        >>> [round(w, 3) for w in problem.loss.class_weights.tolist()]
        [0.625, 2.5]
    """
    numbers = counts_of(counts)
    if isinstance(class_weights, str):
        if class_weights != "inverse":
            raise UserError(f"class_weights must be numbers or 'inverse', got {class_weights!r}.")
        if not bool((numbers > 0).all()):
            raise UserError("class_weights='inverse' needs samples of every class: give the weights as numbers.")
        weights = 1 / numbers
    else:
        weights = read_numbers(class_weights, "class_weights must be numbers or 'inverse'")
        if weights.shape != numbers.shape:
            raise UserError(
                f"class_weights must hold {len(numbers)} numbers like counts, got the shape {tuple(weights.shape)}."
            )
        if not bool((weights > 0).all() & weights.isfinite().all()):
            raise UserError(f"class_weights must be positive and finite, got {class_weights!r}.")
    loss = CrossEntropy(class_weights=weights * numbers.sum() / (numbers * weights).sum())
    return Problem(loss, one_hot(len(numbers)), numbers, feature_dim, lambda_w, lambda_h, bias)


def logit_adjusted_ce(
    counts: Sequence[int],
    feature_dim: int,
    lambda_w: float,
    lambda_h: float,
    temperature: float = 1.0,
    bias: Literal["none", "free"] | float = "none",
) -> Problem:
    r"""Make the problem of cross-entropy with logit adjustment: the loss adds :math:`\tau \log(n_k / N)` to the logits.

    Menon et al. 2021. The optimum is numerical. A free bias absorbs the adjustment, so that the rest of the optimum is
    that of plain cross-entropy.

    Args:
        counts: Number of samples of each class, all positive.
        feature_dim: d.
        lambda_w: Penalty on the head.
        lambda_h: Penalty on the features.
        temperature: tau; 0 is plain cross-entropy.
        bias: ``"none"``, ``"free"`` or the penalty on the bias.

    Returns:
        The problem.

    Example:
        >>> from nclightning.problems import logit_adjusted_ce
        >>> problem = logit_adjusted_ce([40, 10], feature_dim=2, lambda_w=1e-3, lambda_h=1e-3)
        >>> problem.optimum.rank
        1
    """
    numbers = counts_of(counts)
    if not bool((numbers > 0).all()):
        raise UserError("counts must all be positive for logit_adjusted_ce: the adjustment is the logarithm of them.")
    if not math.isfinite(temperature):
        raise UserError(f"temperature must be finite, got {temperature!r}.")
    loss = CrossEntropy(offset=temperature * torch.log(numbers / numbers.sum()))
    return Problem(loss, one_hot(len(numbers)), numbers, feature_dim, lambda_w, lambda_h, bias)
