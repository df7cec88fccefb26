"""The charts of a report: which curves share one, on which axis, and which points of long curves are kept."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nclightning.figures.summary import predicted_gap
from nclightning.quantities import PREDICTED_DECAY
from nclightning.report.quantities import is_log, label_of, panel_of
from nclightning.report.recorded import Record

__all__ = ["charts_of", "thin"]

Array = NDArray[np.float64]
# Of all curves together: about a megabyte of text, which a browser draws within seconds.
_MOST_POINTS = 60_000
_LEAST_OF_A_CURVE, _MOST_OF_A_CURVE = 200, 2000
_LOG_FROM = 100  # On less than two decades a log axis may have no tick.
_ALWAYS_LOG = ("Optimality", "Neural collapse")
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f6fbf", "#8c8c3f")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")


def charts_of(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Lay out all charts.

    One run has a chart for each panel, with a curve for each quantity. Several runs have a chart for each quantity,
    with a curve for each run, so that like is compared with like.

    Args:
        records: Those without curves are passed over.

    Returns:
        For each chart ``title``, ``log`` (whether the ordinate is), ``x`` (title of the abscissa), ``notes``, and
        ``curves`` with ``run`` (number of the record), ``name``, ``color``, ``dash``, ``x`` and ``y``.
    """
    drawn = [(i, record) for i, record in enumerate(records) if record.run is not None]
    tags = dict.fromkeys(tag for _, r in drawn if r.run is not None for tag in r.run.readings.values if panel_of(tag))
    charts: dict[str, list[tuple[int, str]]] = {}
    axes: dict[str, bool | None] = {}
    for tag in tags:
        title, axis = panel_of(tag), is_log(tag)
        # A count does not share the axis of what falls over decades.
        if len(drawn) > 1 or axes.setdefault(title, axis) != axis:
            title = label_of(tag)
        for i, record in drawn:
            assert record.run is not None
            if tag in record.run.readings.values and (len(drawn) == 1 or tag != PREDICTED_DECAY.tag()):
                charts.setdefault(title, []).append((i, tag))
    number = sum(map(len, charts.values()))
    most = int(np.clip(_MOST_POINTS // max(number, 1), _LEAST_OF_A_CURVE, _MOST_OF_A_CURVE))
    unit = " or ".join(sorted({"iteration" if record.has_iterations else "step" for _, record in drawn}))
    order = sorted(charts, key=lambda title: _place(panel_of(charts[title][0][1])))
    return [chart for t in order if (chart := _chart(t, charts[t], records, most, unit, len(drawn) == 1))["curves"]]


def _place(panel: str) -> int:
    known = ("Optimality", "Neural collapse", "Error bound")
    return next((i for i, each in enumerate(known) if panel.startswith(each)), len(known))


def _chart(
    title: str, members: Sequence[tuple[int, str]], records: Sequence[Record], most: int, unit: str, single: bool
) -> dict[str, Any]:
    curves = []
    for i, tag in members:
        x, y = _curve_of(records[i], tag)
        finite = np.isfinite(y)  # Rows of another cadence have no value, and would tear the curve.
        curves.append((i, tag, x[finite], y[finite]))
    wanted = {is_log(tag) for _, tag in members} - {None}
    values = np.concatenate([y for _, _, _, y in curves])
    # A quantity that rose and fell by little reads better on a linear axis, unless it falls to zero.
    log = panel_of(members[0][1]).startswith(_ALWAYS_LOG) or (wanted != {False} and _spans_decades(values))
    chart: dict[str, Any] = {"title": title, "log": log, "x": unit, "curves": [], "notes": []}
    for place, (i, tag, x, y) in enumerate(curves):
        name = label_of(tag) if single else records[i].name
        hidden = int(np.count_nonzero(y <= 0)) if log else 0
        if hidden:
            count = "1 value is" if hidden == 1 else f"{hidden:,} values are"
            chart["notes"].append(f"{name}: {count} 0 or negative, and not drawn on the log axis.")
        shown = np.flatnonzero(y > 0) if log else np.arange(len(y))
        if not len(shown):
            continue
        index = place if single else i
        kept = shown[thin(y[shown], most)]
        chart["curves"].append(
            {
                "run": i,
                "name": name,
                "color": _COLORS[index % len(_COLORS)],
                "dash": _DASHES[(place if single else i // len(_COLORS)) % len(_DASHES)],
                "x": [int(each) for each in x[kept]],
                "y": [float(f"{each:.6g}") for each in y[kept]],
            }
        )
    return chart


def _curve_of(record: Record, tag: str) -> tuple[Array, Array]:
    """Iterations and values; the predicted decay is shifted to the curve of the gap, since it knows no scale."""
    assert record.run is not None
    readings = record.run.readings
    if tag == PREDICTED_DECAY.tag():
        return predicted_gap(readings, record.run.summary) or (np.array([]), np.array([]))
    return readings.iterations, readings.values[tag]


def _spans_decades(values: Array) -> bool:
    positive = values[values > 0]
    return bool(positive.size and not (values < 0).any() and positive.max() >= _LOG_FROM * positive.min())


def thin(values: Array, most: int) -> NDArray[np.intp]:
    """Choose points of a long curve so that no spike is lost: the least and the greatest of each of many parts.

    Args:
        values: ``(R,)``, finite.
        most: How many to keep, about; at least 4.

    Returns:
        Increasing indices, with the first and the last; all where there are few.
    """
    if len(values) <= most:
        return np.arange(len(values))
    ends = np.linspace(0, len(values), most // 2).astype(int)
    kept = {0, len(values) - 1}
    for start, end in pairwise(ends):
        part = values[start:end]
        kept |= {start + int(part.argmin()), start + int(part.argmax())}
    return np.array(sorted(kept))
