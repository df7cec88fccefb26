"""How each question about a problem can be answered."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nclightning.problems.no_answer import NoAnswer

if TYPE_CHECKING:
    from collections.abc import Callable

    from nclightning.problems.problem import Problem

__all__ = ["QUESTIONS", "answers"]

QUESTIONS = ("optimum", "gap", "distance", "spectrum", "rates", "threshold", "certified_lower_bound")


def answers(problem: Problem) -> dict[str, str | NoAnswer]:
    """Return ``"closed form"``, ``"numerical"``, ``"bound"`` or the :class:`NoAnswer` for each of the questions."""

    def try_to(ask: Callable[[], str]) -> str | NoAnswer:
        try:
            return ask()
        except NoAnswer as missing:
            return missing

    method = try_to(lambda: problem.optimum.method)
    spectrum = try_to(lambda: "numerical" if problem.spectrum() else "")
    has_formula = not problem.has_bias or method == "closed form"
    return {
        "optimum": method,
        "gap": try_to(lambda: problem.optimal_set.optimum.method),
        "distance": try_to(lambda: problem.optimal_set.optimum.method),
        "spectrum": spectrum,
        "rates": spectrum,
        "threshold": try_to(lambda: ("closed form" if has_formula else "numerical") if problem.threshold >= 0 else ""),
        "certified_lower_bound": "bound",
    }
