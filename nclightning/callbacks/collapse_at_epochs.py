"""Neural collapse of the training set and further ones, of modules that know nothing of it.

The hooks say when; what is done then is in :mod:`nclightning.probe`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import lightning as L

from nclightning.callbacks import modules
from nclightning.callbacks.first_step import FirstTrainingStep, Reads
from nclightning.callbacks.host import LightningHost
from nclightning.callbacks.pictures import draw_angles
from nclightning.callbacks.shared import SharingMonitor
from nclightning.callbacks.steps import OnError, StepForwards
from nclightning.callbacks.training_data import TrainingSets, evaluation_set
from nclightning.probe.collection import Measuring
from nclightning.probe.evaluation import check_loader
from nclightning.probe.forwards import ForwardPass
from nclightning.probe.reader import PairReader
from nclightning.probe.sets import DataSet, Measured, SetReader, StatisticsGatherer, gather_alone
from nclightning.probe.sweep import fingerprint_together, has_lazy_parts
from nclightning.ranks import count_over_ranks

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
        self._first, self._checked = FirstTrainingStep(reader), False
        self._training, self._on_error = training, on_error
        self._sets = SetReader(reader, measuring)
        self._online: StepForwards | None = None
        self._step = 0
        # The last measurement at a step: the step, the weights, and what was measured.
        self._at_step: tuple[int, tuple[int, ...], Measured] | None = None

    # The start of a fit.

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget what an earlier fit has shown, and refuse strategies under which nothing can be measured."""
        self._reader.forget()
        self._first.remove()
        self._checked = False
        modules.check_strategy(trainer)
        super().on_fit_start(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say which out-of-distribution sets there are not, and refuse loaders that cannot be swept."""
        modules.tell_unknown_ood(self._when.ood, self._when.datasets, trainer.val_dataloaders)
        self._step, self._at_step = trainer.global_step, None
        self._training.forget()
        self._training.remember(trainer)
        with self._on_error.guard(self):
            sets = self._training.sets.values() if self._needs_centres else ()
            for data in (*sets, *self._other_sets(trainer).values()):
                check_loader(LightningHost(pl_module), *data)

    @property
    def _needs_centres(self) -> bool:
        chosen = self._when
        return chosen.reads_training == "sweep" or bool(
            set(chosen.ood) & chosen.datasets.keys() or self._measuring.of_decisions
        )

    def _other_sets(self, trainer: L.Trainer) -> dict[str, DataSet]:
        return {name: evaluation_set(trainer, loader) for name, loader in self._when.datasets.items()}

    # Training.

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start collecting the ordinary forwards."""
        if self._when.reads_training == "online" and self._ends_epoch(trainer):
            self._online = StepForwards(ForwardPass(self._reader, self._measuring, online=True), self._on_error)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Check the first batch, and hook the module."""
        reads = self._when.reads_training
        if not self._checked and (reads == "online" or not has_lazy_parts(pl_module)):
            self._checked = True
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
        every = self._when.every_n_steps
        if every is not None and self._when.sweeps:
            # Crossed, not hit: several optimizers advance the step by more than one.
            before, self._step = self._step, trainer.global_step
            if self._step // every > before // every:
                with self._on_error.guard(self):
                    self._measure(trainer, pl_module, at_step=True)

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
                self.publish(pl_module, {f"nc/train/{tag}": value for tag, value in values.items()})
            self._online = None
        if self._when.sweeps and self._ends_epoch(trainer):
            with self._on_error.guard(self):
                self._measure(trainer, pl_module)

    def _ends_epoch(self, trainer: L.Trainer) -> bool:
        return (trainer.current_epoch + 1) % self._when.every_n_epochs == 0

    def _measure(self, trainer: L.Trainer, pl_module: L.LightningModule, at_step: bool = False) -> None:
        measured, is_new = self._measured(trainer, pl_module, at_step)
        values = {f"nc/{tag}": value for tag, value in measured.values.items()}
        if at_step:
            self.publish_at_step(trainer, values)
            return
        if is_new:
            self.publish(pl_module, values)
        else:  # The loggers have them at this step.
            self.publish_to_callbacks(pl_module, values)
        every = self._when.pictures_every_n_epochs
        due = every is not None and (trainer.current_epoch + 1) % every == 0
        if due and self._when.reads_training == "sweep" and trainer.is_global_zero:
            assert measured.centres is not None
            means, weight = measured.centres[""], measured.head.weight
            draw_angles(trainer.loggers, "nc/train/angles", means, weight, trainer.global_step)

    def _measured(self, trainer: L.Trainer, pl_module: L.LightningModule, at_step: bool) -> tuple[Measured, bool]:
        """Measure, unless that was done at this step with these weights; say whether it was done anew."""
        step, last = trainer.global_step, self._at_step
        weights: tuple[int, ...] = ()
        if self._when.every_n_steps is not None:
            weights = fingerprint_together((*pl_module.parameters(), *pl_module.buffers()))
        other = last is None or last[:2] != (step, weights)
        is_new = bool(count_over_ranks(int(other), pl_module.device))
        if is_new:
            self._training.remember(trainer)
            training = self._when.reads_training == "sweep"
            trained = self._training.needed() if self._needs_centres else {}
            others = self._other_sets(trainer)
            host, gather = LightningHost(pl_module), gather_alone if at_step else partial(self.gather_shared, trainer)
            measured = self._sets.read(host, trained, others, self._when.ood, training, gather)
            last = step, weights, measured
        assert last is not None
        self._at_step = last if at_step else None
        return last[2], is_new

    # Passes that other monitors of the trainer share.

    def gathers(self, trainer: L.Trainer, data: DataSet) -> bool:
        """Whether it is about to gather statistics of a training set at the end of this epoch."""
        self._training.remember(trainer)
        due = self._when.sweeps and self._needs_centres and self._ends_epoch(trainer)
        if not due or self._when.every_n_steps is not None:  # At steps it may have measured already.
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

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self.remove_hooks()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        self.remove_hooks()
        super().teardown(trainer, pl_module, stage)
