"""What a run reached, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nclightning.figures.rates import LinearFit, fit_between, fit_rate
from nclightning.figures.readings import Readings

__all__ = ["QUANTITIES", "RunSummary", "summarize"]

# Tag and label of what converges to zero, in the order of every table and legend.
QUANTITIES = {
    "optimality/gap": "gap F - F*",
    "optimality/distance": "distance",
    "optimality/grad_norm": "gradient norm",
    "nc/train/nc1": "NC1",
    "nc/train/nc2": "NC2",
    "nc/train/nc3": "NC3",
}


@dataclass(frozen=True)
class RunSummary:
    """Last values and fitted rates of a run.

    Attributes:
        iteration: The last iteration.
        last: Value by tag there, for the quantities that were recorded.
        fits: Linear fit by tag; None where a quantity did not converge.
        kappa: Largest distance / gradient norm over the fitted range of the distance, the measured error-bound
            constant; None without such a range.
    """

    iteration: int
    last: dict[str, float]
    fits: dict[str, LinearFit | None]
    kappa: float | None


def summarize(readings: Readings, metrics_between: tuple[float, float] | None = None) -> RunSummary:
    """Fit what converges.

    Args:
        readings: Of a run.
        metrics_between: Fit NC1-NC3 between these values, the upper one first; None fits their tails, as it does for
            all else.

    Returns:
        The summary.
    """
    recorded = [tag for tag in QUANTITIES if tag in readings.values]
    fits = {tag: fit_rate(readings.iterations, readings.values[tag]) for tag in recorded}
    if metrics_between is not None:
        for tag in (tag for tag in recorded if tag.startswith("nc/")):
            fits[tag] = fit_between(readings.iterations, readings.values[tag], *metrics_between)
    kappa, tail = None, fits.get("optimality/distance")
    ratio = readings.values.get("optimality/error_bound_ratio")
    if tail is not None and ratio is not None:
        inside = (readings.iterations >= tail.first) & (readings.iterations <= tail.last) & np.isfinite(ratio)
        kappa = float(ratio[inside].max()) if inside.any() else None
    return RunSummary(
        iteration=int(readings.iterations[-1]),
        last={tag: float(readings.values[tag][-1]) for tag in recorded},
        fits=fits,
        kappa=kappa,
    )
