"""Forwards of a Lightning module that leave no trace in it, nor in what its user logs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import lightning as L

from nclightning.compat.lightning import shown_as_validating
from nclightning.compat.twins import logging_nothing
from nclightning.probe.sweep import eager, frozen

__all__ = ["unseen"]


@contextmanager
def unseen(pl_module: L.LightningModule) -> Iterator[None]:
    """Run a module frozen and uncompiled, without a trace in it and in what its user logs.

    Calls of ``log``, ``log_dict`` and of the trainer's loggers in the forward do nothing. While a trainer trains, it
    says that it validates: hooks of the user that augment batches look at that, too.
    """
    trainer = pl_module.trainer
    with shown_as_validating(trainer), logging_nothing(trainer, pl_module), frozen(pl_module), eager():
        yield
