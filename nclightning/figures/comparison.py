"""The paper's figures: the gap of several runs against lambda, and the collapse of each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from nclightning.errors import UserError
from nclightning.figures.many import draw_bands
from nclightning.figures.panels import MARKERS, STYLES, add_caption, add_legend, panels, save
from nclightning.figures.rates import LinearFit
from nclightning.figures.runs import LOSSES, Run
from nclightning.quantities import CERTIFIED_GAP, GAP, NC1, NC2, NC3

__all__ = ["draw_collapse", "draw_gaps"]

# More curves in a panel, or more panels of a run each, are no picture any more.
_MOST_CURVES, _MOST_RUNS = 20, 12
# Where the minimum is not known, a bound takes its place.
_GAPS = {GAP.tag(): "", CERTIFIED_GAP.tag(): ", certified"}
_COLLAPSE = {each.tag("train"): each.latex for each in (NC1, NC2, NC3)}


def draw_gaps(runs: Sequence[Run], path: str | Path) -> list[Path]:
    """Draw the optimality gap against the iteration: one panel per loss, one curve per run (paper, Figures 1 and 2).

    More than 20 runs get small panels by setting, with median and range.

    Args:
        runs: Their ``optimality/gap`` is drawn, in the order given; ``optimality/certified_gap`` of those without.
        path: Where to write, without ending.

    Returns:
        The PNG and the PDF.

    Raises:
        ValueError: If there is no run, or one has no gap.
    """
    losses = list(dict.fromkeys(run.loss for run in _having(runs, tuple(_GAPS))))
    if len(runs) > _MOST_CURVES:
        tags = {tag: f"gap{remark}" for tag, remark in _GAPS.items() if _any_has(runs, tag)}
        return draw_bands(runs, tags, GAP.latex, Path(path))
    chosen = {loss: [run for run in runs if run.loss == loss] for loss in losses}
    with panels(len(losses), legend_lines=max(map(len, chosen.values()))) as (figure, grid):
        for axes, (loss, own) in zip(grid, chosen.items(), strict=True):
            for i, (run, label) in enumerate(zip(own, _labels(own), strict=True)):
                tag = next(tag for tag in _GAPS if tag in run.readings.values)
                _draw_curve(axes, run, tag, label + _GAPS[tag], i)
            axes.set_title(LOSSES.get(loss, loss))
            axes.set_ylabel(GAP.latex)
            add_legend(axes)
        add_caption(figure, runs)
        return save(figure, Path(path))


def draw_collapse(runs: Sequence[Run], path: str | Path) -> list[Path]:
    """Draw NC1, NC2 and NC3 against the iteration, one panel per run (paper, Figures 3 and 4).

    More than 12 runs get small panels by setting, with median and range.

    Args:
        runs: Those of their metrics that were recorded are drawn.
        path: Where to write, without ending.

    Returns:
        The PNG and the PDF.

    Raises:
        ValueError: If there is no run, or one has none of the metrics.
    """
    if len(_having(runs, tuple(_COLLAPSE))) > _MOST_RUNS:
        return draw_bands(runs, _COLLAPSE, "NC metrics", Path(path))
    with panels(len(runs)) as (figure, grid):
        for axes, run in zip(grid, runs, strict=True):
            for i, (tag, label) in enumerate(_COLLAPSE.items()):
                if tag in run.readings.values:
                    _draw_curve(axes, run, tag, label, i)
            separator = ", " if run.loss in LOSSES else "\n"  # Others take a line for themselves.
            axes.set_title(separator.join(filter(None, (LOSSES.get(run.loss, run.loss), run.penalties))))
            axes.set_ylabel("NC metrics")
            add_legend(axes)
        add_caption(figure, runs)
        return save(figure, Path(path))


def _having(runs: Sequence[Run], tags: tuple[str, ...]) -> Sequence[Run]:
    """Return the runs; refuse those without what is to be drawn."""
    if not runs:
        raise UserError("give at least one run.")
    for run in runs:
        if not any(tag in run.readings.values for tag in tags):
            raise UserError(f"{run.folder} has no readings of {', '.join(tags)}.")
    return runs


def _any_has(runs: Sequence[Run], tag: str) -> bool:
    return any(tag in run.readings.values for run in runs)


def _labels(runs: Sequence[Run]) -> list[str]:
    """Penalties; with the folder where several runs have the same ones."""
    penalties = [run.penalties for run in runs]
    return [
        label if penalties.count(label) == 1 or label == run.name else f"{label}, {run.name}"
        for label, run in zip(penalties, runs, strict=True)
    ]


def _draw_curve(axes: Axes, run: Run, tag: str, label: str, index: int) -> None:
    color, dashes = STYLES[index % len(STYLES)]
    values = run.readings.values[tag]
    shown = np.isfinite(values) & (values > 0)
    iterations, values = run.readings.iterations[shown], values[shown]
    fit = run.summary.fits[tag]
    axes.plot(
        iterations,
        values,
        color=color,
        ls=dashes,
        marker=MARKERS[(index + index // len(STYLES)) % len(MARKERS)],  # Another one in the second round.
        markevery=_marker_places(iterations),
        label=f"{label}  ({_describe(fit)})",
    )


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
