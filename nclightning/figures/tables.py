"""Last values and fitted rates as a table in the terminal."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from nclightning.figures.rates import LinearFit
from nclightning.figures.summary import QUANTITIES, RunSummary
from nclightning.theory import UFMProblem

__all__ = ["rates_table"]


def rates_table(summary: RunSummary, title: str = "", problem: UFMProblem | None = None) -> Table:
    """Lay out the table that a fit ends with.

    Args:
        summary: Of a run.
        title: Before the number of iterations.
        problem: The unconstrained feature model that was trained, whose error-bound constant is shown beside the
            measured one. None for anything else.

    Returns:
        For a rich console.
    """
    reached = f"Iteration {summary.iteration}, with straight lines fitted to log10 of each quantity"
    table = Table(title=f"{escape(title)}\n{reached}" if title else reached)
    table.add_column("quantity", no_wrap=True)
    for column in ("last value", "factor/it.", "it./decade", "R^2", "decades"):
        table.add_column(column, justify="right", no_wrap=True)
    for tag, value in summary.last.items():
        table.add_row(QUANTITIES[tag], f"{value:.3e}", *_cells(summary.fits[tag]))
        if tag == "optimality/gap" and summary.predicted is not None:
            table.add_row("  theory", "-", *_cells(summary.predicted))
    if summary.kappa is not None:
        table.add_row("kappa", f"{summary.kappa:.6g}", *_cells(None))
    if problem is not None:
        table.add_row("  theory", f"{problem.error_bound_constant:.6g}", *_cells(None))
    return table


def _cells(fit: LinearFit | None) -> list[str]:
    if fit is None:
        return ["-"] * 4
    return [f"{fit.factor:.6f}", f"{fit.iterations_per_decade:.4g}", f"{fit.r_squared:.5f}", f"{fit.decades:.1f}"]
