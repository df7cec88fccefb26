"""Products with the Hessian at one point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Hessian", "multiply_by_graph"]


class Hessian(NamedTuple):
    """Products with the Hessian at one point.

    Attributes:
        multiply: Function that multiplies the Hessian by a vector. The vector has one entry per parameter, None where
            the gradient is None; for a sharded parameter, the shard of this process.
        error: Rough error of a product, relative to the largest eigenvalue times the length of the vector.
        evaluations: Number of evaluations that it took to set up. Each product counts one more.
    """

    multiply: Callable[[Sequence[Tensor | None]], Sequence[Tensor | None]]
    error: float
    evaluations: int = 0


def multiply_by_graph(
    gradients: Sequence[Tensor | None], params: Sequence[Tensor], vector: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Multiply the Hessian by a vector.

    Args:
        gradients: The gradients with their graph; None where a parameter has none.
        params: The parameters of the gradients.
        vector: One entry per parameter; None is zero.

    Returns:
        The product, one entry per parameter; None where there is no gradient.
    """
    known = [(g, v) for g, v in zip(gradients, vector, strict=True) if g is not None and g.requires_grad]
    outputs, weights = [g for g, v in known if v is not None], [v for _, v in known if v is not None]
    wanted = [i for i, g in enumerate(gradients) if g is not None]
    products = [None if g is None else torch.zeros_like(p) for g, p in zip(gradients, params, strict=True)]
    if not outputs:
        return products
    found = torch.autograd.grad(outputs, [params[i] for i in wanted], weights, retain_graph=True, allow_unused=True)
    for i, product in zip(wanted, found, strict=True):
        products[i] = products[i] if product is None else product
    return products
