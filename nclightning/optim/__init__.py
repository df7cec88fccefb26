"""Optimizers for deterministic objectives. Plain torch."""

from nclightning.optim.armijo import ArmijoGD
from nclightning.optim.outcome import SearchOutcome, SearchStatus

__all__ = ["ArmijoGD", "SearchOutcome", "SearchStatus"]
