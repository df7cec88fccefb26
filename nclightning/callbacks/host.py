"""A Lightning module in its trainer, as measuring sees it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any

import lightning as L
import torch
from torch import Tensor

from nclightning.compat.lightning import moves_plainly, prepare_batch, shown_as_validating
from nclightning.compat.twins import logging_nothing
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
        batch = self._trainer.precision_plugin.convert_input(batch)
        if type(batch) in (tuple, list) and self._moves_plainly and all(isinstance(each, Tensor) for each in batch):
            device = self._trainer.strategy.root_device
            return type(batch)(each.to(device, non_blocking=device.type == "cuda") for each in batch)
        return self._trainer.strategy.batch_to_device(prepare_batch(self.module, batch))

    @cached_property
    def _moves_plainly(self) -> bool:
        return moves_plainly(self._trainer, self.module)

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Run the module frozen and uncompiled, without a trace in it and in what its user logs.

        Calls of ``log``, ``log_dict`` and of the trainer's loggers in the forward do nothing. While a trainer trains,
        it says that it validates: hooks of the user that augment batches look at that, too.
        """
        trainer, module = self._trainer, self.module
        with shown_as_validating(trainer), logging_nothing(trainer, module), frozen(module), eager():
            yield
