"""The paper's figures: the gap of several runs against lambda, and the collapse of each."""

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

from nclightning.figures.rates import LinearFit
from nclightning.figures.runs import LOSSES, Run
from nclightning.files import replaced

__all__ = ["draw_collapse", "draw_gaps"]

# Colours that stay apart in the common kinds of colour blindness, from dark to light, and dashes that stay apart in
# grey.
_STYLES: tuple[tuple[str, Any], ...] = (
    ("#000000", "-"),
    ("#0072B2", (0, (6, 1.5))),
    ("#D55E00", (0, (1.5, 1.2))),
    ("#009E73", (0, (6, 1.5, 1.5, 1.5))),
    ("#CC79A7", (0, (10, 2))),
    ("#E69F00", (0, (3, 1.2, 1, 1.2, 1, 1.2))),
    ("#56B4E9", (0, (4, 3))),
)
_MARKERS = "osD^vP*"
_GAP = "optimality/gap"
_COLLAPSE = {
    "nc/train/nc1": r"$\mathcal{NC}_1$",
    "nc/train/nc2": r"$\mathcal{NC}_2$",
    "nc/train/nc3": r"$\mathcal{NC}_3$",
}
_PANEL = (4.6, 4.4)  # Inches, with the legend.
_MOST_COLUMNS = 2
_LINE, _MOST_LINES = 0.21, 5  # Inches of a line of the legend, and how many have a place in a panel.


def draw_gaps(runs: Sequence[Run], path: str | Path) -> list[Path]:
    """Draw the optimality gap against the iteration: one panel per loss, one curve per run (paper, Figures 1 and 2).

    Args:
        runs: Their ``optimality/gap`` is drawn, in the order given.
        path: Where to write, without ending.

    Returns:
        The PNG and the PDF.

    Raises:
        ValueError: If there is no run, or one has no gap.
    """
    losses = list(dict.fromkeys(run.loss for run in _having(runs, (_GAP,))))
    chosen = {loss: [run for run in runs if run.loss == loss] for loss in losses}
    with _panels(len(losses), max(map(len, chosen.values()), default=0)) as (figure, grid):
        for axes, (loss, own) in zip(grid, chosen.items(), strict=True):
            for i, (run, label) in enumerate(zip(own, _labels(own), strict=True)):
                _draw_curve(axes, run, _GAP, label, i)
            axes.set_title(LOSSES.get(loss, loss))
            axes.set_ylabel(r"$F^k - F^*$")
            _add_legend(axes)
        _caption(figure, runs)
        return _save(figure, Path(path))


def draw_collapse(runs: Sequence[Run], path: str | Path) -> list[Path]:
    """Draw NC1, NC2 and NC3 against the iteration, one panel per run (paper, Figures 3 and 4).

    Args:
        runs: Those of their metrics that were recorded are drawn.
        path: Where to write, without ending.

    Returns:
        The PNG and the PDF.

    Raises:
        ValueError: If there is no run, or one has none of the metrics.
    """
    with _panels(len(_having(runs, tuple(_COLLAPSE)))) as (figure, grid):
        for axes, run in zip(grid, runs, strict=True):
            for i, (tag, label) in enumerate(_COLLAPSE.items()):
                if tag in run.readings.values:
                    _draw_curve(axes, run, tag, label, i)
            axes.set_title(", ".join(filter(None, (LOSSES.get(run.loss, run.loss), run.penalties))))
            axes.set_ylabel("NC metrics")
            _add_legend(axes)
        _caption(figure, runs)
        return _save(figure, Path(path))


def _having(runs: Sequence[Run], tags: tuple[str, ...]) -> Sequence[Run]:
    """Return the runs; refuse those without what is to be drawn."""
    if not runs:
        raise ValueError("give at least one run.")
    for run in runs:
        if not any(tag in run.readings.values for tag in tags):
            raise ValueError(f"{run.folder} has no readings of {', '.join(tags)}.")
    return runs


def _labels(runs: Sequence[Run]) -> list[str]:
    """Penalties; with the folder where several runs have the same ones."""
    penalties = [run.penalties for run in runs]
    return [
        label if penalties.count(label) == 1 or label == run.name else f"{label}, {run.name}"
        for label, run in zip(penalties, runs, strict=True)
    ]


def _draw_curve(axes: Axes, run: Run, tag: str, label: str, index: int) -> None:
    color, dashes = _STYLES[index % len(_STYLES)]
    values = run.readings.values[tag]
    shown = np.isfinite(values) & (values > 0)
    iterations, values = run.readings.iterations[shown], values[shown]
    fit = run.summary.fits[tag]
    axes.plot(
        iterations,
        values,
        color=color,
        ls=dashes,
        marker=_MARKERS[(index + index // len(_STYLES)) % len(_MARKERS)],  # Another one in the second round.
        markevery=_marker_places(iterations),
        label=f"{label}  ({_describe(fit)})",
    )


def _add_legend(axes: Axes) -> None:
    """Below the panel, where no curve runs."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17))


def _describe(fit: LinearFit | None) -> str:
    if fit is None:
        return "no linear fall"
    rate = fit.iterations_per_decade
    return f"{rate:,.{0 if rate >= 100 else 1}f} it./decade over {fit.decades:.1f} decades"


def _marker_places(iterations: np.ndarray[Any, np.dtype[np.float64]]) -> list[int]:
    """A few readings at equal distances of the iteration, whatever the cadence."""
    if len(iterations) == 0:
        return []
    wanted = np.linspace(iterations[0], iterations[-1], 7)[1:-1]
    return sorted({int(i) for i in np.searchsorted(iterations, wanted)})


@contextmanager
def _panels(count: int, legend_lines: int = 3) -> Iterator[tuple[Figure, list[Axes]]]:
    """Lay out panels with log axes, in the style of print."""
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
        "pdf.fonttype": 42,  # Text stays text.
    }
    with mpl.rc_context(style):
        columns = min(count, _MOST_COLUMNS)
        rows = -(-count // columns)
        height = _PANEL[1] + _LINE * max(0, legend_lines - _MOST_LINES)  # Long legends leave the axes their size.
        figure = Figure(figsize=(_PANEL[0] * columns, height * rows), layout="constrained")
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


def _caption(figure: Figure, runs: Sequence[Run]) -> None:
    """Write the sizes below, where all runs share them."""
    captions = {run.sizes for run in runs}
    if len(captions) != 1:
        return
    caption = captions.pop()
    if all(run.single_lambda for run in runs):
        caption += r", $\lambda_W = n\lambda$, $\lambda_H = \lambda$"
    if caption:
        figure.supxlabel(caption, fontsize=9)


def _save(figure: Figure, path: Path) -> list[Path]:
    """Write PNG and PDF; the date is left out, so that the same runs give the same file."""
    targets = [path.with_name(f"{path.name}.{ending}") for ending in ("png", "pdf")]
    for target in targets:
        with replaced(target) as partial:
            figure.savefig(partial, dpi=200, metadata={"CreationDate": None} if target.suffix == ".pdf" else {})
    return targets
