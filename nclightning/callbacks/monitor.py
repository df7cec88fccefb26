"""Measurements at iterates of a full-batch run: when they are made and how they reach the loggers."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import asdict
from typing import Any

import lightning as L
from torch import Tensor

from nclightning.callbacks.full_batch import as_full_batch, full_batch
from nclightning.callbacks.publishing import Publisher
from nclightning.callbacks.rows import Rows
from nclightning.errors import UserError
from nclightning.loggers import RunLogger
from nclightning.overrides import ProtectedHooks, protected
from nclightning.probe.sweep import untouched
from nclightning.quantities import log10_tag
from nclightning.ranks import count_over_ranks

__all__ = ["MonitorAtIterates"]

Batch = tuple[Tensor, Tensor]


class MonitorAtIterates(ProtectedHooks, Publisher):
    """Base of the callbacks that measure at stated iterates of a full-batch run.

    A reading belongs to the iterate that the last accepted step produced. Iterate 0, every ``every_n_iterations``-th
    iterate and the last one are measured. Values stay on the device. They are transferred to the host once per
    Lightning step, for all monitors of a trainer together, and are then in ``trainer.callback_metrics``. The loggers
    get the values of an iterate as one row, after all monitors have measured it. Tags in ``log10_tags`` are logged a
    second time as ``log10/<tag>``.

    Args:
        every_n_iterations: Cadence.

    Raises:
        ValueError: If the cadence is below 1; at the start of a fit, if the module does not run full-batch
            iterations.
    """

    log10_tags: frozenset[str] = frozenset()

    def __init__(self, every_n_iterations: int = 10) -> None:
        super().__init__()
        if every_n_iterations < 1:
            raise UserError(f"every_n_iterations must be at least 1, got {every_n_iterations}.")
        self.every_n_iterations = every_n_iterations
        self._batch: Batch | None = None
        self._last_iteration = -1
        self._rows: Rows | None = None
        self._own_tags: set[str] = set()

    @abstractmethod
    def read(self, pl_module: L.LightningModule, batch: Batch) -> dict[str, Tensor | float]:
        """Measure at the current parameters, leaving module, gradients and random state as they are.

        Args:
            pl_module: The module.
            batch: The training set ``(x, y)``.

        Returns:
            Values by tag; tensors are scalars on the device.
        """

    def prepare(self, pl_module: L.LightningModule, batch: Batch) -> None:
        """Check module and data once, before the first measurement. It may transfer to the host."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse modules whose batches are not the training set."""
        if not full_batch(pl_module):
            raise UserError(
                f"{type(self).__name__} reads full-batch runs of nclightning.models.RegularizedClassifier, got "
                f"{type(pl_module).__name__}. Of other modules NeuralCollapseMonitor reads NC1-NC3, and "
                "OptimalityMonitor(loss=...) gap and distance."
            )
        as_full_batch(pl_module)
        self._batch, self._last_iteration = None, -1
        self._rows, self._own_tags = Rows.of(trainer), set()
        self._rows.begin(self)
        super().on_fit_start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Measure the iterate that the run starts from: 0, or that of the checkpoint."""
        if self._batch is None:
            num_samples = as_full_batch(pl_module).num_samples
            count = count_over_ranks(len(batch[1]), batch[1].device)
            if count != num_samples:
                raise UserError(
                    f"{type(self).__name__} needs the whole training set in each batch, got {count} of "
                    f"num_samples={num_samples}: a reading of a part would be a wrong number."
                )
            self.prepare(pl_module, batch)
            self._batch = batch
            if trainer.global_step % self.every_n_iterations == 0:
                self._record(trainer, pl_module, trainer.global_step)

    def on_iteration_end(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, iteration: int) -> None:
        """Measure at the cadence."""
        if iteration % self.every_n_iterations == 0:
            self._record(trainer, pl_module, iteration)

    def _record(self, trainer: L.Trainer, pl_module: L.LightningModule, iteration: int) -> None:
        assert self._batch is not None
        with untouched(pl_module):
            values = self.read(pl_module, self._batch)
        Rows.of(trainer).add(iteration, values, self.log10_tags)
        self._own_tags |= values.keys() | set(map(log10_tag, self.log10_tags & values.keys()))
        self._last_iteration = iteration

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Send the readings of this step to the loggers."""
        Rows.of(trainer).flush(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the last iterate if the cadence left it out."""
        if self._batch is not None and self._last_iteration != trainer.global_step:
            self._record(trainer, pl_module, trainer.global_step)
        if self._rows is not None:
            self._rows.end(self)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Send the readings to the loggers before an interrupt or error ends the run."""
        if self._rows is not None:
            self._rows.rescue(trainer, exception)

    @protected
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write to disk the readings that a resumed run will not repeat. If that fails, no checkpoint is saved."""
        if self._rows is not None:
            self._rows.flush(trainer)
            written = [each.written(trainer.global_step) for each in trainer.loggers if isinstance(each, RunLogger)]
            checkpoint["readings"] = asdict(written[0]) if written and written[0] is not None else None
            self._rows.save(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Send the last readings to the loggers and drop the batch."""
        if self._rows is not None:
            self._rows.end(self)
            self._rows.save(trainer)
        self._keep_last()
        self._batch = self._rows = None

    def _keep_last(self) -> None:
        if self._rows is not None:
            self._last |= self._rows.latest(self._own_tags)

    def state(self) -> dict[str, Any]:
        """Return what checkpoints hold: the last values."""
        self._keep_last()
        return super().state()
