"""The predictions of the theory for a problem, as tables in the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from rich.table import Table
from rich.text import Text

from nclightning.figures.optimum import no_answer, optimum_parts, threshold_parts
from nclightning.figures.tables import titled_table
from nclightning.problems import Eigenvalue, NoAnswer, Problem
from nclightning.theory import UFMProblem

__all__ = ["describe_problem", "prediction_tables"]

_MOST_ROWS = 25  # Largest number of rows in the table of eigenvalues.
_EQUAL = 1e-9  # Relative difference up to which computed eigenvalues count as equal.
_MOST_SEARCHED = 50  # Largest number of classes for which thresholds are searched by default.


def prediction_tables(problem: UFMProblem | Problem, thresholds: bool = False) -> Iterator[Table | Text]:
    """Lay out optimum, spectrum, conditioning and rates, each as soon as it is computed.

    Args:
        problem: The unconstrained feature model.
        thresholds: Whether to search for the penalties at which the rank of the optimum falls even if the problem must
            be solved many times for that.

    Yields:
        Tables for a rich console, and paragraphs that say which question has no answer, and why.
    """
    if isinstance(problem, UFMProblem):
        yield _optimum(problem)
    else:
        yield from optimum_parts(problem)
        if thresholds or _has_formula(problem):
            yield from threshold_parts(problem)
    try:
        yield _spectrum(problem.spectrum())
        yield _curvature(problem)
        yield _descent(problem)
        if problem.mu:
            yield _momentum(problem)
    except NoAnswer as missing:
        if missing.question == "spectrum":  # Other missing answers are reported with the optimum.
            yield no_answer(missing)


def describe_problem(problem: UFMProblem | Problem) -> str:
    """Write loss, sizes and penalties in one line of text."""
    if isinstance(problem, Problem):
        return problem.summary()
    return (
        f"{problem.loss.upper()} loss, K = {problem.num_classes}, n = {problem.samples_per_class}, "
        f"d = {problem.feature_dim}, lambda_w = {problem.lambda_w:g}, lambda_h = {problem.lambda_h:g}"
    )


def _has_formula(problem: Problem) -> bool:
    """Say whether the thresholds are cheap, because the optimum has a formula."""
    try:
        return problem.convex_optimum.method == "closed form" and problem.num_classes <= _MOST_SEARCHED
    except NoAnswer:
        return False


def _optimum(problem: UFMProblem) -> Table:
    table = titled_table("The optimum", "", "value", "")
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


def _spectrum(entries: Sequence[Eigenvalue]) -> Table:
    table = titled_table("The Hessian of F at the optimal set", "eigenvalue", "multiplicity", "sector")
    table.columns[0].justify = "right"
    for part in _parts(entries):
        ends = dict.fromkeys(f"{each.value:.7g}" for each in (part[0], part[-1]))
        table.add_row(" to ".join(ends), f"{sum(each.multiplicity for each in part)}", part[0].sector)
        if len(ends) > 1:
            table.caption = "A row may hold several neighbouring eigenvalues of a sector."
    return table


def _parts(entries: Sequence[Eigenvalue]) -> list[list[Eigenvalue]]:
    """Group the eigenvalues of each sector into rows of the table, at most ``_MOST_ROWS`` if the sectors are fewer.

    Groups are separated where the quotient of neighbouring eigenvalues is largest. Zeros stay in one group, and so do
    eigenvalues that are equal up to rounding.
    """
    sectors: dict[tuple[str, bool], list[Eigenvalue]] = {}
    for entry in sorted(entries):
        sectors.setdefault((entry.sector, entry.value > 0), []).append(entry)
    quotients = sorted(
        (low.value / high.value, sector, i + 1)
        for sector, own in sectors.items()
        if sector[1]
        for i, (low, high) in enumerate(pairwise(own))
        if low.value < high.value * (1 - _EQUAL)
    )
    cuts: dict[tuple[str, bool], list[int]] = {}
    for _, sector, place in quotients[: max(0, _MOST_ROWS - len(sectors))]:
        cuts.setdefault(sector, []).append(place)
    parts = []
    for sector, own in sectors.items():
        ends = [0, *sorted(cuts.get(sector, [])), len(own)]
        parts += [own[start:end] for start, end in pairwise(ends)]
    return sorted(parts)


def _curvature(problem: UFMProblem | Problem) -> Table:
    mu, smoothness = problem.mu, problem.smoothness
    table = titled_table("Conditioning", "", "value", "")
    table.add_row("mu", f"{mu:.7g}", "least nonzero eigenvalue" if mu else "at the threshold")
    table.add_row("L", f"{smoothness:.7g}", "largest eigenvalue")
    table.add_row("L / mu", f"{smoothness / mu if mu else math.inf:.7g}", "condition number")
    table.add_row("kappa", f"{problem.error_bound_constant:.7g}", "error-bound constant 1/mu")
    table.add_row("best fixed step", f"{problem.best_step:.7g}", "2/(mu + L)")
    table.add_row("largest fixed step", f"{2 / smoothness:.7g}", "below 2/L")
    return table


def _descent(problem: UFMProblem | Problem) -> Table:
    table = Table(title="Gradient descent near the optimal set", title_justify="left", caption_justify="left")
    safe, mu = 1 / problem.smoothness, problem.mu
    table.caption = "Falls as exp(-rate x sum of steps)."
    table.add_column("", no_wrap=True)
    for column in ("rate", "it./decade at 1/L", "at the best step"):
        table.add_column(column, justify="right", no_wrap=True)
    gaps = [problem.iterations_per_decade(step) for step in (safe, problem.best_step)]
    table.add_row("gap F - F*", f"{2 * mu:.7g}", *(f"{count:.6g}" for count in gaps))
    table.add_row("distance", f"{mu:.7g}", *(f"{2 * count:.6g}" for count in gaps))
    if isinstance(problem, UFMProblem):
        table.caption += " *: heuristic."
        _add_metrics(table, problem, safe)
    return table


def _momentum(problem: UFMProblem | Problem) -> Table:
    table = Table(title="Fixed step and momentum near the optimal set", title_justify="left", caption_justify="left")
    table.caption = "With momentum the distance falls like k x factor^k."
    table.add_column("", no_wrap=True)
    for column in ("step", "momentum", "factor", "it./decade of the gap"):
        table.add_column(column, justify="right", no_wrap=True)
    plain = problem.best_step, 0.0, problem.contraction(), problem.iterations_per_decade()
    rows = {"gradient descent": plain}
    for name, best in (("Nesterov", problem.nesterov()), ("heavy ball", problem.heavy_ball())):
        rows[name] = best.step, best.momentum, best.contraction, best.iterations_per_decade
    for name, (step, momentum, factor, count) in rows.items():
        table.add_row(name, f"{step:.7g}", f"{momentum:.6f}", f"{factor:.6f}", f"{count:.6g}")
    return table


def _add_metrics(table: Table, problem: UFMProblem, step: float) -> None:
    rates, factors = problem.decay_rates(), problem.decay_factors(step)
    for name, rate, factor in zip(("NC1", "NC2", "NC3"), rates[2:], factors[2:], strict=True):
        if not math.isnan(rate):  # The prediction is valid only for steps shorter than the best step.
            table.add_row(f"{name} *", f"{rate:.7g}", f"{-math.log(10) / math.log(factor):.6g}", "-")
