"""The picture of several optimizers on one problem: the gap, and the sum of the head's rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from nclightning.figures.panels import STYLES, add_caption, add_legend, panels, save
from nclightning.figures.runs import LOSSES, Run
from nclightning.figures.summary import predicted_gap
from nclightning.quantities import GAP, NC0

__all__ = ["draw_optimizers"]

_GAP, _NC0 = GAP.tag(), NC0.tag("train")


def draw_optimizers(runs: Mapping[str, Mapping[str, Run]], path: str | Path) -> list[Path]:
    """Draw the gap with its predicted decay above, and NC0 below, one column per loss.

    The upper panels end at the last iteration of the runs whose decay is predicted.

    Args:
        runs: Runs by loss and then by name of the optimizer, at most seven for a loss. Each has recorded NC0, and the
            gap unless its objective has no minimum. The title shows the penalties of the first run.
        path: Path of both files, without an extension.

    Returns:
        The PNG and the PDF.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import numpy as np
        >>> from nclightning.figures import Readings, Run, draw_optimizers, summarize
        >>> iterations = np.arange(0.0, 100.0, 5.0)
        >>> readings = Readings(iterations, {"optimality/gap": 0.8**iterations, "nc/train/nc0": 0.9**iterations})
        >>> run = Run(Path("version_0"), readings, summarize(readings), {"loss": "mse"})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     [path.name for path in draw_optimizers({"mse": {"SGD": run}}, Path(folder, "optimizers"))]
        ['optimizers.png', 'optimizers.pdf']
    """
    lines = 1 + max(map(len, runs.values()))
    with panels(2 * len(runs), most_columns=len(runs), legend_lines=lines) as (figure, grid):
        for column, (loss, own) in enumerate(runs.items()):
            gap, nc0 = grid[column], grid[len(runs) + column]
            gap.set_title(f"{LOSSES[loss]}, {next(iter(own.values())).penalties}")
            _draw_gaps(gap, own)
            _draw_nc0(nc0, own)
        add_caption(figure, [run for own in runs.values() for run in own.values()])
        return save(figure, Path(path))


def _draw_gaps(axes: Axes, runs: Mapping[str, Run]) -> None:
    ends = []
    for (name, run), (color, dashes) in zip(runs.items(), STYLES, strict=False):
        if _GAP not in run.readings.values:
            continue
        fit, label = run.summary.fits[_GAP], name
        if fit is not None:
            label += f"  ({fit.iterations_per_decade:.3g} it./decade"
        curve = predicted_gap(run.readings, run.summary)
        if curve is not None:
            assert run.summary.predicted is not None
            label += f", predicted {run.summary.predicted.iterations_per_decade:.3g}"
            axes.plot(*curve, color=color, ls="--", lw=4, alpha=0.35)
            ends.append(run.summary.iteration)
        _draw_curve(axes, run, _GAP, label if fit is None else f"{label})", color, dashes)
    axes.plot([], [], color="0.4", ls="--", lw=4, alpha=0.35, label="predicted decay")
    if ends:
        axes.set_xlim(-0.03 * max(ends), 1.05 * max(ends))
    axes.set_ylabel(GAP.latex)
    add_legend(axes)


def _draw_nc0(axes: Axes, runs: Mapping[str, Run]) -> None:
    for (name, run), (color, dashes) in zip(runs.items(), STYLES, strict=False):
        last = run.readings.values[_NC0][-1]
        _draw_curve(axes, run, _NC0, f"{name}  ({last:.1e} at the end)", color, dashes)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(numticks=9))
    axes.set_ylabel(rf"{NC0.latex}, $\|W^\top 1\|$")
    add_legend(axes)


def _draw_curve(axes: Axes, run: Run, tag: str, label: str, color: str, dashes: object) -> None:
    values = run.readings.values[tag]
    shown = np.isfinite(values) & (values > 0)
    axes.plot(run.readings.iterations[shown], values[shown], color=color, ls=dashes, label=label)
