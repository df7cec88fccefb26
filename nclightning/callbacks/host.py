"""A Lightning module in its trainer, as measuring sees it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers.logger import DummyLogger

from nclightning.probe.sweep import eager, frozen

__all__ = ["LightningHost"]


class LightningHost:
    """A module in its trainer.

    Args:
        pl_module: The module.
    """

    def __init__(self, pl_module: L.LightningModule) -> None:
        self.module, self._trainer = pl_module, pl_module.trainer

    @property
    def device(self) -> torch.device:
        """That of the module."""
        return self.module.device

    @property
    def rank(self) -> int:
        """The trainer's."""
        return self._trainer.global_rank

    @property
    def world_size(self) -> int:
        """The trainer's."""
        return self._trainer.world_size

    def precision(self) -> AbstractContextManager[Any]:
        """Run forwards in the trainer's precision."""
        return self._trainer.precision_plugin.forward_context()

    def on_device(self, batch: Any) -> Any:
        """Take a batch through the hooks and the device transfer that those of a step go through."""
        batch = self.module._on_before_batch_transfer(self._trainer.precision_plugin.convert_input(batch))
        return self._trainer.strategy.batch_to_device(batch)

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Run the module frozen and uncompiled, without a trace in it and in what its user logs.

        Calls of ``log``, ``log_dict`` and of the trainer's loggers in the forward do nothing. While a trainer trains,
        it says that it validates: hooks of the user that augment batches look at that, too.
        """
        trainer, names = self._trainer, ("log", "log_dict")
        modules = [vars(child) for child in self.module.modules() if isinstance(child, L.LightningModule)]
        own = [{name: state[name] for name in names if name in state} for state in modules]
        loggers, stage = trainer.loggers, trainer.state.stage
        try:
            if trainer.training:
                trainer.validating = True
            for state in modules:
                state.update(dict.fromkeys(names, _log_nothing))
            trainer.loggers = [DummyLogger() for _ in loggers]
            with frozen(self.module), eager():
                yield
        finally:
            trainer.loggers, trainer.state.stage = loggers, stage
            for state, before in zip(modules, own, strict=True):
                for name in names:
                    del state[name]
                state.update(before)


def _log_nothing(*_: Any, **__: Any) -> None:
    """Stand in for ``LightningModule.log``."""
