"""Panels in the style of a printed paper, written as PNG and PDF."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from nclightning.figures.runs import Run
from nclightning.files import replaced

__all__ = ["MARKERS", "STYLES", "add_caption", "add_legend", "panels", "save"]

# Colours from dark to light that are distinct in the common kinds of colour blindness, and dashes that are distinct in
# grey.
STYLES: tuple[tuple[str, Any], ...] = (
    ("#000000", "-"),
    ("#0072B2", (0, (6, 1.5))),
    ("#D55E00", (0, (1.5, 1.2))),
    ("#009E73", (0, (6, 1.5, 1.5, 1.5))),
    ("#CC79A7", (0, (10, 2))),
    ("#E69F00", (0, (3, 1.2, 1, 1.2, 1, 1.2))),
    ("#56B4E9", (0, (4, 3))),
)
MARKERS = "osD^vP*"
_PANEL = (4.6, 4.4)  # Width and height in inches, including the legend.
_LINE, _MOST_LINES = 0.21, 5  # Height of a legend line in inches, and the number of lines that a panel has space for.


@contextmanager
def panels(
    count: int, most_columns: int = 2, legend_lines: int = 3, size: tuple[float, float] = _PANEL
) -> Iterator[tuple[Figure, list[Axes]]]:
    """Lay out panels with log axes, in the style of a printed paper.

    Args:
        count: Number of panels.
        most_columns: Largest number of panels in a row.
        legend_lines: Number of lines of the longest legend.
        size: Width and height of a panel in inches.

    Yields:
        The figure and its panels.
    """
    style: dict[Any, Any] = {
        "font.size": 10,
        "axes.titlesize": 11,
        "legend.fontsize": 8,
        "legend.frameon": False,
        "legend.handlelength": 3.2,
        "lines.linewidth": 1.5,
        "lines.markersize": 4,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.which": "major",
        "grid.color": "0.9",
        "pdf.fonttype": 42,  # Text in the PDF can be selected.
    }
    with mpl.rc_context(style):
        columns = min(count, most_columns)
        rows = -(-count // columns)
        height = size[1] + _LINE * max(0, legend_lines - _MOST_LINES)  # A long legend does not shrink the axes.
        figure = Figure(figsize=(size[0] * columns, height * rows), layout="constrained")
        FigureCanvasAgg(figure)
        grid = list(np.atleast_1d(figure.subplots(rows, columns)).flat)
        for axes in grid:
            axes.set_yscale("log")
            axes.set_xlabel("iteration $k$")
            axes.yaxis.set_major_locator(LogLocator(numticks=9))
            axes.xaxis.set_major_locator(MaxNLocator(6))
        for axes in grid[count:]:
            axes.remove()
        yield figure, grid[:count]


def add_legend(axes: Axes) -> None:
    """Add a legend below the panel, where it hides no curve."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17))


def add_caption(figure: Figure, runs: Sequence[Run], note: str = "") -> None:
    """Write the sizes below the panels if all runs share them.

    Args:
        figure: The figure with its panels.
        runs: The runs that are drawn.
        note: Further text of the caption.
    """
    captions = {run.sizes for run in runs}
    caption = captions.pop() if len(captions) == 1 else ""
    if caption and all(run.single_lambda for run in runs):
        caption += r", $\lambda_W = n\lambda$, $\lambda_H = \lambda$"
    if text := "; ".join(filter(None, (caption, note))):
        figure.supxlabel(text, fontsize=9)


def save(figure: Figure, path: Path) -> list[Path]:
    """Write PNG and PDF without a date, so that the same readings give the same files.

    Args:
        figure: The figure.
        path: Path of both files, without an extension.

    Returns:
        The two files.
    """
    targets = [path.with_name(f"{path.name}.{ending}") for ending in ("png", "pdf")]
    for target in targets:
        with replaced(target) as partial:
            figure.savefig(partial, dpi=200, metadata={"CreationDate": None} if target.suffix == ".pdf" else {})
    return targets
