"""Fit linear convergence to a recorded quantity."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["LEAST_R_SQUARED", "LinearFit", "fit_between", "fit_rate"]

# Below this a curve is not called straight.
LEAST_R_SQUARED = 0.99
_LEAST_POINTS = 5


@dataclass(frozen=True)
class LinearFit:
    r"""Straight line through :math:`\log_{10}` of a quantity against the iteration.

    Attributes:
        slope: Decades per iteration, negative when the quantity falls.
        intercept: log10 of the line at iteration 0.
        r_squared: Coefficient of determination.
        first: First iteration of the fitted range.
        last: Last iteration of the fitted range.
        decades: How far the quantity fell over that range.
    """

    slope: float
    intercept: float
    r_squared: float
    first: int
    last: int
    decades: float

    def is_straight(self, decades: float = 0.0) -> bool:
        """Whether the quantity fell along a straight line over at least so many decades."""
        return self.r_squared >= LEAST_R_SQUARED and self.decades >= decades

    @property
    def factor(self) -> float:
        """Contraction per iteration, ``10 ** slope``."""
        return float(10.0**self.slope)

    @property
    def iterations_per_decade(self) -> float:
        """Iterations for a factor of ten; infinite when the quantity does not fall."""
        return -1.0 / self.slope if self.slope < 0 else math.inf


def fit_rate(iterations: NDArray[np.float64], values: NDArray[np.float64], decades: float = 15.0) -> LinearFit | None:
    """Fit the tail of a quantity that converges linearly to zero.

    The range ends at the last reading, or where the round-off floor begins if the quantity has one; it reaches back
    over at most ``decades`` decades and at most three quarters of those that the quantity fell in all, so that the
    transient stays out.

    Args:
        iterations: ``(R,)``, increasing.
        values: ``(R,)``; values that are not positive and finite are left out.
        decades: Longest range.

    Returns:
        The fit, or None with fewer than five readings in the range or no fall at all.
    """
    usable = np.isfinite(values) & (values > 0)
    x, y = iterations[usable], np.log10(values[usable])
    if len(x) < _LEAST_POINTS:
        return None
    end = _floor_start(x, y)
    fitted = _fit_tail(x[: end + 1], y[: end + 1], decades)
    if fitted is not None and end < len(x) - 1 and x[-1] - x[end] <= 3 * fitted.iterations_per_decade:
        # The last decade took no longer than the ones before: the quantity was falling to the end.
        fitted = _fit_tail(x, y, decades)
    return fitted


def fit_between(
    iterations: NDArray[np.float64], values: NDArray[np.float64], upper: float, lower: float
) -> LinearFit | None:
    """Fit a quantity on its way from one value down to another.

    Args:
        iterations: ``(R,)``, increasing.
        values: ``(R,)``; values that are not positive and finite are left out.
        upper: The range starts after the last reading above it.
        lower: The range ends with the first reading at or below it, or with the last if there is none.

    Returns:
        The fit, or None with fewer than five readings in the range or no fall at all.
    """
    usable = np.isfinite(values) & (values > 0)
    x, y = iterations[usable], np.log10(values[usable])
    above, below = np.flatnonzero(y > math.log10(upper)), np.flatnonzero(y <= math.log10(lower))
    end = int(below[0]) + 1 if len(below) else len(y)
    start = int(above[above < end][-1]) + 1 if (above < end).any() else 0
    return _fit_line(x[start:end], y[start:end])


def _floor_start(x: NDArray[np.float64], y: NDArray[np.float64]) -> int:
    """Index of the first reading within one decade of the smallest."""
    return int(np.argmax(y <= y.min() + 1.0))


def _fit_tail(x: NDArray[np.float64], y: NDArray[np.float64], decades: float) -> LinearFit | None:
    span = min(decades, 0.75 * (y.max() - y[-1]))
    above = np.flatnonzero(y > y[-1] + span)
    start = int(above[-1]) + 1 if len(above) else 0
    return _fit_line(x[start:], y[start:])


def _fit_line(x: NDArray[np.float64], y: NDArray[np.float64]) -> LinearFit | None:
    if len(x) < _LEAST_POINTS or y.min() == y.max():
        return None
    slope, intercept = np.polyfit(x, y, 1)
    residual = np.sum((y - slope * x - intercept) ** 2)
    total = np.sum((y - y.mean()) ** 2)
    return LinearFit(
        float(slope), float(intercept), float(1 - residual / total), int(x[0]), int(x[-1]), float(y[0] - y[-1])
    )
