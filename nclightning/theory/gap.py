r"""F - F* of the unconstrained feature model without cancellation.

Every term vanishes at an optimum on its own, so nothing of the size of F is ever subtracted. With
:math:`f = \min(1, 1/(Kq))` and :math:`\bar w` the mean row of the head, the gap is

.. math::
    \frac{K\lambda_W}2 \|\bar w\|^2 + \frac{(1-f)\lambda_W}2 \|WP\|^2 + \frac{(1-f)\lambda_H}2 \sum_i \|h_i\|^2
    + \frac{f\lambda_H}2 \sum_i \|h_i - c\,(w_{y_i} - \bar w)\|^2 + \frac1N \sum_i D(z_i, z^*_{y_i})

with D the Bregman divergence of the loss between the logits and the optimal logits :math:`z^*_k = s(e_k - 1/K)`
(``1/K + ..`` with the bias of MSE). The squares follow from the residual :math:`-f K q P` at the optimum, which
turns the cross term of weight and features into the completed square. Legend in :mod:`nclightning.theory.problem`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nclightning.theory import solutions

if TYPE_CHECKING:
    from nclightning.theory.problem import UFMProblem

__all__ = ["divergence", "optimality_gap"]

# Above this deviation the terms of the divergence may overflow; below it exp(t) is harmless.
_LARGEST_EXPONENT = 30.0


def optimality_gap(
    problem: UFMProblem, weight: Tensor, features: Tensor, labels: Tensor, bias: Tensor | None
) -> Tensor:
    """Evaluate the gap at a checked float64 point."""
    if problem.collapses and problem.rank < problem.num_classes - 1:
        return _low_rank_gap(problem, weight, features, labels, bias)
    K = problem.num_classes
    fraction = min(1.0, 1.0 / (K * problem.q))
    mean = weight.mean(dim=0)
    centred = weight - mean
    penalty = K * problem.lambda_w * mean.square().sum()
    misfit = features - problem.ratio * centred.index_select(0, labels)
    penalty = penalty + fraction * problem.lambda_h * misfit.square().sum()
    if fraction < 1:
        rest = problem.lambda_w * centred.square().sum() + problem.lambda_h * features.square().sum()
        penalty = penalty + (1 - fraction) * rest
    return penalty / 2 + divergence(problem, features @ weight.T, labels, bias).mean()


def divergence(problem: UFMProblem, logits: Tensor, labels: Tensor, bias: Tensor | None) -> Tensor:
    """Bregman divergence of each sample's loss between its logits and the optimal ones, ``(N,)``."""
    K, s = problem.num_classes, problem.logit_scale
    index = labels.unsqueeze(1)
    optimal = torch.full_like(logits, -s / K).scatter_(1, index, s * (1 - 1 / K))
    deviation = logits - optimal
    if problem.loss == "mse":
        assert bias is not None
        return (deviation + (bias - 1.0 / K)).square().sum(dim=1) / 2
    wrong = min(problem.q, 1.0 / K)  # softmax probability of each wrong class at the optimum
    probability = torch.full_like(logits, wrong).scatter_(1, index, wrong + (1 - K * wrong))
    t = deviation - (probability * deviation).sum(dim=1, keepdim=True)
    largest = t.amax(dim=1)
    # Both branches are finite for every finite t: torch.where evaluates both.
    near = torch.log1p((probability * _exp_excess(t.clamp(max=_LARGEST_EXPONENT))).sum(dim=1))
    far = largest + torch.log((probability * torch.exp(t - largest.unsqueeze(1))).sum(dim=1))
    return torch.where(largest > _LARGEST_EXPONENT, far, near)


def _exp_excess(t: Tensor) -> Tensor:
    """``exp(t) - 1 - t`` to full relative accuracy, by its series where the difference would cancel."""
    one = series = torch.ones_like(t)
    for k in range(18, 2, -1):
        series = torch.addcmul(one, t, series, value=1 / k)
    return torch.where(t.abs() <= 0.5, t.square() / 2 * series, torch.expm1(t) - t)


def _low_rank_gap(problem: UFMProblem, weight: Tensor, features: Tensor, labels: Tensor, bias: Tensor | None) -> Tensor:
    """Gap of MSE with ``d < K - 1``, expanded around the nearest optimum, whose residual is not a multiple of P."""
    assert bias is not None
    K = problem.num_classes
    closest = solutions.nearest(problem, weight, features, labels, bias)
    step_w, step_h = weight - closest.weight, features - closest.features
    assert closest.bias is not None
    change = closest.features @ step_w.T + step_h @ closest.weight.T + step_h @ step_w.T + (bias - closest.bias)
    # Residual s M M^T - P of class k is row k; it meets the second-order part of the change of the logits.
    frame = closest.weight / problem.weight_scale
    residual = (
        problem.logit_scale * (frame @ frame.T) - torch.eye(K, dtype=weight.dtype, device=weight.device) + 1.0 / K
    )
    sums = torch.zeros_like(weight).index_add_(0, labels, step_h)
    cross = (residual * (sums @ step_w.T)).sum()
    penalty = problem.lambda_w * step_w.square().sum() + problem.lambda_h * step_h.square().sum()
    return penalty / 2 + (cross + change.square().sum() / 2) / problem.num_samples
