"""The picture of the error bound and of measured quotients."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes

from nclightning.figures.panels import MARKERS, STYLES, add_legend, panels, save
from nclightning.figures.readings import Array
from nclightning.figures.runs import LOSSES

__all__ = ["draw_error_bound"]

# (loss, number of classes) -> (relative distances, the quotient at each of them).
Curves = Mapping[tuple[str, int], tuple[Array, Array]]


def draw_error_bound(perturbed: Curves, descents: Curves, threshold: Curves, path: str | Path) -> list[Path]:
    r"""Draw :math:`\mu\,\mathrm{dist} / \|\nabla F\|` against the distance, one panel per loss; 1 is the bound.

    The last panel shows the quotient without mu at the threshold ``K q = 1``, where mu is zero and there is no bound.

    Args:
        perturbed: Curves of perturbed optima, drawn as dots. A key is a loss, ``"mse"`` or ``"ce"``, and the number of
            classes K; a value is a pair of arrays, distances and quotients.
        descents: Curves of runs of gradient descent, drawn as lines, with the same keys.
        threshold: Curves along the flat direction at the threshold.
        path: Path of both files, without an extension.

    Returns:
        The PNG and the PDF.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import numpy as np
        >>> from nclightning.figures import draw_error_bound
        >>> curves = {("mse", 4): (np.array([1e-4, 1e-2]), np.array([0.99, 0.9]))}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     [path.name for path in draw_error_bound(curves, curves, curves, Path(folder, "bound"))]
        ['bound.png', 'bound.pdf']
    """
    losses = list(dict.fromkeys(loss for loss, _ in descents))
    with panels(len(losses) + 1, most_columns=3) as (figure, grid):
        for axes, loss in zip(grid, losses, strict=False):
            classes = [K for own, K in descents if own == loss]
            for i, K in enumerate(classes):
                shade = str(0.75 * i / max(len(classes) - 1, 1))
                axes.scatter(*perturbed[loss, K], s=3, color=STYLES[1][0], alpha=0.25, lw=0, rasterized=True)
                axes.plot(*descents[loss, K], color=shade, lw=1.2, label=f"K = {K}" if K in _ends(classes) else None)
            axes.axhline(
                1.0, color=STYLES[2][0], ls=STYLES[2][1], label=r"bound $\mathrm{dist} \leq \|\nabla F\| / \mu$"
            )
            axes.set_title(LOSSES[loss])
            axes.set_ylabel(r"$\mu\ \mathrm{dist} / \|\nabla F\|$")
            _finish(axes, "relative distance to the optimal set")
        for i, ((loss, _), curve) in enumerate(threshold.items()):
            color, dashes = STYLES[i]
            grid[-1].plot(*curve, color=color, ls=dashes, marker=MARKERS[i], label=LOSSES[loss])
        grid[-1].set_title("at the threshold: no bound")
        grid[-1].set_ylabel(r"$\mathrm{dist} / \|\nabla F\|$")
        _finish(grid[-1], "distance to the optimal set")
        return save(figure, Path(path))


def _ends(classes: list[int]) -> tuple[int, int]:
    return classes[0], classes[-1]


def _finish(axes: Axes, label: str) -> None:
    axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(mpl.ticker.LogLocator(numticks=7))
    add_legend(axes)
