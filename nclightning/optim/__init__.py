"""Optimizers for deterministic objectives. Plain torch."""

from nclightning.optim.armijo import ArmijoGD
from nclightning.optim.line import ClosureLine, LineObjective
from nclightning.optim.momentum import HeavyBall, Nesterov
from nclightning.optim.outcome import SearchOutcome, SearchStatus

__all__ = ["ArmijoGD", "ClosureLine", "HeavyBall", "LineObjective", "Nesterov", "SearchOutcome", "SearchStatus"]
