"""Gap and distance of modules that are not full-batch, at ends of epochs."""

from __future__ import annotations

from typing import Any, Literal

import lightning as L

from nclightning.callbacks.first_step import FirstTrainingStep
from nclightning.callbacks.host import LightningHost
from nclightning.callbacks.modules import check_strategy, only_loader
from nclightning.callbacks.problem import check_data_set
from nclightning.callbacks.shared import SharingMonitor
from nclightning.callbacks.training_data import TrainingSets
from nclightning.errors import UserError
from nclightning.metrics.optimality import check_linear
from nclightning.probe.evaluation import check_loader
from nclightning.probe.optimality import OptimalityGatherer
from nclightning.probe.reader import PairReader
from nclightning.probe.sets import DataSet
from nclightning.theory import UFMProblem

__all__ = ["OptimalityAtEpochs"]


class OptimalityAtEpochs(SharingMonitor):
    """Measures the training set at ends of epochs.

    Args:
        loss: Of the problem; None, without which nothing can be measured.
        penalties: On head and features; None fits both.
        every_n_epochs: Cadence.
        reader: Of features and labels.
    """

    def __init__(
        self,
        loss: Literal["mse", "ce"] | None,
        penalties: tuple[float, float] | None,
        every_n_epochs: int,
        reader: PairReader,
    ) -> None:
        super().__init__()
        self._loss, self._penalties, self._every_n_epochs, self._reader = loss, penalties, every_n_epochs, reader
        self._first, self._training = FirstTrainingStep(reader), TrainingSets()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget what an earlier fit has shown, and refuse what cannot be measured."""
        if self._loss is None:
            raise UserError(
                f"OptimalityMonitor reads full-batch runs of nclightning.models.RegularizedClassifier, got "
                f"{type(pl_module).__name__}. Of other modules NeuralCollapseMonitor reads NC1-NC3, and "
                "OptimalityMonitor(loss=...) gap and distance."
            )
        self._first.restart()
        super().on_fit_start(trainer, pl_module)
        check_strategy(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse loaders that cannot be swept."""
        self._training.forget()
        check_loader(LightningHost(pl_module), *self._training_set(trainer))

    def _training_set(self, trainer: L.Trainer) -> DataSet:
        only_loader(trainer)
        self._training.remember(trainer)
        return next(iter(self._training.sets.values()))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Refuse a first batch, a head, penalties or labels that have no known optimum."""
        if not self._first.is_due(pl_module, "sweep"):
            return
        loader, limit = self._training_set(trainer)
        self._first.begin(trainer, pl_module, batch, "sweep")
        head = self._reader.head_of(pl_module)
        assert self._loss is not None
        check_linear(self._loss, head)
        if self._penalties is not None:
            UFMProblem(self._loss, head.out_features, 1, head.in_features, *self._penalties)
        if self._reader.splits_plainly:
            check_data_set(loader, head.out_features, limit)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say where the first step is not the forward."""
        self._first.end(pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the training set."""
        if self._ends_epoch(trainer):
            data, host = self._training_set(trainer), LightningHost(pl_module)
            gathered = self.gather_shared(trainer, host, data, self.gatherer)
            self.publish(pl_module, {f"optimality/{tag}": value for tag, value in gathered.read().items()})

    def _ends_epoch(self, trainer: L.Trainer) -> bool:
        return (trainer.current_epoch + 1) % self._every_n_epochs == 0

    def gathers(self, trainer: L.Trainer, data: DataSet) -> bool:
        """Whether it is about to measure a training set at the end of this epoch."""
        return self._ends_epoch(trainer) and data.is_same(self._training_set(trainer))

    def gatherer(self) -> OptimalityGatherer:
        """Start gathering what gap and distance need."""
        assert self._loss is not None
        return OptimalityGatherer(self._reader, self._loss, self._penalties)

    def remove_hooks(self) -> None:
        """Leave no hook behind."""
        self._first.remove()
