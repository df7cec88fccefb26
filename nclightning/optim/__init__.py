"""Optimizers for deterministic objectives. Plain torch."""

from nclightning.optim.armijo import ArmijoGD
from nclightning.optim.cg import ArmijoCG
from nclightning.optim.lbfgs import ArmijoLBFGS
from nclightning.optim.line import ClosureLine, LineObjective
from nclightning.optim.line_search import LineSearchOptimizer
from nclightning.optim.momentum import HeavyBall, Nesterov
from nclightning.optim.newton import ArmijoNewtonCG
from nclightning.optim.outcome import SearchOutcome, SearchStatus

__all__ = [
    "ArmijoCG",
    "ArmijoGD",
    "ArmijoLBFGS",
    "ArmijoNewtonCG",
    "ClosureLine",
    "HeavyBall",
    "LineObjective",
    "LineSearchOptimizer",
    "Nesterov",
    "SearchOutcome",
    "SearchStatus",
]
