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

__all__ = ["DecayRates", "decay_factors", "decay_rates"]

# Modes whose product a quantity decays with; several where it is not clear which has the larger amplitude.
_Products = tuple[tuple[float, ...], ...]
_SCALE = "symmetric, scale"
# The sector of the mean feature within the range.
_FEATURES_MSE = "mean of the features with bias"
_FEATURES_CE, _FEATURES_CE_TWO = "symmetric with mean of the features", "mean of the features, in range"


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


def _leading(problem: UFMConstants) -> tuple[_Products, _Products, _Products]:
    """Candidates for NC1, NC2 and NC3.

    NC2 and NC3 are of first order in the symmetric deviations of the means and in the mean row of the head within the
    range, and do not see the overall scale. With three classes or more the product of two deviations of the mean
    feature (MSE) drives a symmetric one. Outside the range, the mean row of the head is seen squared by NC2, and by
    both through the class means that tilt towards it. Under cross-entropy those are never the slowest: the mean row
    decays with ``lambda_w`` within the range as well.
    """
    if not problem.collapses or problem.rank < problem.num_classes - 1:
        within = _within(problem) if problem.collapses else ()
        return within, (), ()
    least = _least(problem)
    first: list[tuple[float, ...]] = [(least["mean of the head, in range"],)]
    if problem.num_classes > 2:
        first += [(value,) for sector, value in least.items() if sector.startswith("symmetric") and sector != _SCALE]
    if problem.loss == "ce":
        return _within(problem), tuple(first), tuple(first)
    # The mean feature times itself; with two classes, where that is symmetric in nothing, times the mean bias.
    first.append((least[_FEATURES_MSE], least[_FEATURES_MSE] if problem.num_classes > 2 else least["bias"]))
    if problem.feature_dim == problem.rank:
        return _within(problem), tuple(first), tuple(first)
    third = (*first, *((problem.lambda_w, *tilt) for tilt in _tilts(problem)))
    return _within(problem), (*third, (problem.lambda_w,) * 2), third


def _within(problem: UFMConstants) -> _Products:
    """Candidates for NC1: it is quadratic in the deviations within classes along the range of the class means.

    Deviations orthogonal to the range decay with ``lambda_h``, the slowest of all, and are seen as far as the range
    tilts towards them.
    """
    if problem.samples_per_class == 1:
        return ()
    in_range = min(v for sector, v in _least(problem).items() if sector.startswith("within-class, in range"))
    seen: _Products = ((in_range,),)
    if problem.feature_dim > problem.rank:
        seen = (*seen, *((problem.lambda_h, *tilt) for tilt in _tilts(problem)))
    return tuple(modes + modes for modes in seen)


def _tilts(problem: UFMConstants) -> _Products:
    """What tilts the range of the class means against that of the head.

    Of first order, the mode that turns one against the other. Of second order, the mean feature outside the range
    times a deviation of the residual's mean, which the gradient of the head multiplies; and for MSE the mean row of
    the head outside the range times that within, which the gradient of the features multiplies.
    """
    least, lw, lh = _least(problem), problem.lambda_w, problem.lambda_h
    products: _Products = ((least["means, orthogonal"],),)
    if problem.loss == "mse":
        return (*products, (lh, least[_FEATURES_MSE]), (lw, least["mean of the head, in range"]))
    return (*products, (lh, least[_FEATURES_CE_TWO if problem.num_classes == 2 else _FEATURES_CE]))


def _least(problem: UFMConstants) -> dict[str, float]:
    """Least nonzero eigenvalue by sector."""
    return {e.sector: e.value for e in reversed(spectrum(problem)) if e.value > 0}
