"""Statistics of features as states of a metric."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

from nclightning.functional import ClassStatistics
from nclightning.functional.moments import Moments
from nclightning.functional.samples import Samples

__all__ = ["states_of", "statistics_of"]


def states_of(stats: ClassStatistics) -> dict[str, Any]:
    """Return states by name; samples that are kept are features and labels in turn."""
    totals = {name: value for name, value in stats.totals._asdict().items() if value is not None}
    kept = [each for piece in zip(stats.kept.features, stats.kept.labels, strict=True) for each in piece]
    return totals | {"num_invalid": stats.num_invalid, "kept": kept}


def statistics_of(states: Mapping[str, Any]) -> ClassStatistics:
    """Make statistics that share the states, which are replaced and never written to.

    Args:
        states: As :func:`states_of` returns them; or stacked over processes, whose statistics are merged.
    """
    if states["means"].ndim == 2:
        totals: dict[str, Any] = {name: states.get(name) for name in Moments._fields}
        kept = states.get("kept", ())
        return ClassStatistics(Moments(**totals), states["num_invalid"], Samples(tuple(kept[::2]), tuple(kept[1::2])))
    ranks = range(len(states["means"]))
    parts = ({name: state[rank] for name, state in states.items() if name != "kept"} for rank in ranks)
    return reduce(ClassStatistics.merge, map(statistics_of, parts))
