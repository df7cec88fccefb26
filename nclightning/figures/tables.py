"""Last values and fitted rates as a table in the terminal."""

from __future__ import annotations

from rich.table import Table

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
    table = Table(title=f"{title}\n{reached}" if title else reached)
    table.add_column("quantity", no_wrap=True)
    for column in ("last value", "factor/it.", "it./decade", "R^2", "decades"):
        table.add_column(column, justify="right", no_wrap=True)
    for tag, value in summary.last.items():
        fit, cells = summary.fits[tag], ["-"] * 4
        if fit is not None:
            cells = [
                f"{fit.factor:.6f}",
                f"{fit.iterations_per_decade:.4g}",
                f"{fit.r_squared:.5f}",
                f"{fit.decades:.1f}",
            ]
        table.add_row(QUANTITIES[tag], f"{value:.3e}", *cells)
    if summary.kappa is not None:
        table.add_row("kappa", f"{summary.kappa:.6g}", *["-"] * 4)
    if problem is not None:
        table.add_row("kappa, predicted", f"{problem.error_bound_constant:.6g}", *["-"] * 4)
    return table
