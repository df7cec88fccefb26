"""Optimizers for deterministic objectives. Plain torch."""

from nclightning.optim.armijo import ArmijoGD, SearchOutcome, SearchStatus

__all__ = ["ArmijoGD", "SearchOutcome", "SearchStatus"]
