r"""Rates of gradient descent near the optimal set, from the spectrum.

Near the set the deviation of the iterates splits into modes. The mode of eigenvalue :math:`\lambda` is multiplied by
:math:`1 - t\lambda` per iteration at a fixed step t, and by :math:`e^{-\lambda}` per unit of time under gradient flow.
Legend in :mod:`nclightning.theory.problem`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from nclightning.theory.spectrum import spectrum

if TYPE_CHECKING:
    from nclightning.theory.constants import UFMConstants

__all__ = ["DecayRates", "decay_factors", "decay_rates"]

# Products of modes, each given by the eigenvalues of its factors. A quantity decays like the slowest of them.
_Products = tuple[tuple[float, ...], ...]
_SCALE = "symmetric, scale"
# Names of the sector that contains the mean feature within the range.
_FEATURES_MSE = "mean of the features with bias"
_FEATURES_CE, _FEATURES_CE_TWO = "symmetric with mean of the features", "mean of the features, in range"


class DecayRates(NamedTuple):
    """Decay of the quantities that converge to zero: exponents per unit of time, or factors per iteration.

    Attributes:
        gap: Decay of F - F*.
        distance: Decay of the distance to the optimal set.
        nc1: Decay of NC1. Heuristic, like the next two; ``nan`` where NC1 is not defined or does not tend to zero.
        nc2: Decay of NC2 of the head.
        nc3: Decay of NC3.
    """

    gap: float
    distance: float
    nc1: float
    nc2: float
    nc3: float


def decay_rates(problem: UFMConstants, mu: float) -> DecayRates:
    """Compute the exponents under gradient flow: the least sum of eigenvalues over the candidate products."""
    metrics = (min((sum(modes) for modes in products), default=math.nan) for products in _leading(problem))
    return DecayRates(2 * mu, mu, *metrics)


def decay_factors(problem: UFMConstants, step: float, contraction: float) -> DecayRates:
    """Compute the factors per iteration at a fixed step: the largest factor over the candidate products."""
    metrics = (
        max((math.prod(abs(1 - step * value) for value in modes) for modes in products), default=math.nan)
        for products in _leading(problem)
    )
    return DecayRates(contraction**2, contraction, *metrics)


def _leading(problem: UFMConstants) -> tuple[_Products, _Products, _Products]:
    """Return the products of modes that may dominate NC1, NC2 and NC3.

    NC2 and NC3 are of first order in the symmetric deviations of the means and in the mean row of the head within the
    range. They do not depend on the overall scale. With three classes or more, the product of two deviations of the
    mean feature (MSE) drives a symmetric deviation. Outside the range, the mean row of the head enters NC2 squared, and
    enters both through class means that tilt towards it. Under cross-entropy these products are never the slowest,
    since the mean row decays with ``lambda_w`` within the range as well.
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
    # The mean feature times itself. With two classes this has no symmetric part; there it is times the mean bias.
    first.append((least[_FEATURES_MSE], least[_FEATURES_MSE] if problem.num_classes > 2 else least["bias"]))
    if problem.feature_dim == problem.rank:
        return _within(problem), tuple(first), tuple(first)
    third = (*first, *((problem.lambda_w, *tilt) for tilt in _tilts(problem)))
    return _within(problem), (*third, (problem.lambda_w,) * 2), third


def _within(problem: UFMConstants) -> _Products:
    """Return the products of modes that may dominate NC1.

    NC1 is quadratic in the deviations within classes along the range of the class means. Deviations orthogonal to the
    range decay with ``lambda_h``, the slowest rate of all. They enter only multiplied by the tilt of the range towards
    them.
    """
    if problem.samples_per_class == 1:
        return ()
    in_range = min(v for sector, v in _least(problem).items() if sector.startswith("within-class, in range"))
    seen: _Products = ((in_range,),)
    if problem.feature_dim > problem.rank:
        seen = (*seen, *((problem.lambda_h, *tilt) for tilt in _tilts(problem)))
    return tuple(modes + modes for modes in seen)


def _tilts(problem: UFMConstants) -> _Products:
    """Return the products of modes that tilt the range of the class means against that of the head.

    Of first order, this is the mode that rotates one range against the other. Of second order, it is the mean feature
    outside the range times a deviation of the mean residual, a product in the gradient of the head; and for MSE the
    mean row of the head outside the range times that within, a product in the gradient of the features.
    """
    least, lw, lh = _least(problem), problem.lambda_w, problem.lambda_h
    products: _Products = ((least["means, orthogonal"],),)
    if problem.loss == "mse":
        return (*products, (lh, least[_FEATURES_MSE]), (lw, least["mean of the head, in range"]))
    return (*products, (lh, least[_FEATURES_CE_TWO if problem.num_classes == 2 else _FEATURES_CE]))


def _least(problem: UFMConstants) -> dict[str, float]:
    """Return the least nonzero eigenvalue of each sector."""
    return {e.sector: e.value for e in reversed(spectrum(problem)) if e.value > 0}
