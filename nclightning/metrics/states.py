"""Conversion between class statistics and the states of a metric."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

from nclightning.functional import ClassStatistics
from nclightning.functional.moments import Moments
from nclightning.functional.samples import Samples

__all__ = ["states_of", "statistics_of"]


def states_of(stats: ClassStatistics) -> dict[str, Any]:
    """Return states by name. The state ``kept`` is a list in which features and labels alternate."""
    totals = {name: value for name, value in stats.totals._asdict().items() if value is not None}
    kept = [each for piece in zip(stats.kept.features, stats.kept.labels, strict=True) for each in piece]
    return totals | {"num_invalid": stats.num_invalid, "kept": kept}


def statistics_of(states: Mapping[str, Any]) -> ClassStatistics:
    """Make statistics from states. Tensors are shared: states are replaced and never modified in place.

    Args:
        states: Result of :func:`states_of`. States that are stacked over processes are merged.
    """
    if states["means"].ndim == 2:
        totals: dict[str, Any] = {name: states.get(name) for name in Moments._fields}
        kept = states.get("kept", ())
        return ClassStatistics(Moments(**totals), states["num_invalid"], Samples(tuple(kept[::2]), tuple(kept[1::2])))
    ranks = range(len(states["means"]))
    parts = ({name: state[rank] for name, state in states.items() if name != "kept"} for rank in ranks)
    return reduce(ClassStatistics.merge, map(statistics_of, parts))
