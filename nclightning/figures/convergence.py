"""The convergence picture of one run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nclightning.errors import UserError
from nclightning.figures.readings import Readings, read_readings
from nclightning.figures.summary import RunSummary, predicted_gap, summarize
from nclightning.files import replaced
from nclightning.quantities import CONVERGING, GAP

__all__ = ["draw_convergence"]

_DPI = 150
# Colours that are distinct in the common kinds of colour blindness, and dashes that are distinct in grey.
_STYLES = (("#0072B2", "-"), ("#D55E00", (0, (6, 2))), ("#009E73", (0, (2, 1.5))))


def draw_convergence(run: str | Path, path: str | Path | None = None, title: str = "") -> Path:
    r"""Draw gap, distance, gradient norm and NC1-NC3 on log axes, with the fitted lines.

    Args:
        run: Run folder with ``readings.csv``.
        path: File to write; None is ``convergence.png`` in the run folder. The extension decides the format.
        title: Title above the panels.

    Returns:
        The file.

    Raises:
        ValueError: If the run has no readings, or none of these quantities.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from nclightning.figures import draw_convergence
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "readings.csv").write_text("iteration,optimality/gap\n0,1.0\n10,0.1\n")
        ...     draw_convergence(folder).name
        'convergence.png'
    """
    readings = read_readings(run)
    summary = summarize(readings)
    panels: dict[str, list[str]] = {}
    for tag in summary.last:
        panels.setdefault(CONVERGING[tag].chart, []).append(tag)
    if not panels:
        raise UserError(f"{run} has no readings of {', '.join(CONVERGING)}.")
    figure = Figure(figsize=(5.6 * len(panels), 4.2), dpi=_DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for axes, (name, tags) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True):
        _draw_panel(axes, readings, summary, name, tags)
    if title:
        figure.suptitle(title, fontsize=11)
    path = Path(run) / "convergence.png" if path is None else Path(path)
    with replaced(path) as partial:
        if path.suffix == ".png":
            canvas.print_png(partial)  # type: ignore[no-untyped-call] # Gives the bytes of savefig, which draws twice.
        else:
            figure.savefig(partial, dpi=_DPI)
    return path


def _draw_panel(axes: Axes, readings: Readings, summary: RunSummary, name: str, tags: Sequence[str]) -> None:
    # The certified gap is recorded only if the gap is not known, so a panel has at most three curves.
    for tag, (color, dashes) in zip(tags, _STYLES, strict=False):
        values = readings.values[tag]
        shown = np.isfinite(values) & (values > 0)  # Rows of another cadence have no value.
        fit = summary.fits[tag]
        label = CONVERGING[tag].text_with_formula
        if fit is not None:
            label += f"   {fit.iterations_per_decade:.3g} it./decade, $R^2$ {fit.r_squared:.4f}"
            ends = np.array([fit.first, fit.last])
            axes.plot(ends, 10.0 ** (fit.intercept + fit.slope * ends), color=color, lw=5, alpha=0.22)
        axes.plot(readings.iterations[shown], values[shown], color=color, ls=dashes, lw=1.6, label=label)
    if GAP.tag() in tags:
        _draw_prediction(axes, readings, summary)
    axes.set_yscale("log")
    axes.set_xlabel("iteration")
    axes.set_title(name, fontsize=11)
    axes.grid(True, which="major", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, handlelength=3)


def _draw_prediction(axes: Axes, readings: Readings, summary: RunSummary) -> None:
    """Draw the predicted decay through the middle of the fitted line of the gap."""
    curve = predicted_gap(readings, summary)
    if curve is None:
        return
    assert summary.predicted is not None
    label = f"gap, predicted   {summary.predicted.iterations_per_decade:.3g} it./decade"
    axes.plot(*curve, color="black", ls=(0, (1, 1)), lw=1.2, label=label)
