r"""Rates of gradient descent near the optimal set that follow from the spectrum.

Near the set the deviation of the iterates splits into modes; at a fixed step t the mode of eigenvalue :math:`\lambda`
is multiplied by :math:`1 - t\lambda` per iteration, under gradient flow by :math:`e^{-\lambda}` per unit of time.
Legend in :mod:`nclightning.theory.problem`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from nclightning.theory.spectrum import spectrum

if TYPE_CHECKING:
    from nclightning.theory.constants import UFMConstants

__all__ = ["DecayRates", "check_step", "decay_factors", "decay_rates", "per_decade"]

# Modes whose product a quantity decays with; several where it is not clear which has the larger amplitude.
_Products = tuple[tuple[float, ...], ...]
_SCALE = "symmetric, scale"


class DecayRates(NamedTuple):
    """How fast what converges to zero does: exponents per unit of time, or factors per iteration.

    Attributes:
        gap: Of F - F*.
        distance: To the optimal set.
        nc1: Of NC1. Heuristic like the other two; ``nan`` where the quantity is not defined or does not vanish.
        nc2: Of NC2 of the head.
        nc3: Of NC3.
    """

    gap: float
    distance: float
    nc1: float
    nc2: float
    nc3: float


def decay_rates(problem: UFMConstants, mu: float) -> DecayRates:
    """Exponents under gradient flow: the least sum of eigenvalues over the products that may lead."""
    metrics = (min((sum(modes) for modes in products), default=math.nan) for products in _leading(problem))
    return DecayRates(2 * mu, mu, *metrics)


def decay_factors(problem: UFMConstants, step: float, contraction: float) -> DecayRates:
    """Factors per iteration at a fixed step: the largest product over those that may lead."""
    metrics = (
        max((math.prod(abs(1 - step * value) for value in modes) for modes in products), default=math.nan)
        for products in _leading(problem)
    )
    return DecayRates(contraction**2, contraction, *metrics)


def per_decade(mu: float, smoothness: float, step: float) -> float:
    """Iterations for a factor of ten of the gap; infinite where it does not fall."""
    rate = 2 * min(_exponent(step * mu), _exponent(step * smoothness))
    return math.log(10) / rate if rate > 0 else math.inf  # At the threshold, and from a step of 2/L on.


def check_step(step: float) -> None:
    """Raise unless a step is positive and finite."""
    if not (math.isfinite(step) and step > 0):
        raise ValueError(f"step must be positive and finite, got {step!r}. The best one is best_step.")


def _leading(problem: UFMConstants) -> tuple[_Products, _Products, _Products]:
    """Candidates for NC1, NC2 and NC3.

    NC1 is quadratic in the deviations within classes along the range of the means. NC2 and NC3 are of first order in
    the symmetric deviations of the means and in the head's mean within the range, and do not see the overall scale.
    Where the slow modes of other sectors are slower than half of that, their squares and products lead: measured for
    the mean of the features with the bias (MSE), and for the head's mean outside the range in NC2.
    """
    if not problem.collapses or problem.rank < problem.num_classes - 1:
        within = _within(problem) if problem.collapses else ()
        return within, (), ()
    K, lw, lh = problem.num_classes, problem.lambda_w, problem.lambda_h
    least = _least(problem)
    second: list[tuple[float, ...]] = [(least["mean of the head, in range"],)]
    if K > 2:
        second += [(value,) for sector, value in least.items() if sector.startswith("symmetric") and sector != _SCALE]
    third = list(second)
    if problem.loss == "mse":
        if K > 2:
            slow = least["mean of the features with bias"]
            second, third = [*second, (slow, slow)], [*third, (slow, slow)]
        if problem.feature_dim > problem.rank:
            second.append((lw, lw))
            if K == 2:
                third.append((lw, lw, lh))
    return _within(problem), tuple(second), tuple(third)


def _within(problem: UFMConstants) -> _Products:
    if problem.samples_per_class == 1:
        return ()
    least = _least(problem)
    slowest = min(v for sector, v in least.items() if sector.startswith("within-class, in range"))
    products: _Products = ((slowest, slowest),)
    if problem.loss == "mse" and problem.num_classes > 2 and problem.feature_dim > problem.rank:
        tilted = (problem.lambda_h, problem.lambda_h, least["mean of the features with bias"])
        products = (*products, tilted + tilted)
    return products


def _least(problem: UFMConstants) -> dict[str, float]:
    """Least nonzero eigenvalue by sector."""
    return {e.sector: e.value for e in reversed(spectrum(problem)) if e.value > 0}


def _exponent(x: float) -> float:
    """``-log |1 - x|``, with the digits of a small x."""
    if x == 1:
        return math.inf
    return -math.log1p(-x) if x < 1 else -math.log(x - 1)
