"""A picture of the Hessian's spectrum at the optimal set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nclightning.errors import UserError
from nclightning.figures.runs import LOSSES, scientific, sizes_in_mathtext
from nclightning.files import replaced
from nclightning.problems import Eigenvalue, Problem
from nclightning.problems.wording import loss_in_words
from nclightning.theory import UFMProblem

__all__ = ["draw_spectrum"]

# Groups of sectors, by prefixes of their names. The colours are distinct in the common kinds of colour blindness, the
# markers in grey.
_Groups: TypeAlias = tuple[tuple[str, tuple[str, ...], str, str], ...]
_BALANCED: _Groups = (
    ("within classes", ("within-class",), "#009E73", "o"),
    ("symmetric in head and means", ("symmetric", "head and feature means"), "#0072B2", "D"),
    ("skew, and left out", ("skew", "left out"), "#D55E00", "s"),
    ("means orthogonal to the range", ("means, orthogonal",), "#E69F00", "^"),
    ("overall means and bias", ("mean of", "bias"), "#000000", "v"),
)
_GENERAL: _Groups = (
    ("within groups", ("within groups",), "#009E73", "o"),
    ("in the range of the features", ("in range",), "#0072B2", "D"),
    ("orthogonal to it", ("orthogonal", "head, orthogonal", "means, orthogonal"), "#E69F00", "^"),
    ("bias", ("bias",), "#000000", "v"),
)
_LARGE, _MOST_LARGE = 5.0, 60  # Size of a marker, and the number of markers up to which it is used.
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "pdf.fonttype": 42,  # Text stays text.
}


def draw_spectrum(problem: UFMProblem | Problem, path: str | Path) -> Path:
    """Draw the multiplicity of each eigenvalue of the Hessian at the optimal set, on log axes, with mu and L.

    Zero eigenvalues are in a panel of their own.

    Args:
        problem: The unconstrained feature model.
        path: File to write. The extension decides the format.

    Returns:
        The file.

    Raises:
        ValueError: If the extension is not that of a picture, or if the file cannot be written.
        NoAnswer: If the spectrum is not known.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from nclightning.figures import draw_spectrum
        >>> from nclightning.theory import UFMProblem
        >>> problem = UFMProblem("mse", 4, 10, 6, lambda_w=5e-3, lambda_h=5e-4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     draw_spectrum(problem, Path(folder, "spectrum.png")).name
        'spectrum.png'
    """
    path, figure = Path(path), Figure(figsize=(6.4, 4.2), layout="constrained")
    formats = FigureCanvasAgg(figure).get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in formats:
        raise UserError(f"--picture {path}: the ending must be one of {', '.join(sorted(formats))}.")
    entries = problem.spectrum()
    groups = _GENERAL if isinstance(problem, Problem) else _BALANCED
    size = _LARGE if len(entries) <= _MOST_LARGE else _LARGE / 2
    zeros, others = [e for e in entries if e.value == 0], [e for e in entries if e.value > 0]
    with mpl.rc_context(_STYLE):
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1, 9))
        _draw_stems(left, [e._replace(value=i - (len(zeros) - 1) / 2) for i, e in enumerate(zeros)], groups, size)
        _draw_stems(right, others, groups, size)
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
        _add_legend(figure, entries, groups)
        figure.suptitle(_title(problem), fontsize=9)
        try:
            with replaced(path) as partial:
                figure.savefig(partial, dpi=200)
        except OSError as error:
            raise UserError(f"--picture {path}: cannot be written ({error.strerror or error}).") from error
    return path


def _title(problem: UFMProblem | Problem) -> str:
    penalties = rf"$\lambda_W = {scientific(problem.lambda_w)}$, $\lambda_H = {scientific(problem.lambda_h)}$"
    if isinstance(problem, Problem):
        if problem.lambda_b:
            penalties += rf", $\lambda_b = {scientific(problem.lambda_b)}$"
        return f"{loss_in_words(problem)}\n{sizes_in_mathtext(problem)}, {penalties}"
    return (
        f"{LOSSES[problem.loss]}, $K = {problem.num_classes}$, $n = {problem.samples_per_class}$, "
        f"$d = {problem.feature_dim}$, {penalties}"
    )


def _draw_stems(axes: Axes, entries: Sequence[Eigenvalue], groups: _Groups, size: float) -> None:
    for _, starts, color, marker in groups:
        mine = [e for e in entries if e.sector.startswith(starts)]
        values, counts = [e.value for e in mine], [e.multiplicity for e in mine]
        axes.vlines(values, 0.01, counts, color=color, lw=0.24 * size)
        axes.plot(values, counts, color=color, marker=marker, ls="none", ms=size)


def _add_legend(figure: Figure, entries: Sequence[Eigenvalue], groups: _Groups) -> None:
    """Add a legend below the panels, with the groups that occur."""
    handles = [
        mpl.lines.Line2D([], [], color=color, marker=marker, ms=5, lw=1.2, label=name)
        for name, starts, color, marker in groups
        if any(e.sector.startswith(starts) for e in entries)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
