"""Optimizers for deterministic objectives. They need torch only."""

from __future__ import annotations

import warnings
from typing import Any

from nclightning.optim.armijo import ArmijoGD
from nclightning.optim.cg import ArmijoCG
from nclightning.optim.lbfgs import ArmijoLBFGS
from nclightning.optim.line_search import LineSearchOptimizer
from nclightning.optim.momentum import HeavyBall, Nesterov
from nclightning.optim.newton import ArmijoNewtonCG
from nclightning.optim.objectives import ClosureObjective, LineObjective
from nclightning.optim.outcome import SearchOutcome, SearchStatus

__all__ = [
    "ArmijoCG",
    "ArmijoGD",
    "ArmijoLBFGS",
    "ArmijoNewtonCG",
    "ClosureObjective",
    "HeavyBall",
    "LineObjective",
    "LineSearchOptimizer",
    "Nesterov",
    "SearchOutcome",
    "SearchStatus",
]

_RENAMED = {"ClosureLine": "ClosureObjective"}


def __getattr__(name: str) -> Any:
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    new = _RENAMED[name]
    warnings.warn(f"nclightning.optim.{name} is now called {new}.", DeprecationWarning, stacklevel=2)
    return globals()[new]
