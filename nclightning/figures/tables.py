"""Last values and fitted rates as a table in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from nclightning.figures.rates import LinearFit
from nclightning.figures.summary import RunSummary
from nclightning.problems import NoAnswer, Problem
from nclightning.quantities import CONVERGING, GAP
from nclightning.theory import UFMProblem

if TYPE_CHECKING:
    from nclightning.figures.many import Group

__all__ = ["error_bound_constant_of", "rates_table", "settings_table", "titled_table"]


# Largest matrix whose eigenvalues are computed for a table. The command ``theory`` has no such limit.
_LARGEST_MATRIX = 2000


def rates_table(summary: RunSummary, title: str = "", problem: UFMProblem | Problem | None = None) -> Table:
    """Lay out the table that is printed at the end of a fit.

    Args:
        summary: The summary of a run.
        title: Text above the number of iterations.
        problem: The unconstrained feature model that was trained. Its error-bound constant, if known, is shown next to
            the measured one. None for any other model.

    Returns:
        A table for a rich console.
    """
    reached = f"Iteration {summary.iteration}, with straight lines fitted to log10 of each quantity"
    table = Table(title=f"{escape(title)}\n{reached}" if title else reached)
    table.add_column("quantity", no_wrap=True)
    for column in ("last value", "factor/it.", "it./decade", "R^2", "decades"):
        table.add_column(column, justify="right", no_wrap=True)
    for tag, value in summary.last.items():
        table.add_row(CONVERGING[tag].text_with_formula, f"{value:.3e}", *_cells(summary.fits[tag]))
        if tag == GAP.tag() and summary.predicted is not None:
            table.add_row("  theory", "-", *_cells(summary.predicted))
    if summary.kappa is not None:
        table.add_row("kappa", f"{summary.kappa:.6g}", *_cells(None))
    constant = None if problem is None else error_bound_constant_of(problem)
    if constant is not None:
        table.add_row("  theory", f"{constant:.6g}", *_cells(None))
    return table


def error_bound_constant_of(problem: UFMProblem | Problem) -> float | None:
    """Return the error-bound constant 1/mu of a problem; None if it is not known or would take long to compute.

    Args:
        problem: The unconstrained feature model.
    """
    if isinstance(problem, UFMProblem):
        return problem.error_bound_constant
    M, K = problem.num_groups, problem.num_classes
    if (M + K) * min(M, K, problem.feature_dim) > _LARGEST_MATRIX:
        return None
    try:
        return problem.error_bound_constant
    except NoAnswer:
        return None


def settings_table(groups: Sequence[Group]) -> Table:
    """Lay out the iterations per decade of many runs, one row per setting.

    Args:
        groups: Groups of runs.

    Returns:
        A table for a rich console.
    """
    table = Table(title="Iterations per decade, median of the runs")
    for name in ("loss", "lambda_h"):
        table.add_column(name, no_wrap=True)
    recorded = [tag for tag in CONVERGING if any(tag in run.summary.last for group in groups for run in group.runs)]
    for name in ("runs", *(CONVERGING[tag].text_with_formula for tag in recorded)):
        table.add_column(name, justify="right")
    for group in groups:
        first, last = group.runs[0], group.runs[-1]
        ends = [f"{run.strength[0]:g}" for run in (first, last)]
        setting = first.name if "inf" in ends else " to ".join(dict.fromkeys(ends))
        table.add_row(
            escape(first.loss), escape(setting), str(len(group.runs)), *(_median(group, tag) for tag in recorded)
        )
    return table


def titled_table(title: str, *columns: str) -> Table:
    """Make an empty table with three columns: a name, a number and a remark.

    Args:
        title: Title above the table.
        *columns: Three headings.

    Returns:
        The table.
    """
    table = Table(title=title, title_justify="left", caption_justify="left")
    for column, justify in zip(columns, ("left", "right", "left"), strict=True):
        table.add_column(column, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    return table


def _median(group: Group, tag: str) -> str:
    fits = [run.summary.fits.get(tag) for run in group.runs]
    counts = [fit.iterations_per_decade for fit in fits if fit is not None]
    return f"{median(counts):.4g}" if counts else "-"


def _cells(fit: LinearFit | None) -> list[str]:
    if fit is None:
        return ["-"] * 4
    return [f"{fit.factor:.6f}", f"{fit.iterations_per_decade:.4g}", f"{fit.r_squared:.5f}", f"{fit.decades:.1f}"]
