"""Pictures of class means and head for the loggers of a trainer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from nclightning.functional import ClassStatistics
from nclightning.pictures import picture_writers

__all__ = ["draw_angles"]

# Title, and what columns and rows are.
_PANELS = (
    ("class means", "", "class"),
    ("rows of the head", "", "class"),
    ("head against means", "class mean", "row of the head"),
)


def draw_angles(
    loggers: Sequence[Any], tag: str, stats: ClassStatistics, weight: Tensor, step: int, *, joins_next: bool = False
) -> None:
    """Draw cosines among class means, among rows of the head and between the two, beside those of a simplex ETF.

    Args:
        loggers: Those that take pictures get it.
        tag: Under this.
        stats: Statistics of the features.
        weight: Head ``(K, d)``.
        step: x-axis.
        joins_next: Whether values of the same step are logged next, as one row with the picture where rows count.
    """
    writers = picture_writers(loggers)
    if not writers:
        return
    means, head = (_unit(rows) for rows in (stats.centred_means, weight.detach().to(stats.means)))
    cosines = torch.stack([means @ means.T, head @ head.T, head @ means.T]).cpu().numpy()
    image = _scene(len(head)).draw(cosines, step)
    for write in writers:
        write(tag, image, step, joins_next=joins_next)


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=1)


class _Scene:
    """The picture without its numbers, drawn once: axes take most of the time and stay the same."""

    def __init__(self, num_classes: int) -> None:
        self._etf = np.full((num_classes, num_classes), -1 / (num_classes - 1))
        np.fill_diagonal(self._etf, 1.0)
        with mpl.rc_context({"font.size": 8, "axes.titlesize": 9}):
            # Loggers show pictures small, TensorBoard 340 pixels wide: small, and with few words, they stay legible.
            self._figure = Figure(figsize=(4.8, 4.9), dpi=100)
            canvas: Any = FigureCanvasAgg(self._figure)
            grid = {"left": 0.09, "right": 0.83, "bottom": 0.09, "top": 0.84, "wspace": 0.3, "hspace": 0.55}
            *panels, goal = self._figure.subplots(2, 2, gridspec_kw=grid).flat
            self._images = [axes.imshow(self._etf, "RdBu_r", vmin=-1, vmax=1) for axes in panels]
            for axes, (_, x, y) in zip(panels, _PANELS, strict=True):
                axes.set(xlabel=x, ylabel=y)
            shown = goal.imshow(self._etf, "RdBu_r", vmin=-1, vmax=1)
            goal.set(
                xlabel="class", ylabel="class", title=f"simplex ETF, where\ncollapse ends: 1, {self._etf[0, 1]:.3f}"
            )
            self._figure.colorbar(shown, self._figure.add_axes((0.87, 0.09, 0.025, 0.75)))
            self._headline = self._figure.suptitle(" ", fontsize=10)
        self._moving = [self._headline, *self._images, *(axes.title for axes in panels)]
        for artist in self._moving:
            artist.set_animated(True)
        canvas.draw()
        self._canvas, self._background = canvas, canvas.copy_from_bbox(self._figure.bbox)

    def draw(self, cosines: NDArray[np.float64], step: int) -> NDArray[np.uint8]:
        """Fill in the numbers; returns ``(height, width, 3)``."""
        self._headline.set_text(f"Step {step}: cosines between classes")
        for image, (name, _, _), values in zip(self._images, _PANELS, cosines, strict=True):
            image.set_data(values)
            image.axes.title.set_text(f"{name}\nup to {np.abs(values - self._etf).max():.0e} off the ETF")
        self._canvas.restore_region(self._background)
        for artist in self._moving:
            self._figure.draw_artist(artist)
        pixels: NDArray[np.uint8] = np.asarray(self._canvas.buffer_rgba())[..., :3].copy()
        return pixels


_scene = lru_cache(maxsize=2)(_Scene)
