"""Figures of many runs: small panels by setting, each with the median and the range of its runs."""

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
_PLACES = 200  # Along the iterations.


@dataclass(frozen=True)
class Group:
    """Runs of one setting, or of neighbouring ones where there are too many settings.

    Attributes:
        title: Of its panel, in mathtext.
        runs: Them.
    """

    title: str
    runs: list[Run]


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Put runs of the same setting together, and neighbouring settings until there are few groups.

    Args:
        runs: At least one.

    Returns:
        At most 24 groups, ordered by loss, sizes and penalties.
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
    """Losses with few settings each may still be too many panels."""
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
    """Keep of a run what a band needs, so that many fit into memory.

    Args:
        run: With all readings.

    Returns:
        The same with a few hundred readings of what converges.
    """
    at = np.unique(np.linspace(0, len(run.readings.iterations) - 1, 2 * _PLACES).round().astype(int))
    values = {tag: run.readings.values[tag][at] for tag in CONVERGING if tag in run.readings.values}
    return Run(run.folder, Readings(run.readings.iterations[at], values), run.summary, run.settings)


def draw_bands(runs: Sequence[Run], tags: Mapping[str, str], label: str, path: Path) -> list[Path]:
    """Draw quantities of many runs: the median as a line, the range from the least to the greatest as a band.

    Args:
        runs: Of any number.
        tags: What is drawn, with its name in the legend.
        label: Of the ordinate.
        path: Where to write, without ending.

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
        add_caption(figure, runs, "line: median while half of the runs last, band: least to greatest")
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
    # Where most runs have ended, the median would jump with each that ends.
    middle[2 * there < len(values)] = np.nan
    axes.fill_between(places, least, greatest, color=color, alpha=0.2, lw=0)
    axes.plot(places, middle, color=color, ls=dashes, lw=1.2, label=name)
