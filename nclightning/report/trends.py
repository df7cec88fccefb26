"""What a recorded curve does at its end, decided by rules that a reader can check."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from nclightning.figures.rates import LEAST_R_SQUARED, LinearFit, fit_range

__all__ = ["LEAST_READINGS", "Trend", "trend_of"]

Array = NDArray[np.float64]
Kind = Literal["none", "few", "at zero", "negative", "falling", "slowing", "flat", "oscillating", "rising", "unclear"]

LEAST_READINGS = 5
# In decades. A tenth of a decade is a factor of 1.26.
_MOST_OF_FLAT = 0.05  # How far the line through a flat end may rise or fall.
_SCATTER_OF_FLAT = 0.3  # From the least to the greatest value of a flat end: a factor of two.
_LEAST_SWING = 0.3  # Of an oscillation around its line.
_LEAST_CROSSINGS = 6  # Of the line by an oscillation: three periods.
# 1/t has 0.58 on its last two thirds, a straight line 1.
_SAME_SLOPE = 0.8
# A straight line that falls by less than a flat end may is falling all the same. Tables of float32 round at 3e-8
# decades. A line that also slows may end at a floor, so that more is asked of it: 1.2 percent.
_LEAST_FALL, _LEAST_SLOWING_FALL = 1e-6, 0.005


@dataclass(frozen=True)
class Trend:
    """The end of a curve on a log axis.

    Attributes:
        kind: ``"none"`` without a finite value; ``"few"`` with fewer than five readings; ``"at zero"`` and
            ``"negative"`` by the last value; ``"falling"`` along a straight line; ``"slowing"``, a straight line whose
            slope is less than 0.8 of the slope before; ``"flat"``, ``"oscillating"``, ``"rising"``; ``"unclear"`` for
            what is none of these.
        last: The last finite value; nan without one.
        at: Its iteration; -1 without one.
        number: How many finite values there are.
        line: Through the last third of the iterations; None with fewer than five positive values there.
        low: Least value there.
        high: Greatest value there.
    """

    kind: Kind
    last: float
    at: int
    number: int
    line: LinearFit | None = None
    low: float = math.nan
    high: float = math.nan

    def iterations_to(self, target: float) -> float:
        """Continue the line from its end to a value.

        Args:
            target: Positive.

        Returns:
            Iterations; infinite where the line does not fall, 0 where it is there already.
        """
        if self.line is None or self.line.slope >= 0:
            return math.inf
        end = self.line.intercept + self.line.slope * self.line.last
        return max(0.0, (math.log10(target) - end) / self.line.slope)


def trend_of(iterations: Array, values: Array) -> Trend:
    """Say what a curve does over the last third of its iterations.

    Args:
        iterations: ``(R,)``, increasing.
        values: ``(R,)``; those that are not finite are left out.

    Returns:
        The trend, by the first rule that holds.
    """
    finite = np.isfinite(values)
    x, y = iterations[finite], values[finite]
    if not len(x):
        return Trend("none", math.nan, -1, 0)
    last, at, number = float(y[-1]), int(x[-1]), len(x)
    if last <= 0:
        return Trend("at zero" if last == 0 else "negative", last, at, number)
    positive = y > 0
    x, y = x[positive], y[positive]
    if len(x) < LEAST_READINGS:
        return Trend("few", last, at, number)
    # With few readings, or readings at powers of two, the last third may hold fewer than five.
    begin = min(float(x[-1] - (x[-1] - x[0]) / 3), float(x[-LEAST_READINGS]))
    inside = x >= begin
    tail, logs = x[inside], np.log10(y[inside])
    low, high = float(y[inside].min()), float(y[inside].max())
    line = fit_range(x, y, int(tail[0]), int(tail[-1]))
    if line is None:  # All values are the same.
        return Trend("flat", last, at, number, None, low, high)
    return Trend(_kind(x, y, tail, logs, line), last, at, number, line, low, high)


def _kind(x: Array, y: Array, tail: Array, logs: Array, line: LinearFit) -> Kind:
    change = line.slope * (line.last - line.first)
    residuals = logs - line.intercept - line.slope * tail
    swing = float(np.ptp(residuals))
    is_flat = abs(change) < _MOST_OF_FLAT and bool(np.ptp(logs) < _SCATTER_OF_FLAT)
    if line.r_squared >= LEAST_R_SQUARED and change < 0:
        earlier, later = _slopes(x, np.log10(y), line)
        slows = later > _SAME_SLOPE * earlier
        if not is_flat or -change >= (_LEAST_SLOWING_FALL if slows else _LEAST_FALL):
            return "slowing" if slows else "falling"
    if is_flat:
        return "flat"
    if line.r_squared >= LEAST_R_SQUARED:
        return "rising"
    crossings = int(np.count_nonzero(np.diff(np.sign(residuals))))
    if swing >= _LEAST_SWING and crossings >= _LEAST_CROSSINGS and abs(change) < swing:
        return "oscillating"
    return "rising" if change >= _SCATTER_OF_FLAT else "unclear"


def _slopes(x: Array, logs: Array, line: LinearFit) -> tuple[float, float]:
    """Slope on the third before the last one, and on the last; of its halves where nothing was read before."""
    before = (x >= 2 * line.first - line.last) & (x <= line.first)
    if np.count_nonzero(before) > 1:
        return _slope(x[before], logs[before]), line.slope
    tail = x >= line.first
    x, logs, half = x[tail], logs[tail], np.count_nonzero(tail) // 2
    return _slope(x[: half + 1], logs[: half + 1]), _slope(x[half:], logs[half:])


def _slope(x: Array, logs: Array) -> float:
    return float(np.polyfit(x, logs, 1)[0])
