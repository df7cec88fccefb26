"""A picture of the Hessian's spectrum at the optimal set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nclightning.errors import UserError
from nclightning.figures.runs import LOSSES, scientific
from nclightning.files import replaced
from nclightning.theory import Eigenvalue, UFMProblem

__all__ = ["draw_spectrum"]

# Sectors by the beginnings of their names. Colours stay apart in the common kinds of colour blindness, markers in grey.
_GROUPS: tuple[tuple[str, tuple[str, ...], str, str], ...] = (
    ("within classes", ("within-class",), "#009E73", "o"),
    ("symmetric in head and means", ("symmetric", "head and feature means"), "#0072B2", "D"),
    ("skew, and left out", ("skew", "left out"), "#D55E00", "s"),
    ("means orthogonal to the range", ("means, orthogonal",), "#E69F00", "^"),
    ("overall means and bias", ("mean of", "bias"), "#000000", "v"),
)
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "pdf.fonttype": 42,  # Text stays text.
}


def draw_spectrum(problem: UFMProblem, path: str | Path) -> Path:
    """Draw eigenvalues against multiplicities on log axes, zeros in a strip of their own, with mu and L.

    Args:
        problem: Sizes and penalties.
        path: Where to write. The ending decides the format.

    Returns:
        Where it was written.

    Raises:
        ValueError: If the ending is not that of a picture, or the file cannot be written.
    """
    path, figure = Path(path), Figure(figsize=(6.4, 4.2), layout="constrained")
    formats = FigureCanvasAgg(figure).get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in formats:
        raise UserError(f"--picture {path}: the ending must be one of {', '.join(sorted(formats))}.")
    entries = problem.spectrum()
    zeros, others = [e for e in entries if e.value == 0], [e for e in entries if e.value > 0]
    with mpl.rc_context(_STYLE):
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1, 9))
        _draw_stems(left, [e._replace(value=i - (len(zeros) - 1) / 2) for i, e in enumerate(zeros)])
        _draw_stems(right, others)
        left.set(xlim=(-1.5, 1.5), xticks=[0], xticklabels=["0"], ylabel="multiplicity", yscale="log")
        if not zeros:
            left.set_xticks([])
        right.set(xscale="log", xlabel="eigenvalue of the Hessian at the optimal set")
        right.tick_params(axis="y", which="both", left=False, labelleft=False)
        right.spines["left"].set_visible(False)
        left.set_ylim(bottom=0.6, top=2.5 * max(e.multiplicity for e in entries))
        low, high = others[0].value, others[-1].value
        right.set_xlim(low / (high / low) ** 0.08 / 1.2, high * (high / low) ** 0.08 * 1.2)
        for value, label in ((problem.mu, rf"$\mu = {problem.mu:.4g}$"), (high, f"$L = {high:.4g}$")):
            if value > 0:
                right.axvline(value, color="0.6", lw=0.9, ls=(0, (3, 2)), zorder=0)
                right.annotate(
                    label, (value, 1), xycoords=("data", "axes fraction"), xytext=(0, 2), textcoords="offset points",
                    ha="center", va="bottom", fontsize=8,
                )  # fmt: skip
        _add_legend(figure, entries)
        figure.suptitle(_title(problem), fontsize=9)
        try:
            with replaced(path) as partial:
                figure.savefig(partial, dpi=200)
        except OSError as error:
            raise UserError(f"--picture {path}: cannot be written ({error.strerror or error}).") from error
    return path


def _title(problem: UFMProblem) -> str:
    return (
        f"{LOSSES[problem.loss]}, $K = {problem.num_classes}$, $n = {problem.samples_per_class}$, "
        rf"$d = {problem.feature_dim}$, $\lambda_W = {scientific(problem.lambda_w)}$, "
        rf"$\lambda_H = {scientific(problem.lambda_h)}$"
    )


def _draw_stems(axes: Axes, entries: Sequence[Eigenvalue]) -> None:
    for _, starts, color, marker in _GROUPS:
        mine = [e for e in entries if e.sector.startswith(starts)]
        values, counts = [e.value for e in mine], [e.multiplicity for e in mine]
        axes.vlines(values, 0.01, counts, color=color, lw=1.2)
        axes.plot(values, counts, color=color, marker=marker, ls="none", ms=5)


def _add_legend(figure: Figure, entries: Sequence[Eigenvalue]) -> None:
    """Below the panels, with the groups that occur."""
    handles = [
        mpl.lines.Line2D([], [], color=color, marker=marker, ms=5, lw=1.2, label=name)
        for name, starts, color, marker in _GROUPS
        if any(e.sector.startswith(starts) for e in entries)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
