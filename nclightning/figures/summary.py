"""Last values and fitted rates of a run."""

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
        last: Last value of each recorded quantity, by tag.
        fits: Fitted line of each recorded quantity, by tag; None if the quantity did not converge linearly.
        kappa: Measured error-bound constant: the largest distance / gradient norm over the range in which the distance
            was fitted; None if there is no such range.
        predicted: Line fitted to the decay that the theory predicts, over the range in which the gap was fitted; None
            if there is no prediction or no such range.

    Example:
        >>> import numpy as np
        >>> from nclightning.figures import Readings, summarize
        >>> iterations = np.arange(0.0, 100.0, 5.0)
        >>> summary = summarize(Readings(iterations, {"optimality/gap": 10.0 ** (-iterations / 10)}))
        >>> summary.iteration, round(summary.fits["optimality/gap"].iterations_per_decade, 6)
        (95, 10.0)
    """

    iteration: int
    last: dict[str, float]
    fits: dict[str, LinearFit | None]
    kappa: float | None
    predicted: LinearFit | None = None


def summarize(readings: Readings, fit: Fit = fit_rate) -> RunSummary:
    """Fit a rate to each quantity of a run that converges to zero at collapse or at the optimum.

    Args:
        readings: The readings of a run.
        fit: Function from iterations and values to a line or None: :func:`fit_rate` fits the tail,
            :func:`fit_straight` the longest straight stretch.

    Returns:
        The summary.

    Example:
        >>> import numpy as np
        >>> from nclightning.figures import Readings, summarize
        >>> iterations = np.arange(0.0, 100.0, 5.0)
        >>> readings = Readings(iterations, {"nc/train/nc1": 0.8**iterations})
        >>> round(summarize(readings).fits["nc/train/nc1"].factor, 6)
        0.8
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
    """Scale the predicted decay so that it meets the fitted line of the gap at the middle of the line.

    The theory predicts the decay up to a constant factor.

    Args:
        readings: The readings of a run.
        summary: The summary of the same run.

    Returns:
        Iterations, beginning with the first one of the fitted line, and the scaled values; None if there is no
        prediction or no fitted line.
    """
    predicted, gap = summary.predicted, summary.fits.get(GAP.tag())
    if predicted is None or gap is None:
        return None
    middle = (gap.first + gap.last) / 2
    shift = gap.intercept - predicted.intercept + (gap.slope - predicted.slope) * middle
    inside = (readings.iterations >= gap.first) & np.isfinite(readings.values[PREDICTED_DECAY.tag()])
    return readings.iterations[inside], readings.values[PREDICTED_DECAY.tag()][inside] * 10.0**shift
