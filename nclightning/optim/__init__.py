"""Optimizers for deterministic objectives. Plain torch."""

from nclightning.optim.armijo import ArmijoGD
from nclightning.optim.line import ClosureLine, LineObjective
from nclightning.optim.line_search import LineSearchOptimizer
from nclightning.optim.outcome import SearchOutcome, SearchStatus

__all__ = [
    "ArmijoGD",
    "ClosureLine",
    "LineObjective",
    "LineSearchOptimizer",
    "SearchOutcome",
    "SearchStatus",
]
