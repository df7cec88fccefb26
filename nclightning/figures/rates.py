"""Fit linear convergence to a recorded quantity."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["LEAST_R_SQUARED", "LinearFit", "fit_range", "fit_rate", "fit_straight"]

# A curve with a smaller R^2 is not called straight.
LEAST_R_SQUARED = 0.99
_LEAST_POINTS = 5
# A quantity that falls by less than a factor of three is taken to have settled, not to converge.
_LEAST_DECADES = 0.5


@dataclass(frozen=True)
class LinearFit:
    r"""Straight line fitted to :math:`\log_{10}` of a quantity against the iteration.

    Attributes:
        slope: Decades per iteration, negative when the quantity falls.
        intercept: log10 of the line at iteration 0.
        r_squared: Coefficient of determination.
        first: First iteration of the fitted range.
        last: Last iteration of the fitted range.

    Example:
        >>> from nclightning.figures import LinearFit
        >>> fit = LinearFit(slope=-0.02, intercept=1.0, r_squared=0.999, first=100, last=600)
        >>> fit.iterations_per_decade, fit.decades, round(fit.factor, 4)
        (50.0, 10.0, 0.955)
    """

    slope: float
    intercept: float
    r_squared: float
    first: int
    last: int

    @property
    def decades(self) -> float:
        """Decades by which the line falls over the fitted range."""
        return -self.slope * (self.last - self.first)

    @property
    def factor(self) -> float:
        """Contraction per iteration, ``10 ** slope``."""
        return float(10.0**self.slope)

    @property
    def iterations_per_decade(self) -> float:
        """Iterations that reduce the quantity by a factor of ten; infinite if it does not fall."""
        return -1.0 / self.slope if self.slope < 0 else math.inf


def fit_rate(iterations: NDArray[np.float64], values: NDArray[np.float64], decades: float = 15.0) -> LinearFit | None:
    """Fit the tail of a quantity that converges linearly to zero.

    The fitted range ends at the last reading, or where the round-off floor begins if the quantity has one. It covers at
    most ``decades`` decades, and at most three quarters of the decades by which the quantity fell in all, so that it
    excludes the transient.

    Args:
        iterations: ``(R,)``, increasing.
        values: ``(R,)``; values that are not positive and finite are left out.
        decades: Largest number of decades in the fitted range.

    Returns:
        The fit; None if fewer than five readings are in the range, or if the quantity does not fall.

    Example:
        >>> import numpy as np
        >>> from nclightning.figures import fit_rate
        >>> iterations = np.arange(0.0, 500.0, 10.0)
        >>> fit = fit_rate(iterations, 3 * 0.9**iterations)
        >>> round(fit.factor, 6), round(fit.iterations_per_decade, 2)
        (0.9, 21.85)
    """
    usable = np.isfinite(values) & (values > 0)
    x, y = iterations[usable], np.log10(values[usable])
    if len(x) < _LEAST_POINTS:
        return None
    end = _floor_start(x, y)
    fitted = _fit_tail(x[: end + 1], y[: end + 1], decades)
    if fitted is not None and end < len(x) - 1 and x[-1] - x[end] <= 3 * fitted.iterations_per_decade:
        # The last decade took no longer than the decades before it: what looked like a floor is still falling.
        fitted = _fit_tail(x, y, decades)
    return fitted


def fit_range(iterations: NDArray[np.float64], values: NDArray[np.float64], first: int, last: int) -> LinearFit | None:
    """Fit a line over a given range.

    Args:
        iterations: ``(R,)``, increasing.
        values: ``(R,)``; values that are not positive and finite are left out.
        first: First iteration of the range.
        last: Last iteration of the range.

    Returns:
        The fit; None if fewer than five readings are in the range, or if the quantity does not change there.
    """
    usable = np.isfinite(values) & (values > 0) & (iterations >= first) & (iterations <= last)
    return _fit_line(iterations[usable], np.log10(values[usable]))


def fit_straight(
    iterations: NDArray[np.float64],
    values: NDArray[np.float64],
    ending_at_most: float = math.inf,
    most_points: int = 800,
) -> LinearFit | None:
    """Find the longest stretch, in decades, over which a quantity falls along a straight line.

    A stretch counts as straight if the line has a coefficient of determination of at least ``LEAST_R_SQUARED`` (0.99)
    and falls by at least half a decade. If there are many readings, an evenly spaced selection of them is used.

    Args:
        iterations: ``(R,)``, increasing.
        values: ``(R,)``; values that are not positive and finite are left out.
        ending_at_most: Only stretches that end at or below this value are considered.
        most_points: Largest number of readings used; time and memory grow with its square.

    Returns:
        The fit; None if no stretch of five or more readings is straight.

    Example:
        >>> import numpy as np
        >>> from nclightning.figures import fit_straight
        >>> iterations = np.arange(0.0, 1000.0, 10.0)
        >>> fit = fit_straight(iterations, 0.9**iterations + 1e-12)
        >>> fit.r_squared >= 0.99, fit.first, fit.last < 400
        (True, 0, True)
    """
    usable = np.flatnonzero(np.isfinite(values) & (values > 0))
    if len(usable) > most_points:
        usable = usable[np.linspace(0, len(usable) - 1, most_points).round().astype(int)]
    x, y = iterations[usable], np.log10(values[usable])
    if len(x) < _LEAST_POINTS:
        return None
    slope, r_squared = _fit_all_stretches(x, y)
    rows = np.arange(len(x))
    allowed = (rows[:, None] + _LEAST_POINTS - 1 <= rows) & (slope < 0) & (r_squared >= LEAST_R_SQUARED)
    allowed &= values[usable] <= ending_at_most
    decades = np.where(allowed, -slope * (x - x[:, None]), 0.0)
    first, last = np.unravel_index(decades.argmax(), decades.shape)
    return _fit_line(x[first : last + 1], y[first : last + 1]) if decades[first, last] >= _LEAST_DECADES else None


def _fit_all_stretches(
    x: NDArray[np.float64], y: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return slope and R^2 of the line fitted to readings i to j, each ``(R, R)``; zero where no line is determined."""
    x, y = x - x.mean(), y - y.mean()

    def sums(z: NDArray[np.float64]) -> NDArray[np.float64]:
        up_to: NDArray[np.float64] = np.concatenate([[0.0], np.cumsum(z)])
        return up_to[1:] - up_to[:-1, None]

    rows = np.arange(len(x))
    count = np.maximum(rows - rows[:, None] + 1.0, 1.0)
    sum_x, sum_y = sums(x), sums(y)
    xx, xy, yy = sums(x * x) - sum_x**2 / count, sums(x * y) - sum_x * sum_y / count, sums(y * y) - sum_y**2 / count
    slope = np.divide(xy, xx, out=np.zeros_like(xy), where=xx > 0)
    return slope, np.divide(slope * xy, yy, out=np.zeros_like(xy), where=yy > 0)


def _floor_start(x: NDArray[np.float64], y: NDArray[np.float64]) -> int:
    """Return the index of the first reading within one decade of the smallest one."""
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
    return LinearFit(float(slope), float(intercept), float(1 - residual / total), int(x[0]), int(x[-1]))
