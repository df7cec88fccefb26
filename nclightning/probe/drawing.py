"""The picture of a measurement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from nclightning.probe.tables import Row

__all__ = ["draw"]

_STYLE: dict[Any, Any] = {"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}
_BAR, _LEAST_HEIGHT, _MATRIX = 0.27, 4.0, 4.6  # Inches.
_DRAWN = (1e-100, 1e100)  # Bars are clipped to this range, because matplotlib's logarithms overflow not far beyond.
_FEWEST = 4  # Least number of places for bars, so that a single bar does not fill the panel.
_DECADES = 0.5  # Length of the axis left of the shortest bar.
_NUMBERED = 12  # Largest number of classes for which cosines are written into the matrix.


def draw(
    rows: Sequence[Row],
    headline: str,
    cosines: NDArray[np.float32] | None,
    classes: NDArray[np.int64] | None,
    num_present: int,
) -> Figure:
    """Draw bars of distances from collapse, and the cosines of class means.

    Args:
        rows: The values as rows of a table.
        headline: Title of the figure.
        cosines: Cosines of the class means; None to leave them out.
        classes: Numbers of these classes.
        num_present: Number of classes with samples.

    Returns:
        The figure. It is not registered with pyplot.
    """
    bars = [row for row in rows if row.name != "nc1_rank"]
    panels = bool(bars) + (cosines is not None)
    with mpl.rc_context(_STYLE):
        height = max(_LEAST_HEIGHT, 1.2 + _BAR * len(bars))
        figure = Figure(
            figsize=((5.4 if bars else 0) + _MATRIX * (cosines is not None) or 5.4, height), layout="constrained"
        )
        FigureCanvasAgg(figure)
        figure.suptitle(headline, fontsize=10)
        axes = list(np.atleast_1d(figure.subplots(1, max(panels, 1))).flat)
        if bars:
            _draw_bars(axes[0], bars)
        if cosines is not None:
            assert classes is not None
            _draw_cosines(axes[-1], cosines, classes, num_present)
        if not panels:
            axes[0].set_axis_off()
    return figure


def _draw_bars(axes: Axes, rows: Sequence[Row]) -> None:
    """Draw the distance of each value from that at collapse as a bar on a logarithmic axis."""
    lengths = np.array([abs(row.value) if row.distance is None else row.distance for row in rows], dtype=np.float64)
    seen = np.isfinite(lengths) & (lengths > 0)
    drawn = np.where(seen, lengths.clip(*_DRAWN), np.nan)
    least, most = (drawn[seen].min(), drawn[seen].max()) if seen.any() else (1e-1, 1.0)
    left, right = 10 ** (np.log10(least) - _DECADES), 10 ** (np.log10(most) + _DECADES)
    places = np.arange(len(rows))
    widths = np.where(seen, drawn, left) - left
    groups = list(dict.fromkeys(row.group for row in rows))
    colours = [f"C{groups.index(row.group) % 10}" for row in rows]
    for place, width, row, colour in zip(places, widths, rows, colours, strict=True):
        face = "none" if row.distance is None else colour
        axes.barh(place, width, left=left, facecolor=face, edgecolor=colour, height=0.7)
    axes.set_xscale("log")
    axes.set_xlim(left, right * (right / left) ** 0.22)  # Leave space for the numbers.
    axes.set_yticks(places, [_label(row) for row in rows])
    axes.set_ylim(max(len(rows), _FEWEST) - 0.4, -0.6)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    for place, length, end in zip(places, lengths, np.where(seen, drawn, left), strict=True):
        # Values that a logarithmic axis cannot show, such as 0 at exact collapse, are written at its left end.
        axes.annotate(f"{length:.2g}", (end, place), (3, 0), textcoords="offset points", va="center")
    unknown = "\nhollow: absolute value, where no value at collapse is known"
    axes.set_title("distance from the value at collapse" + unknown * any(row.distance is None for row in rows))


def _label(row: Row) -> str:
    """Return the name of a value, as a difference from its value at collapse if that is not zero."""
    name = f"{row.group.removeprefix('layer ')}/{row.name}" if row.group else row.name
    if not row.collapsed:
        return name
    return f"|{name} {'-' if row.collapsed > 0 else '+'} {abs(row.collapsed):.4g}|"


def _draw_cosines(axes: Axes, cosines: NDArray[np.float32], classes: NDArray[np.int64], num_present: int) -> None:
    """Draw the matrix of cosines of class means."""
    off = cosines[~np.eye(len(cosines), dtype=bool)]
    finite = off[np.isfinite(off)]
    etf = -1 / max(num_present - 1, 1)
    # The colours span the entries off the diagonal. With many classes these are near 0, while the diagonal is always 1.
    limit = min(1.0, max(abs(etf), float(np.abs(finite).max(initial=0)), 1e-3))
    ends = (-0.5, len(cosines) - 0.5)
    image = axes.imshow(cosines, "RdBu_r", vmin=-limit, vmax=limit, extent=(*ends, *ends[::-1]))
    axes.set_facecolor("0.7")  # Shown where a cosine is nan.
    extend = "max" if limit < 1 else "neither"
    bar = axes.figure.colorbar(image, ax=axes, location="bottom", shrink=0.8, extend=extend)
    bar.ax.axvline(etf, color="black", linewidth=1)
    few = len(cosines) <= _NUMBERED
    ticks = np.arange(len(cosines)) if few else np.linspace(0, len(cosines) - 1, 5).astype(int)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks, [str(classes[i]) for i in ticks])
    axes.set(xlabel="class", ylabel="class", anchor="N")
    for i, j in np.ndindex(cosines.shape) if few else ():
        value = cosines[i, j]
        colour = "white" if abs(value) > 0.6 * limit else "black"
        axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=9 if len(cosines) < 7 else 6)
    step = classes[1] - classes[0]
    shown = f", every {step}th class" if step > 1 else ""
    spread = f"{finite.min():.3g} to {finite.max():.3g}, " if finite.size else ""
    axes.set_title(f"cosines of class means{shown}\noff the diagonal {spread}at collapse {etf:.3g}")
