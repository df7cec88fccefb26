"""The picture of a series of checkpoints or of saved features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from nclightning.figures.panels import MARKERS, STYLES, add_legend, panels
from nclightning.figures.readings import read_readings
from nclightning.files import replaced

__all__ = ["draw_series"]


def draw_series(folder: Path, path: Path) -> Path:
    """Draw all values against the step, one panel per data set, on a log axis if they span two decades.

    Args:
        folder: Folder with ``readings.csv``.
        path: File to write. The extension decides the format.

    Returns:
        The file.

    Raises:
        ValueError: If there are no readings.
    """
    readings = read_readings(folder)
    groups: dict[str, list[str]] = {}
    for tag in readings.values:
        groups.setdefault(tag.rpartition("/")[0], []).append(tag)
    with panels(len(groups), legend_lines=max(map(len, groups.values()))) as (figure, grid):
        for axes, (group, tags) in zip(grid, groups.items(), strict=True):
            drawn = [readings.values[tag] for tag in tags]
            finite = np.concatenate([values[np.isfinite(values)] for values in drawn])
            positive = finite[finite > 0]
            # A log axis over less than two decades may have no tick.
            logarithmic = bool(positive.size and not (finite < 0).any() and positive.max() >= 100 * positive.min())
            for i, (tag, values) in enumerate(zip(tags, drawn, strict=True)):
                color, dashes = STYLES[i % len(STYLES)]
                shown = np.where(values > 0, values, np.nan) if logarithmic else values
                name, marker = tag.removeprefix(f"{group}/"), MARKERS[i // len(STYLES) % len(MARKERS)]
                axes.plot(readings.iterations, shown, color=color, ls=dashes, marker=marker, label=name)
            axes.set_yscale("log" if logarithmic else "linear")
            if logarithmic:
                axes.yaxis.set_major_locator(LogLocator(numticks=9))
                axes.yaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.set_xlabel("step")
            axes.set_title(group.replace("$", r"\$"))
            add_legend(axes)
        with replaced(path) as partial:
            figure.savefig(partial, dpi=150)
    return path
