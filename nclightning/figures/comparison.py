"""The paper's figures: the gap of several runs with different lambda, and NC1-NC3 of each run."""

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

# A figure with more curves in a panel, or with more panels of one run each, is not legible.
_MOST_CURVES, _MOST_RUNS = 20, 12
# If the minimum is not known, the certified gap, an upper bound of the gap, is drawn.
_GAPS = {GAP.tag(): "", CERTIFIED_GAP.tag(): ", certified"}
_COLLAPSE = {each.tag("train"): each.latex for each in (NC1, NC2, NC3)}


def draw_gaps(runs: Sequence[Run], path: str | Path) -> list[Path]:
    """Draw the optimality gap against the iteration: one panel per loss, one curve per run (paper, Figures 1 and 2).

    More than 20 runs are drawn in small panels, one per setting, with the median and the range of its runs.

    Args:
        runs: Runs in the order of the legend. Their ``optimality/gap`` is drawn, or ``optimality/certified_gap`` if
            that is what they recorded.
        path: Path of both files, without an extension.

    Returns:
        The PNG and the PDF.

    Raises:
        ValueError: If no runs are given, or if a run has no gap.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import numpy as np
        >>> from nclightning.figures import Readings, Run, draw_gaps, summarize
        >>> iterations = np.arange(0.0, 100.0, 5.0)
        >>> readings = Readings(iterations, {"optimality/gap": 0.8**iterations})
        >>> run = Run(Path("version_0"), readings, summarize(readings), {"loss": "mse"})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     [path.name for path in draw_gaps([run], Path(folder, "gaps"))]
        ['gaps.png', 'gaps.pdf']
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

    More than 12 runs are drawn in small panels, one per setting, with the median and the range of its runs.

    Args:
        runs: Runs in the order of the panels. Each has recorded at least one of the three.
        path: Path of both files, without an extension.

    Returns:
        The PNG and the PDF.

    Raises:
        ValueError: If no runs are given, or if a run has recorded none of the three.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import numpy as np
        >>> from nclightning.figures import Readings, Run, draw_collapse, summarize
        >>> iterations = np.arange(0.0, 100.0, 5.0)
        >>> readings = Readings(iterations, {"nc/train/nc1": 0.8**iterations})
        >>> run = Run(Path("version_0"), readings, summarize(readings), {"loss": "mse"})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     [path.name for path in draw_collapse([run], Path(folder, "collapse"))]
        ['collapse.png', 'collapse.pdf']
    """
    if len(_having(runs, tuple(_COLLAPSE))) > _MOST_RUNS:
        return draw_bands(runs, _COLLAPSE, "NC metrics", Path(path))
    with panels(len(runs)) as (figure, grid):
        for axes, run in zip(grid, runs, strict=True):
            for i, (tag, label) in enumerate(_COLLAPSE.items()):
                if tag in run.readings.values:
                    _draw_curve(axes, run, tag, label, i)
            separator = (
                ", " if run.loss in LOSSES else "\n"
            )  # Other losses have long names and get a line of their own.
            axes.set_title(separator.join(filter(None, (LOSSES.get(run.loss, run.loss), run.penalties))))
            axes.set_ylabel("NC metrics")
            add_legend(axes)
        add_caption(figure, runs)
        return save(figure, Path(path))


def _having(runs: Sequence[Run], tags: tuple[str, ...]) -> Sequence[Run]:
    """Return the runs; refuse a run that recorded none of the tags."""
    if not runs:
        raise UserError("give at least one run.")
    for run in runs:
        if not any(tag in run.readings.values for tag in tags):
            raise UserError(f"{run.folder} has no readings of {', '.join(tags)}.")
    return runs


def _any_has(runs: Sequence[Run], tag: str) -> bool:
    return any(tag in run.readings.values for run in runs)


def _labels(runs: Sequence[Run]) -> list[str]:
    """Return the penalties of each run, with the name of its folder if several runs have the same penalties."""
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
        marker=MARKERS[(index + index // len(STYLES)) % len(MARKERS)],  # Colours repeat; markers then differ.
        markevery=_marker_places(iterations),
        label=f"{label}  ({_describe(fit)})",
    )


def _describe(fit: LinearFit | None) -> str:
    if fit is None:
        return "no linear fall"
    rate = fit.iterations_per_decade
    return f"{rate:,.{0 if rate >= 100 else 1}f} it./decade over {fit.decades:.1f} decades"


def _marker_places(iterations: np.ndarray[Any, np.dtype[np.float64]]) -> list[int]:
    """Return the indices of a few readings that are evenly spaced in iterations, at any cadence."""
    if len(iterations) == 0:
        return []
    wanted = np.linspace(iterations[0], iterations[-1], 7)[1:-1]
    return sorted({int(i) for i in np.searchsorted(iterations, wanted)})
