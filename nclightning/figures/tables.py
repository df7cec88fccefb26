"""Last values and fitted rates as a table in the terminal."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from nclightning.figures.summary import QUANTITIES, RunSummary

__all__ = ["rates_table"]


def rates_table(summary: RunSummary, title: str = "") -> Table:
    """Lay out the table that a fit ends with.

    Args:
        summary: Of a run.
        title: Before the number of iterations.

    Returns:
        For a rich console.
    """
    reached = f"Iteration {summary.iteration}, with straight lines fitted to log10 of each quantity"
    table = Table(title=f"{escape(title)}\n{reached}" if title else reached)
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
    return table
