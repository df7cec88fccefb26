"""The optimum of a problem, as a table and in sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.nn.functional import normalize

from nclightning.figures.tables import titled_table
from nclightning.problems import NoAnswer, Problem, rank_thresholds
from nclightning.problems.coincidence import coinciding_groups

__all__ = ["no_answer", "optimum_parts", "threshold_parts"]

_MOST_RANGES = 12  # Largest number of ranges of classes in a sentence.
_MOST_SENTENCES = 6
_MOST_MEANS = 2000  # Largest number of means whose pairwise angles are computed.
_ACCURACY = 1e-6  # Relative accuracy of thresholds.
_EPSILON = torch.finfo(torch.float64).eps
_LOWEST = 1e-2  # Where the search begins, relative to the given penalties, or to the threshold if that is smaller.


def optimum_parts(problem: Problem) -> Iterator[Table | Text]:
    """Describe the optimum, or say why it is not known and what is known instead.

    Args:
        problem: The problem.

    Yields:
        Tables and paragraphs for a rich console.
    """
    try:
        optimum = problem.optimum
    except NoAnswer as missing:
        yield no_answer(missing)
        yield from _known(problem)
        return
    table = titled_table("The optimum", "", "value", "")
    table.add_row("minimum F*", f"{problem.optimal_value:.10g}", "")
    # The certificate cannot be more accurate than the rounding of F*.
    gap = max(optimum.duality_gap, _EPSILON * abs(problem.optimal_value))
    certified = f"certified to {gap:.1g}" if math.isfinite(optimum.duality_gap) else ""
    table.add_row("found by", "a formula" if optimum.method == "closed form" else "the solver", certified)
    _add_threshold(table, problem)
    table.add_row("rank of the logits", f"{optimum.rank}", f"d = {problem.feature_dim}")
    if problem.feature_dim >= problem.convex_optimum.rank:
        table.add_row("margin", f"{optimum.margin:.4g}", "0 where the rank rises")
    if optimum.rank:
        table.add_row("singular values", _span(optimum.factors.singular), "of logits times sqrt(n)")
    try:
        _add_geometry(table, problem)
        if optimum.factors.bias is not None:
            table.add_row("bias", _span(optimum.factors.bias), "")
        free = (problem.num_classes + problem.num_samples) * problem.feature_dim
        free += problem.num_classes if problem.has_bias else 0
        table.add_row("dimension of optimal set", f"{problem.dimension}", f"of {free} free variables")
        sentences = _coincidences(problem)
    except NoAnswer as missing:
        sentences = [no_answer(missing)]
    yield table
    yield from sentences


def no_answer(missing: NoAnswer) -> Text:
    """Write why a question has no answer.

    Args:
        missing: The exception.

    Returns:
        A paragraph.
    """
    return Text(f"No {missing.question}: {missing.reason}")


def threshold_parts(problem: Problem) -> Iterator[Table | Text]:
    """List the penalties at which the rank of the optimal logits falls.

    Args:
        problem: The problem.

    Yields:
        A table for a rich console, or a paragraph that says why there is none.
    """
    product, highest = problem.strength**2, problem.threshold
    lowest = _LOWEST * min(product, highest)
    if not lowest > 0:  # The optimum is zero for all penalties.
        return
    try:
        found = rank_thresholds(problem, lowest, _ACCURACY)
        rank = problem.convex_optimum.rank
    except NoAnswer as missing:
        yield no_answer(missing)
        return
    table = titled_table("Where the rank of the logits falls", "from lambda_w lambda_h on", "rank", "")
    # If several directions vanish at once, the lowest rank is shown. Bisection may end slightly above the threshold.
    falls = {f"{min(value, highest):.5g}": below - 1 for below, value in sorted(found.items(), reverse=True)}
    rows = [(float(value), each, "zero" if each == 0 else "") for value, each in falls.items()]
    for value, each, note in sorted([*rows, (product, rank, "as given")]):
        table.add_row(f"{value:.5g}", f"{each}", note)
    table.caption = f"Searched from {lowest:.2g} on, both penalties in the ratio given."
    yield table


def _add_geometry(table: Table, problem: Problem) -> None:
    """Add norms and angles. They are the same at every optimum if d is at least the rank of the optimum."""
    optimal = problem.optimal_set
    if not optimal.optimum.rank or problem.feature_dim < optimal.optimum.rank:
        return
    means, rows = optimal.feature_factor, optimal.weight_factor
    of = "class" if problem.groups_are_classes else "group"
    table.add_row(f"norms of the {of} means", _span(means.norm(dim=1)), "")
    table.add_row("norms of the head's rows", _span(rows.norm(dim=1)), "")
    means = means[means.norm(dim=1) > 0]
    if 1 < len(means) <= _MOST_MEANS:
        cosines = normalize(means) @ normalize(means).T
        first, second = torch.triu_indices(len(means), len(means), 1).unbind()
        table.add_row(f"cosines of {of} means", _span(cosines[first, second].clamp(-1, 1)), "")
    if problem.groups_are_classes and bool(problem.present.all()):
        aligned = (normalize(optimal.feature_factor) * normalize(rows)).sum(dim=1)
        table.add_row("cosines of mean and row", _span(aligned), "")


def _coincidences(problem: Problem) -> list[Text]:
    """Say which groups have zero features, and which groups share a feature."""
    vanished, shared = coinciding_groups(problem)
    one, several = ("Class", "Classes") if problem.groups_are_classes else ("Group", "Groups")
    if len(vanished) == int(problem.present.sum()):
        return [Text("The optimum is zero: nothing is learned.")]
    sentences = []
    if vanished:
        verb = f"{one} {vanished[0]} has" if len(vanished) == 1 else f"{several} {_ranges(vanished)} have"
        sentences.append(f"{verb} vanished: the features are zero.")
    for groups in shared[:_MOST_SENTENCES]:
        rows = problem.optimal_set.weight_factor[list(groups)] if problem.groups_are_classes else None
        alike = rows is not None and bool((rows - rows[0]).norm(dim=1).max() <= 1e-7 * rows.norm(dim=1).max())
        sentences.append(f"{several} {_ranges(groups)} share one feature{' and one row of the head' if alike else ''}.")
    if len(shared) > _MOST_SENTENCES:
        left = shared[_MOST_SENTENCES:]
        sentences.append(f"{sum(map(len, left))} more share {len(left)} features.")
    return [Text(sentence) for sentence in sentences]


def _ranges(numbers: Sequence[int]) -> str:
    """Write ascending numbers, three or more consecutive ones as a range: ``"0, 3, 5-9"``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    more = len(numbers) - sum(map(len, runs[:_MOST_RANGES]))
    return ", ".join(parts[:_MOST_RANGES]) + (f" and {more} more" if more else "")


def _span(values: Tensor) -> str:
    """Write the least and the greatest value."""
    ends = [f"{0.0 if abs(value) < 1e-12 else value:.4g}" for value in (float(values.min()), float(values.max()))]
    return " to ".join(dict.fromkeys(ends))


def _known(problem: Problem) -> Iterator[Table]:
    """Tabulate the threshold, and the minimum for larger d, which is a lower bound of F*."""
    table = titled_table("What is known", "", "value", "")
    with suppress(NoAnswer):
        _add_threshold(table, problem)
        relaxed = problem.convex_optimum
        table.add_row("lower bound of F*", f"{relaxed.value:.10g}", f"the minimum from d = {relaxed.rank} on")
    if table.row_count:
        yield table


def _add_threshold(table: Table, problem: Problem) -> None:
    table.add_row("lambda_w lambda_h", f"{problem.strength**2:.6g}", f"threshold {problem.threshold:.6g}")
