"""Neural regression collapse of modules that are not full-batch, at ends of epochs."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L

from nclightning.callbacks.first_step import FirstTrainingStep
from nclightning.callbacks.host import LightningHost
from nclightning.callbacks.modules import check_strategy, only_loader
from nclightning.callbacks.publishing import HookingMonitor
from nclightning.callbacks.training_data import TrainingSets
from nclightning.probe.evaluation import check_loader
from nclightning.probe.regression import RegressionGatherer, TargetReader
from nclightning.probe.sets import DataSet, gather_alone
from nclightning.quantities import NRC, tagged

__all__ = ["RegressionAtEpochs"]


class RegressionAtEpochs(HookingMonitor):
    """Measures the training set at ends of epochs.

    Args:
        every_n_epochs: Cadence.
        reader: Of features and targets.
    """

    def __init__(self, every_n_epochs: int, reader: TargetReader) -> None:
        super().__init__()
        self._every_n_epochs, self._reader = every_n_epochs, reader
        self._first, self._training = FirstTrainingStep(reader), TrainingSets()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget what an earlier fit has shown, and refuse strategies under which nothing can be measured."""
        self._first.restart()
        super().on_fit_start(trainer, pl_module)
        check_strategy(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse loaders that cannot be swept."""
        self._training.forget()
        check_loader(LightningHost(pl_module), *self._training_set(trainer))

    def _training_set(self, trainer: L.Trainer) -> DataSet:
        only_loader(trainer, "RegressionCollapseMonitor")
        self._training.remember(trainer)
        return next(iter(self._training.sets.values()))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Refuse a first batch whose head cannot be found, or whose targets do not belong to it."""
        if self._first.is_due(pl_module, "sweep"):
            self._first.begin(trainer, pl_module, batch, "sweep")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say where the first step is not the forward."""
        self._first.end(pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the training set."""
        if (trainer.current_epoch + 1) % self._every_n_epochs == 0:
            make = partial(RegressionGatherer, self._reader)
            gathered = gather_alone(LightningHost(pl_module), self._training_set(trainer), make)
            self.publish(pl_module, tagged(gathered.read(), NRC, "train"))

    def remove_hooks(self) -> None:
        """Leave no hook behind."""
        self._first.remove()
