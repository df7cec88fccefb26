"""Penalties at which the optimum changes its shape."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from nclightning.errors import UserError

if TYPE_CHECKING:
    from nclightning.problems.problem import Problem

__all__ = ["rank_thresholds"]


def rank_thresholds(problem: Problem, lowest: float, relative_accuracy: float = 1e-6) -> dict[int, float]:
    r"""Find the values of :math:`\lambda_W\lambda_H` at which the rank of the optimal logits falls, by bisection.

    At these values a class vanishes, or two classes merge.

    Args:
        problem: The problem. Its penalties are varied with a fixed ratio.
        lowest: Smallest value of the product; the search covers values from here to the threshold.
        relative_accuracy: Relative accuracy of the result.

    Returns:
        For each rank r from the rank at ``lowest`` down to 1, the value at which the rank falls below r. The last one
        is :attr:`nclightning.problems.Problem.threshold`.

    Raises:
        ValueError: If ``lowest`` is not positive and below the threshold.
        NoAnswer: If an optimum during the search cannot be certified.

    Example:
        >>> from nclightning.problems import mse_without_bias, rank_thresholds
        >>> thresholds = rank_thresholds(mse_without_bias([9, 4], 2, 0.1, 0.1), lowest=1e-4)
        >>> {rank: round(value * 13**2, 4) for rank, value in thresholds.items()}
        {2: 4.0, 1: 9.0}
    """
    highest = problem.threshold
    if not 0 < lowest < highest:
        raise UserError(f"lowest must be positive and below the threshold {highest:.6g}, got {lowest!r}.")
    ranks: dict[float, int] = {}

    def rank(log_product: float) -> int:
        if log_product not in ranks:
            factor = math.sqrt(math.exp(log_product)) / problem.strength
            changed = problem.replace(lambda_w=problem.lambda_w * factor, lambda_h=problem.lambda_h * factor)
            ranks[log_product] = changed.convex_optimum.rank
        return ranks[log_product]

    found: dict[int, float] = {}
    top = math.log(highest) + 1e-9
    full = rank(math.log(lowest))
    for wanted in range(full, 0, -1):
        # The rank may fall by more than one. It is assumed never to rise.
        low = max((p for p, r in ranks.items() if r >= wanted), default=math.log(lowest))
        high = min((p for p, r in ranks.items() if r < wanted and p > low), default=top)
        while high - low > relative_accuracy:
            middle = (low + high) / 2
            low, high = (middle, high) if rank(middle) >= wanted else (low, middle)
        found[wanted] = math.exp((low + high) / 2)
    return found
