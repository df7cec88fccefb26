"""Hessian-vector products of the unconstrained feature model without autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from nclightning.objective import Objective
from nclightning.ranks import sum_all_over_ranks

__all__ = ["hessian_product"]


def hessian_product(
    objective: Objective,
    point: Sequence[Tensor],
    vector: Sequence[Tensor],
    labels: Tensor,
    num_samples: int,
    shared: bool = False,
    rows: int | None = None,
) -> list[Tensor]:
    r"""Multiply the Hessian of F by a vector.

    Let :math:`(H, W, b)` be the point, :math:`(V, U, u)` the vector, and R the residual. The logits change by
    :math:`V W^\top + H U^\top + 1 u^\top`; let C be the product of each sample's Hessian in the logits with its row of
    this change. The result is

    .. math::
        \tfrac1N (C W + R U) + \lambda_H V, \quad
        \tfrac1N (C^\top H + R^\top V) + \lambda_W U, \quad
        \tfrac1N C^\top \mathbf 1 + \lambda_b u .

    Args:
        objective: F.
        point: Features ``(B, d)``, weight ``(K, d)`` and perhaps bias ``(K,)``.
        vector: The vector, in the same shapes and dtype.
        labels: Classes, or rows of the targets, ``(B,)`` int64.
        num_samples: N, over all processes.
        shared: Whether processes share the samples.
        rows: Number of samples per block; None takes all at once.

    Returns:
        The product, in the same shapes and dtype.

    Example:
        >>> import torch
        >>> from nclightning.models.hessian import hessian_product
        >>> from nclightning.objective import Objective
        >>> objective = Objective("mse", lambda_w=0.0, lambda_h=0.0)
        >>> h, w = torch.tensor([[2.0]]), torch.tensor([[3.0]])  # F = (w h - 1)^2 / 2, one sample and one output.
        >>> along_h = torch.ones(1, 1), torch.zeros(1, 1)
        >>> hessian_product(objective, (h, w), along_h, labels=torch.tensor([0]), num_samples=1)
        [tensor([[9.]]), tensor([[11.]])]
    """
    (features, weight, *bias), (direction, *direction_of_head) = point, vector
    of_features, of_weight, *of_bias = products = [torch.zeros_like(part) for part in point]
    scale, count = 1 / num_samples, rows or len(labels)
    parts = (torch.split(each, count) for each in (features, direction, labels, of_features))
    for h, v, y, out in zip(*parts, strict=True):
        logits = linear(h, weight, *bias)
        targets, change = objective.targets_of(logits, y), linear(h, *direction_of_head).addmm_(v, weight.T)
        residual = objective.function.residual(logits, targets)
        curved = objective.function.curvature(logits, targets, change)
        # The part of the gradient that is linear in the point contributes the same expression with the vector.
        objective.gradient_of(v, direction_of_head, residual, num_samples, [of_weight], out)
        out.addmm_(curved, weight, alpha=scale)
        of_weight.addmm_(curved.T, h, alpha=scale)
        for product in of_bias:
            product.add_(curved.sum(dim=0), alpha=scale)
    if shared:
        sum_all_over_ranks(products[1:])
    objective.add_penalty_gradients_(products[1:], direction_of_head)
    return products
