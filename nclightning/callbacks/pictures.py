"""Pictures of class means and head for TensorBoard."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from nclightning.functional import ClassStatistics

__all__ = ["draw_angles"]


def draw_angles(loggers: Iterable[Any], tag: str, stats: ClassStatistics, weight: Tensor, step: int) -> None:
    """Draw cosines among class means, among rows of the head, and between the two.

    Args:
        loggers: Those that have TensorBoard's ``add_figure`` get the picture.
        tag: Under this.
        stats: Statistics of the features.
        weight: Head ``(K, d)``.
        step: x-axis.
    """
    writers = [logger.experiment for logger in loggers if hasattr(getattr(logger, "experiment", None), "add_figure")]
    if not writers:
        return
    means, head = (_unit(rows) for rows in (stats.centred_means, weight.detach().to(stats.means)))
    cosines = [means @ means.T, head @ head.T, head @ means.T]
    images = torch.stack(cosines).cpu().numpy()
    num_classes = len(head)
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(9.6, 3.3), layout="constrained")
        axes = figure.subplots(1, 3)
        for axis, image, title in zip(
            axes, images, ("class means", "head", "head (rows) to means (columns)"), strict=True
        ):
            shown = axis.imshow(image, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
            off = np.abs(image[~np.eye(num_classes, dtype=bool)] + 1 / (num_classes - 1)).max()
            axis.set_title(f"{title}\nlargest deviation from $-1/(K-1)$: {off:.1e}")
            axis.set_xlabel("class")
        axes[0].set_ylabel("class")
        figure.colorbar(shown, ax=axes, label=f"cosine; a simplex ETF has 1 and {-1 / (num_classes - 1):.3f}")
    for writer in writers:
        writer.add_figure(tag, figure, step, close=False)


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=1)
