r"""Distance and gap from class means and spreads: what they are for features that are not kept.

The squared distances of the features of a class split into their spread and n times that of their mean, so that
nothing but the divergence of the logits needs the samples. Legend in :mod:`nclightning.theory.problem`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nclightning.theory import solutions

if TYPE_CHECKING:
    from nclightning.theory.problem import UFMProblem

__all__ = ["distance", "gap"]


def distance(problem: UFMProblem, weight: Tensor, means: Tensor, spread: Tensor, bias: Tensor | None) -> Tensor:
    """Norm of the residual to the nearest optimum. CE is indifferent to a shift of the bias."""
    n = problem.samples_per_class
    closest = solutions.member(
        problem, weight + problem.ratio * n * means, torch.arange(len(means), device=means.device)
    )
    squared = (weight - closest.weight).square().sum() + n * (means - closest.features).square().sum() + spread
    if bias is not None:
        best = bias.mean() if closest.bias is None else closest.bias
        squared = squared + (bias - best).square().sum()
    return squared.sqrt()


def gap(problem: UFMProblem, weight: Tensor, means: Tensor, spread: Tensor, divergence: Tensor) -> Tensor:
    """F - F* as the sum of squares of :mod:`nclightning.theory.gap`, with the mean divergence of the samples."""
    K, n = problem.num_classes, problem.samples_per_class
    fraction = min(1.0, 1.0 / (K * problem.q))
    mean = weight.mean(dim=0)
    centred = weight - mean
    misfit = spread + n * (means - problem.ratio * centred).square().sum()
    penalty = K * problem.lambda_w * mean.square().sum() + fraction * problem.lambda_h * misfit
    if fraction < 1:
        norm = spread + n * means.square().sum()
        penalty = penalty + (1 - fraction) * (problem.lambda_w * centred.square().sum() + problem.lambda_h * norm)
    return penalty / 2 + divergence
