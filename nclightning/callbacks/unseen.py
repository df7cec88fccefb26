"""Forwards of a Lightning module that leave no trace in it, nor in what its user logs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
from lightning.pytorch.loggers.logger import DummyLogger

from nclightning.probe.sweep import eager, frozen

__all__ = ["unseen"]


@contextmanager
def unseen(pl_module: L.LightningModule) -> Iterator[None]:
    """Run a module frozen and uncompiled, without a trace in it and in what its user logs.

    Calls of ``log``, ``log_dict`` and of the trainer's loggers in the forward do nothing. While a trainer trains, it
    says that it validates: hooks of the user that augment batches look at that, too.
    """
    trainer, names = pl_module.trainer, ("log", "log_dict")
    modules = [vars(child) for child in pl_module.modules() if isinstance(child, L.LightningModule)]
    own = [{name: state[name] for name in names if name in state} for state in modules]
    loggers, stage = trainer.loggers, trainer.state.stage
    try:
        if trainer.training:
            trainer.validating = True
        for state in modules:
            state.update(dict.fromkeys(names, _log_nothing))
        trainer.loggers = [DummyLogger() for _ in loggers]
        with frozen(pl_module), eager():
            yield
    finally:
        trainer.loggers, trainer.state.stage = loggers, stage
        for state, before in zip(modules, own, strict=True):
            for name in names:
                del state[name]
            state.update(before)


def _log_nothing(*_: Any, **__: Any) -> None:
    """Stand in for ``LightningModule.log``."""
