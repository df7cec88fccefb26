"""Gap and distance of modules that are not full-batch, at ends of epochs."""

from __future__ import annotations

from typing import Any

import lightning as L

from nclightning.callbacks.first_step import FirstTrainingStep
from nclightning.callbacks.host import LightningHost
from nclightning.callbacks.modules import check_strategy, only_loader
from nclightning.callbacks.shared import SharingMonitor
from nclightning.callbacks.training_data import TrainingSets
from nclightning.errors import UserError
from nclightning.metrics.reference import Reference
from nclightning.probe.evaluation import check_loader
from nclightning.probe.optimality import OptimalityGatherer
from nclightning.probe.reader import PairReader
from nclightning.probe.sets import DataSet
from nclightning.quantities import CERTIFIED_GAP, GAP, OPTIMALITY, tagged
from nclightning.ranks import rank_zero_warn

__all__ = ["OptimalityAtEpochs"]


class OptimalityAtEpochs(SharingMonitor):
    """Measures the training set at ends of epochs.

    Args:
        reference: What it is measured against; None, without which nothing can be measured.
        every_n_epochs: Cadence.
        reader: Of features and labels.
    """

    def __init__(
        self,
        reference: Reference | None,
        every_n_epochs: int,
        reader: PairReader,
    ) -> None:
        super().__init__()
        self._reference, self._every_n_epochs, self._reader = reference, every_n_epochs, reader
        self._first, self._training, self._said = FirstTrainingStep(reader), TrainingSets(), ""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget what an earlier fit has shown, and refuse what cannot be measured."""
        if self._reference is None:
            raise UserError(
                f"OptimalityMonitor reads full-batch runs of nclightning.models.RegularizedClassifier, got "
                f"{type(pl_module).__name__}. Of other modules NeuralCollapseMonitor reads NC1-NC3, and "
                "OptimalityMonitor(loss=...) gap and distance."
            )
        self._first.restart()
        self._said = ""
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
        """Refuse a first batch or a head that cannot be measured."""
        if not self._first.is_due(pl_module, "sweep"):
            return
        self._first.begin(trainer, pl_module, batch, "sweep")
        assert self._reference is not None
        head = self._reader.head_of(pl_module)
        num_groups, _ = self._reference.check_head(head)
        if num_groups != head.out_features:
            raise UserError(
                f"targets must have a row for each of the {head.out_features} outputs of the head {head.name!r}, got "
                f"{num_groups} rows: the labels that OptimalityMonitor reads are classes of the head. Of other tables "
                "nclightning.metrics.Optimality(loss, head, targets=...).update(features, labels) reads the labels."
            )

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
            values, missing = gathered.read()
            if missing is not None and not self._said:
                self._said = missing
                rank_zero_warn(f"{GAP.tag()} or distance is nan, and {CERTIFIED_GAP.tag()} holds: {missing}")
            self.publish(pl_module, tagged(values, OPTIMALITY))

    def _ends_epoch(self, trainer: L.Trainer) -> bool:
        return (trainer.current_epoch + 1) % self._every_n_epochs == 0

    def gathers(self, trainer: L.Trainer, data: DataSet) -> bool:
        """Whether it is about to measure a training set at the end of this epoch."""
        return self._ends_epoch(trainer) and data.is_same(self._training_set(trainer))

    def gatherer(self) -> OptimalityGatherer:
        """Start gathering what gap and distance need."""
        assert self._reference is not None
        return OptimalityGatherer(self._reader, self._reference)

    def remove_hooks(self) -> None:
        """Leave no hook behind."""
        self._first.remove()
