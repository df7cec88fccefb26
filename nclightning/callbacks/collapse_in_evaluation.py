"""Neural collapse in the steps of validation and test."""

from __future__ import annotations

from typing import Any

import lightning as L

from nclightning.callbacks.first_step import FirstTrainingStep
from nclightning.callbacks.full_batch import full_batch
from nclightning.callbacks.host import LightningHost
from nclightning.callbacks.modules import evaluated_loaders, name_loaders, tell_unknown_ood
from nclightning.callbacks.problem import num_groups_of
from nclightning.callbacks.publishing import HookingMonitor
from nclightning.callbacks.steps import OnError, TrainerSteps
from nclightning.callbacks.training_data import TrainingSets
from nclightning.probe.collectors import LayerStatistics, Measuring
from nclightning.probe.reader import PairReader
from nclightning.probe.sets import SetReader, merged
from nclightning.probe.step_measurement import StepMeasurement
from nclightning.quantities import NC, tagged

__all__ = ["CollapseInEvaluation"]


class CollapseInEvaluation(HookingMonitor):
    """Measures the forwards that validation and test run anyway.

    Args:
        stages: Those that are read.
        ood: Names of sets that are out of distribution.
        datasets: Names of further data sets, which may be among them.
        reader: Of features and labels.
        measuring: Which measures.
        training: Knows the training loaders, whose class means decisions and NC5 need.
        on_error: What becomes of errors.
    """

    def __init__(
        self,
        stages: tuple[str, ...],
        ood: tuple[str, ...],
        datasets: tuple[str, ...],
        reader: PairReader,
        measuring: Measuring,
        training: TrainingSets,
        on_error: OnError,
    ) -> None:
        super().__init__()
        self._stages, self._ood, self._datasets = stages, ood, datasets
        self._reader, self._measuring = reader, measuring
        self._training, self._on_error, self._sets = training, on_error, SetReader(reader, measuring)
        self._steps: TrainerSteps | None = None  # Those of the epoch that runs, if they are measured.

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say which out-of-distribution sets a fit does not have."""
        read = trainer.val_dataloaders if "val" in self._stages else None
        tell_unknown_ood(self._ood, self._datasets, read, "fit")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say which a validation or test does not have, unless that is part of a fit."""
        if _stage(trainer) in self._stages and trainer.state.fn != "fit":
            what = "test" if trainer.testing else "validation"
            tell_unknown_ood(self._ood, self._datasets, evaluated_loaders(trainer), what)

    on_test_start = on_validation_start

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start collecting."""
        self._steps = None
        if _stage(trainer) not in self._stages or trainer.sanity_checking or _has_groups(pl_module):
            return

        def of_training() -> LayerStatistics:
            self._training.remember(trainer)
            host, sets = LightningHost(pl_module), self._training.needed()
            return merged({name: self._sets.statistics(host, data) for name, data in sets.items()})

        needed = bool(self._measuring.decision_measures or self._ood)
        measurement = StepMeasurement(self._reader, self._measuring, self._ood, of_training if needed else None)
        self._steps = TrainerSteps(measurement, self._on_error)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Hook the module before the first batch."""
        if self._steps is not None:
            self._steps.hook(pl_module, batch, evaluated_loaders(trainer), dataloader_idx)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect a batch; in Lightning's sanity check, see whether it can be read."""
        loaders = evaluated_loaders(trainer)
        if self._steps is not None:
            self._steps.collect(pl_module, loaders, dataloader_idx)
        elif trainer.sanity_checking and "val" in self._stages and not _has_groups(pl_module):  # By now weights exist.
            name = list(name_loaders(loaders))[dataloader_idx][0]
            with self._on_error.guard(self):
                FirstTrainingStep(self._reader).check_sanity(pl_module, batch, labelled=name not in self._ood)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log ``nc/val/...``, or in a test ``nc/test/...``."""
        if self._steps is not None:
            with self._on_error.guard(self):
                values = self._steps.read(pl_module)
                self.publish(pl_module, tagged(values, NC, _stage(trainer)))
        self._steps = None

    on_test_epoch_start, on_test_epoch_end = on_validation_epoch_start, on_validation_epoch_end
    on_test_batch_start, on_test_batch_end = on_validation_batch_start, on_validation_batch_end

    def remove_hooks(self) -> None:
        """Leave no hook behind."""
        if self._steps is not None:
            self._steps.remove()
        self._steps = None


def _has_groups(pl_module: L.LightningModule) -> bool:
    """Whether labels are no classes of the head; :class:`CollapseAtIterates` measures those."""
    return full_batch(pl_module) and num_groups_of(pl_module) is not None


def _stage(trainer: L.Trainer) -> str:
    return "test" if trainer.testing else "val"
