"""What a run reached, in numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nclightning.figures.rates import LinearFit, fit_range, fit_rate
from nclightning.figures.readings import Array, Readings
from nclightning.quantities import CONVERGING, DISTANCE, ERROR_BOUND_RATIO, GAP, PREDICTED_DECAY

__all__ = ["RunSummary", "predicted_gap", "summarize"]

Fit = Callable[[Array, Array], LinearFit | None]


@dataclass(frozen=True)
class RunSummary:
    """Last values and fitted rates of a run.

    Attributes:
        iteration: The last iteration.
        last: Value by tag there, for the quantities that were recorded.
        fits: Line by tag; None where a quantity did not fall along one.
        kappa: Largest distance / gradient norm over the fitted range of the distance, the measured error-bound
            constant; None without such a range.
        predicted: Line of the decay that the theory predicts, over the fitted range of the gap; None without either.
    """

    iteration: int
    last: dict[str, float]
    fits: dict[str, LinearFit | None]
    kappa: float | None
    predicted: LinearFit | None = None


def summarize(readings: Readings, fit: Fit = fit_rate) -> RunSummary:
    """Fit what converges.

    Args:
        readings: Of a run.
        fit: From iterations and values to a line, or None: :func:`fit_rate`, the tail, or :func:`fit_straight`.

    Returns:
        The summary.
    """
    recorded = [tag for tag in CONVERGING if tag in readings.values]
    fits = {tag: fit(readings.iterations, readings.values[tag]) for tag in recorded}
    kappa, tail = None, fits.get(DISTANCE.tag())
    ratio = readings.values.get(ERROR_BOUND_RATIO.tag())
    if tail is not None and ratio is not None:
        inside = (readings.iterations >= tail.first) & (readings.iterations <= tail.last) & np.isfinite(ratio)
        kappa = float(ratio[inside].max()) if inside.any() else None
    predicted, gap = readings.values.get(PREDICTED_DECAY.tag()), fits.get(GAP.tag())
    return RunSummary(
        iteration=int(readings.iterations[-1]),
        last={tag: float(readings.values[tag][-1]) for tag in recorded},
        fits=fits,
        kappa=kappa,
        predicted=None
        if predicted is None or gap is None
        else fit_range(readings.iterations, predicted, gap.first, gap.last),
    )


def predicted_gap(readings: Readings, summary: RunSummary) -> tuple[Array, Array] | None:
    """Shift the predicted decay, which knows no scale, to the middle of the fitted line of the gap.

    Args:
        readings: Of a run.
        summary: Of the same.

    Returns:
        Iterations from the first of that line on, and values; None without a prediction or a line.
    """
    predicted, gap = summary.predicted, summary.fits.get(GAP.tag())
    if predicted is None or gap is None:
        return None
    middle = (gap.first + gap.last) / 2
    shift = gap.intercept - predicted.intercept + (gap.slope - predicted.slope) * middle
    inside = (readings.iterations >= gap.first) & np.isfinite(readings.values[PREDICTED_DECAY.tag()])
    return readings.iterations[inside], readings.values[PREDICTED_DECAY.tag()][inside] * 10.0**shift
