"""What the theory predicts for a problem, as tables in the terminal."""

from __future__ import annotations

import math

from rich.table import Table

from nclightning.theory import UFMProblem

__all__ = ["describe_problem", "prediction_tables"]


def prediction_tables(problem: UFMProblem) -> list[Table]:
    """Lay out optimum, spectrum, conditioning and rates.

    Args:
        problem: Sizes and penalties.

    Returns:
        For a rich console.
    """
    return [_optimum(problem), _spectrum(problem), _curvature(problem), _descent(problem)]


def describe_problem(problem: UFMProblem) -> str:
    """Write loss, sizes and penalties on one line."""
    return (
        f"{problem.loss.upper()} loss, K = {problem.num_classes}, n = {problem.samples_per_class}, "
        f"d = {problem.feature_dim}, lambda_w = {problem.lambda_w:g}, lambda_h = {problem.lambda_h:g}"
    )


def _optimum(problem: UFMProblem) -> Table:
    table = _table("The optimum", "", "value", "")
    strength = f"K q = {problem.num_classes * problem.q:.6g}"
    if problem.collapses:
        table.add_row("neural collapse", "yes", f"{strength} < 1")
    else:
        table.add_row("neural collapse", "no", f"{strength}: the optimum is zero")
    product = problem.lambda_w * problem.lambda_h
    table.add_row("lambda_w lambda_h", f"{product:.6g}", f"threshold {problem.threshold:.6g}")
    table.add_row("minimum F*", f"{problem.optimal_value:.10g}", "")
    table.add_row(
        "scale of the head",
        f"{problem.weight_scale:.6g}",
        f"{problem.rank} singular values" if problem.collapses else "",
    )
    table.add_row("scale of the features", f"{problem.feature_scale:.6g}", "of the class means")
    table.add_row("scale of the logits", f"{problem.logit_scale:.6g}", "logits s (e_k - 1/K)")
    free = sum(e.multiplicity for e in problem.spectrum())
    table.add_row("dimension of the optimal set", f"{problem.dimension}", f"of {free} free variables")
    return table


def _spectrum(problem: UFMProblem) -> Table:
    table = _table("The Hessian of F at the optimal set", "eigenvalue", "multiplicity", "sector")
    table.columns[0].justify = "right"
    for value, multiplicity, sector in problem.spectrum():
        table.add_row(f"{value:.7g}", f"{multiplicity}", sector)
    return table


def _curvature(problem: UFMProblem) -> Table:
    mu, smoothness = problem.mu, problem.smoothness
    table = _table("Conditioning", "", "value", "")
    table.add_row("mu", f"{mu:.7g}", "least nonzero eigenvalue" if mu else "at the threshold")
    table.add_row("L", f"{smoothness:.7g}", "largest eigenvalue")
    table.add_row("L / mu", f"{smoothness / mu if mu else math.inf:.7g}", "condition number")
    table.add_row("kappa", f"{problem.error_bound_constant:.7g}", "error-bound constant 1/mu")
    table.add_row("best fixed step", f"{problem.best_step:.7g}", "2/(mu + L)")
    table.add_row("largest fixed step", f"{2 / smoothness:.7g}", "below 2/L")
    return table


def _descent(problem: UFMProblem) -> Table:
    table = Table(title="Gradient descent near the optimal set", title_justify="left")
    safe, rates = 1 / problem.smoothness, problem.decay_rates()
    table.caption = "Falls as exp(-rate x sum of steps). *: heuristic."
    table.caption_justify = "left"
    table.add_column("", no_wrap=True)
    for column in ("rate", "it./decade at 1/L", "at the best step"):
        table.add_column(column, justify="right", no_wrap=True)
    gaps = [problem.iterations_per_decade(step) for step in (safe, problem.best_step)]
    table.add_row("gap F - F*", f"{rates.gap:.7g}", *(f"{count:.6g}" for count in gaps))
    table.add_row("distance", f"{rates.distance:.7g}", *(f"{2 * count:.6g}" for count in gaps))
    for name, rate, factor in zip(("NC1", "NC2", "NC3"), rates[2:], problem.decay_factors(safe)[2:], strict=True):
        if not math.isnan(rate):  # The best step is longer than those that the prediction is for.
            table.add_row(f"{name} *", f"{rate:.7g}", f"{-math.log(10) / math.log(factor):.6g}", "-")
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column, justify in zip(columns, ("left", "right", "left"), strict=True):
        table.add_column(column, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    return table
