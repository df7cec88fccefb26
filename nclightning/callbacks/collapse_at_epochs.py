"""Neural collapse of the training set and further ones at ends of epochs, of any module.

The hooks say when; what is done then is in :mod:`nclightning.probe`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import lightning as L
from torch import Tensor

from nclightning.callbacks import modules
from nclightning.callbacks.first_step import FirstTrainingStep, Reads
from nclightning.callbacks.host import LightningHost
from nclightning.callbacks.pictures import draw_angles
from nclightning.callbacks.shared import SharingMonitor
from nclightning.callbacks.step_cadence import StepCadence
from nclightning.callbacks.steps import OnError, TrainerSteps
from nclightning.callbacks.training_data import TrainingSets, evaluation_set
from nclightning.pictures import picture_writers
from nclightning.probe.collectors import Measuring
from nclightning.probe.evaluation import check_loader
from nclightning.probe.reader import PairReader
from nclightning.probe.sets import DataSet, Gather, Measured, SetReader, StatisticsGatherer, gather_alone
from nclightning.probe.step_measurement import StepMeasurement
from nclightning.quantities import ANGLES, NC, tagged
from nclightning.ranks import rank_zero_warn

__all__ = ["CollapseAtEpochs", "EpochSettings"]


@dataclass(frozen=True)
class EpochSettings:
    """Arguments of :class:`nclightning.callbacks.NeuralCollapseMonitor` that say what is measured when."""

    every_n_epochs: int
    every_n_steps: int | None
    source: Literal["sweep", "online"]
    stages: tuple[str, ...]
    datasets: Mapping[str, Iterable[Any]]
    ood: tuple[str, ...]
    pictures_every_n_epochs: int | None

    @property
    def reads_training(self) -> Reads:
        """How the training set is measured, if it is."""
        return self.source if "train" in self.stages else ""

    @property
    def sweeps(self) -> bool:
        """Whether evaluation passes are made at the cadence."""
        return self.reads_training == "sweep" or bool(self.datasets)


class CollapseAtEpochs(SharingMonitor):
    """Measures at ends of epochs, and at steps: by evaluation passes, or online.

    Args:
        settings: What is measured when.
        reader: Of features and labels.
        measuring: Which measures.
        training: Knows the training loaders.
        on_error: What becomes of errors.
    """

    def __init__(
        self,
        settings: EpochSettings,
        reader: PairReader,
        measuring: Measuring,
        training: TrainingSets,
        on_error: OnError,
    ) -> None:
        super().__init__()
        self._when, self._reader, self._measuring = settings, reader, measuring
        self._training, self._on_error = training, on_error
        self._first, self._steps = FirstTrainingStep(reader), StepCadence(settings.every_n_steps)
        self._sets = SetReader(reader, measuring)
        self._online: TrainerSteps | None = None  # Those of the epoch that runs, if they are measured.

    # The start of a fit.

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget what an earlier fit has shown, and refuse strategies under which nothing can be measured."""
        self._first.restart()
        modules.check_strategy(trainer)
        super().on_fit_start(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse loaders that cannot be swept, and say that nobody takes pictures."""
        self._steps.restart(trainer.global_step)
        self._tell_who_takes_no_pictures(trainer)
        self._training.forget()
        self._training.remember(trainer)
        with self._on_error.guard(self):
            sets = self._training.sets.values() if self._needs_class_means else ()
            for data in (*sets, *self._other_sets(trainer).values()):
                check_loader(LightningHost(pl_module), *data)

    def _tell_who_takes_no_pictures(self, trainer: L.Trainer) -> None:
        """Say that pictures were asked for and nobody takes them; a trial of one batch has no loggers."""
        asked = self._when.pictures_every_n_epochs is not None and not trainer.fast_dev_run  # type: ignore[attr-defined]
        if asked and trainer.is_global_zero and not picture_writers(trainer.loggers):
            kinds = " and ".join(type(each).__name__ for each in trainer.loggers) or "no logger"
            rank_zero_warn(
                f"pictures_every_n_epochs={self._when.pictures_every_n_epochs} draws nothing, since the trainer has "
                f"{kinds}: add a logger that takes pictures, or make yours known with "
                "nclightning.pictures.register_logger."
            )

    @property
    def _needs_class_means(self) -> bool:
        chosen = self._when
        return chosen.reads_training == "sweep" or bool(
            set(chosen.ood) & chosen.datasets.keys() or self._measuring.decision_measures
        )

    def _other_sets(self, trainer: L.Trainer) -> dict[str, DataSet]:
        return {name: evaluation_set(trainer, loader) for name, loader in self._when.datasets.items()}

    # Training.

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start measuring the steps of the epoch, if they are measured."""
        if self._when.reads_training == "online" and self._ends_epoch(trainer):
            self._online = TrainerSteps(StepMeasurement(self._reader, self._measuring, online=True), self._on_error)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Check the first batch, and hook the module."""
        reads = self._when.reads_training
        # Where nothing is read of training, its labels may be no classes, such as those of mixed samples.
        if (reads or self._needs_class_means) and self._first.is_due(pl_module, reads):
            with self._on_error.guard(self):
                self._first.begin(trainer, pl_module, batch, reads)
        if self._online is not None:
            self._online.hook(pl_module, batch, trainer.train_dataloader, first=self._first.forward)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collect a batch, or measure at the cadence in steps."""
        is_first = self._first.is_watched
        if is_first:
            with self._on_error.guard(self):
                self._first.end_forward()
        if self._online is not None:
            self._online.collect(pl_module, trainer.train_dataloader)
        if is_first:
            with self._on_error.guard(self):
                self._first.end(pl_module, online=self._when.source == "online")
        if self._when.sweeps and self._steps.is_due(trainer.global_step):
            with self._on_error.guard(self):
                self._measure_between_steps(trainer, pl_module)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let a validation in the middle of an epoch be: its forwards are not those of training."""
        if self._online is not None:
            self._online.remove()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the training set and the further ones."""
        self._training.remember(trainer)
        if self._online is not None:
            with self._on_error.guard(self):
                values = self._online.read(pl_module)
                self.publish(pl_module, tagged(values, NC, "train"))
            self._online = None
        if self._when.sweeps and self._ends_epoch(trainer):
            with self._on_error.guard(self):
                self._measure_at_end(trainer, pl_module)

    def _ends_epoch(self, trainer: L.Trainer) -> bool:
        return (trainer.current_epoch + 1) % self._when.every_n_epochs == 0

    def _measure_between_steps(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        measured = self._steps.known(pl_module)
        if measured is None:
            measured = self._measure(trainer, pl_module, gather_alone)
        self._steps.keep(measured)
        self.publish_at_step(trainer, _tagged(measured))

    def _measure_at_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        known = self._steps.known(pl_module)
        self._steps.keep(None)
        measured = known or self._measure(trainer, pl_module, partial(self.gather_shared, trainer))
        every = self._when.pictures_every_n_epochs
        due = every is not None and (trainer.current_epoch + 1) % every == 0
        if due and self._when.reads_training == "sweep" and trainer.is_global_zero:
            assert measured.class_means is not None
            means, weight = measured.class_means[""], measured.head.weight
            step, joins_next = trainer.global_step, known is None
            draw_angles(trainer.loggers, ANGLES.tag("train"), means, weight, step, joins_next=joins_next)
        if known is None:
            self.publish(pl_module, _tagged(measured))
        else:  # The loggers have them at this step.
            self.publish_to_callbacks(pl_module, _tagged(measured))

    def _measure(self, trainer: L.Trainer, pl_module: L.LightningModule, gather: Gather) -> Measured:
        self._training.remember(trainer)
        trained = self._training.needed() if self._needs_class_means else {}
        others, training = self._other_sets(trainer), self._when.reads_training == "sweep"
        return self._sets.read(LightningHost(pl_module), trained, others, self._when.ood, training, gather)

    # Passes that other monitors of the trainer share.

    def gathers(self, trainer: L.Trainer, data: DataSet) -> bool:
        """Whether it is about to gather statistics of a training set at the end of this epoch."""
        due = self._when.sweeps and self._needs_class_means and self._ends_epoch(trainer)
        if not due or self._steps.is_on:  # Between steps it may have measured already.
            return False
        self._training.remember(trainer)
        return any(map(data.is_same, self._training.sets.values()))

    def gatherer(self) -> StatisticsGatherer:
        """Start gathering them."""
        return self._sets.gatherer()

    # What is left behind.

    def remove_hooks(self) -> None:
        """Leave no hook behind."""
        self._first.remove()
        if self._online is not None:
            self._online.remove()
        self._online = None


def _tagged(measured: Measured) -> dict[str, Tensor]:
    return tagged(measured.values, NC)
