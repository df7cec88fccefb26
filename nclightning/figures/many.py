"""Figures of many runs: one small panel per setting, with the median and the range of its runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from nclightning.figures.panels import STYLES, add_caption, panels, save
from nclightning.figures.readings import Readings
from nclightning.figures.runs import LOSSES, Run
from nclightning.quantities import CONVERGING

__all__ = ["Group", "draw_bands", "group_runs", "thinned"]

_MOST_PANELS = 24
_COLUMNS = 6
_PANEL = (2.7, 2.5)  # Inches.
_PLACES = 200  # Iterations at which a band is drawn.


@dataclass(frozen=True)
class Group:
    """Runs of one setting, or of neighbouring settings if there are too many.

    Attributes:
        title: Title of the panel, in mathtext.
        runs: The runs.
    """

    title: str
    runs: list[Run]


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Group runs by setting. Neighbouring settings are merged if there are more than 24.

    Args:
        runs: At least one run.

    Returns:
        At most 24 groups, ordered by loss, sizes and penalties.

    Example:
        >>> from pathlib import Path
        >>> import numpy as np
        >>> from nclightning.figures import Readings, Run, group_runs, summarize
        >>> readings = Readings(np.array([0.0]), {})
        >>> losses = {"version_0": "mse", "version_1": "ce", "version_2": "mse"}
        >>> runs = [Run(Path(name), readings, summarize(readings), {"loss": loss, "lambda_w": 0.1, "lambda_h": 0.1})
        ...         for name, loss in losses.items()]
        >>> [[run.name for run in group.runs] for group in group_runs(runs)]
        [['version_1'], ['version_0', 'version_2']]
    """
    ordered = sorted(runs, key=lambda run: (run.loss, run.sizes, *run.strength, run.penalties))
    losses: dict[str, dict[tuple[str, str], list[Run]]] = {}
    for run in ordered:
        losses.setdefault(run.loss, {}).setdefault((run.sizes, run.penalties), []).append(run)
    if len(losses) > _MOST_PANELS:
        losses = {"": {(run.name, ""): [run] for run in ordered}}
    number = sum(map(len, losses.values()))
    same_sizes = len({run.sizes for run in runs}) == 1
    groups = []
    for settings in losses.values():
        parts = max(1, min(len(settings), _MOST_PANELS * len(settings) // max(number, _MOST_PANELS)))
        for part in np.array_split(np.arange(len(settings)), parts):
            own = [run for i in part for run in list(settings.values())[i]]
            groups.append(Group(_title(own, same_sizes), own))
    return groups[:_MOST_PANELS] if len(groups) <= _MOST_PANELS else _merged(groups)


def _merged(groups: Sequence[Group]) -> list[Group]:
    """Merge neighbouring groups: many losses with few settings each may still give too many panels."""
    parts = np.array_split(np.arange(len(groups)), _MOST_PANELS)
    merged = [[run for i in part for run in groups[i].runs] for part in parts]
    return [Group(_title(runs, same_sizes=True), runs) for runs in merged]


def _title(runs: Sequence[Run], same_sizes: bool) -> str:
    first, last = runs[0], runs[-1]
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    lines = [", ".join(filter(None, (LOSSES.get(first.loss, first.loss), count)))]
    if not same_sizes:
        lines.append(first.sizes if first.sizes == last.sizes else f"{first.sizes} ...")
    lines.append(first.penalties)
    if last.penalties != first.penalties:
        lines.append(f"to {last.penalties}")
    return "\n".join(filter(None, lines))


def thinned(run: Run) -> Run:
    """Drop most readings of a run, so that many runs fit into memory.

    Args:
        run: The run with all its readings.

    Returns:
        The run with at most 400 evenly spaced readings of the quantities that converge.

    Example:
        >>> from pathlib import Path
        >>> import numpy as np
        >>> from nclightning.figures import Readings, Run, summarize, thinned
        >>> readings = Readings(np.arange(10_000.0), {"nc/train/nc1": np.ones(10_000)})
        >>> run = Run(Path("version_0"), readings, summarize(readings), {})
        >>> len(thinned(run).readings.iterations)
        400
    """
    at = np.unique(np.linspace(0, len(run.readings.iterations) - 1, 2 * _PLACES).round().astype(int))
    values = {tag: run.readings.values[tag][at] for tag in CONVERGING if tag in run.readings.values}
    return Run(run.folder, Readings(run.readings.iterations[at], values), run.summary, run.settings)


def draw_bands(runs: Sequence[Run], tags: Mapping[str, str], label: str, path: Path) -> list[Path]:
    """Draw quantities of many runs: the median as a line, the range from the least to the greatest value as a band.

    Args:
        runs: Any number of runs.
        tags: Tags of the quantities, with the name of each in the legend.
        label: Label of the vertical axis.
        path: Path of both files, without an extension.

    Returns:
        The PNG and the PDF.
    """
    groups = group_runs(runs)
    with panels(len(groups), _COLUMNS, size=_PANEL) as (figure, grid):
        for axes, group in zip(grid, groups, strict=True):
            for (tag, name), (color, dashes) in zip(tags.items(), STYLES[1:], strict=False):
                _draw_band(
                    axes, [run.readings for run in group.runs if tag in run.readings.values], tag, name, color, dashes
                )
            axes.set_title(group.title, fontsize=7)
            axes.tick_params(which="both", labelsize=7)
        for axes in grid[:-_COLUMNS]:
            axes.set_xlabel("")
        for axes in grid[::_COLUMNS]:
            axes.set_ylabel(label)
        handles, names = grid[0].get_legend_handles_labels()
        if len(tags) > 1:
            figure.legend(handles, names, loc="outside upper center", ncols=len(tags))
        add_caption(figure, runs, "line: median, until half of the runs have ended; band: least to greatest value")
        return save(figure, path)


def _draw_band(axes: Axes, readings: Sequence[Readings], tag: str, name: str, color: str, dashes: object) -> None:
    curves = []
    for each in readings:
        shown = np.isfinite(each.values[tag]) & (each.values[tag] > 0)
        curves.append((each.iterations[shown], np.log10(each.values[tag][shown])))
    curves = [(x, y) for x, y in curves if len(x)]
    if not curves:
        axes.plot([], [], color=color, ls=dashes, label=name)
        return
    places = np.linspace(min(x[0] for x, _ in curves), max(x[-1] for x, _ in curves), _PLACES)
    values = np.stack([np.interp(places, x, y, np.nan, np.nan) for x, y in curves])
    there = np.isfinite(values).sum(axis=0)
    places, values, there = places[there > 0], values[:, there > 0], there[there > 0]
    middle, least, greatest = (10.0 ** of(values, axis=0) for of in (np.nanmedian, np.nanmin, np.nanmax))
    # Once most runs have ended, the median would jump whenever another one ends.
    middle[2 * there < len(values)] = np.nan
    axes.fill_between(places, least, greatest, color=color, alpha=0.2, lw=0)
    axes.plot(places, middle, color=color, ls=dashes, lw=1.2, label=name)
