"""Laws of the optimizer's steps of any module, between its steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch

from nclightning.callbacks.head_law import HeadLaw
from nclightning.callbacks.host import LightningHost
from nclightning.callbacks.modules import check_strategy
from nclightning.callbacks.publishing import HookingMonitor
from nclightning.callbacks.row_sums import StepFn
from nclightning.callbacks.sharpness import Sharpness, TrainingLoss
from nclightning.callbacks.step_cadence import StepCadence
from nclightning.callbacks.training_data import parts_of
from nclightning.errors import UserError
from nclightning.probe.reader import PairReader
from nclightning.probe.sweep import has_lazy_parts
from nclightning.ranks import failing_together
from nclightning.sharding import is_sharded

__all__ = ["LawsAtSteps"]


class LawsAtSteps(HookingMonitor):
    """Reads the laws before the first step, at the cadence, and after the last step.

    Args:
        every_n_steps: Cadence.
        reader: Finds the head.
        penalties: On weight and bias of the head in the loss.
        step_fn: As for :class:`nclightning.callbacks.row_sums.RowSum`.
        loss: The loss whose sharpness is read; None if none was given.
        sharpness_every_n_steps: Cadence of the sharpness, at the next reading; None reads none.
    """

    def __init__(
        self,
        every_n_steps: int,
        reader: PairReader,
        penalties: tuple[float, float],
        step_fn: StepFn | None,
        loss: TrainingLoss | None,
        sharpness_every_n_steps: int | None,
    ) -> None:
        super().__init__()
        self._reader, self._penalties, self._step_fn, self._loss = reader, penalties, step_fn, loss
        self._sharpness = None if loss is None else Sharpness(loss)
        self._steps, self._sharp_steps = StepCadence(every_n_steps), StepCadence(sharpness_every_n_steps)
        self._law: HeadLaw | None = None
        self._loaded: Mapping[str, Any] = {}
        self._last_step = -1

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_law": None}  # Hooks cannot be pickled.

    def forget_values(self) -> None:
        """Forget an earlier fit."""
        super().forget_values()
        self._loaded = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse weights that no process has as a whole."""
        check_strategy(trainer)
        if is_sharded(pl_module):
            raise UserError(
                "OptimizerLaws reads weights that each process has as a whole, and fully_shard shares them out: train "
                "with ddp or in one process."
            )
        if self._sharp_steps.is_on and self._sharpness is None:
            raise UserError(
                f"sharpness_every_n_steps of {type(pl_module).__name__}, whose batches are not the training set, needs "
                "data, batches to take the loss on, and loss_fn=(module, batch) -> the mean loss of a batch: pass both."
            )
        self.remove_hooks()
        self._law, self._last_step = None, -1
        self._reader.forget()
        super().on_fit_start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Find the head on the first batch, and read the laws before the first step."""
        # A module with lazy layers is examined with its second batch: its first forward makes their weights.
        if self._law is not None or has_lazy_parts(pl_module):
            return
        with failing_together(pl_module.device):
            part = next(parts_of(batch, trainer.train_dataloader))
            self._reader.check_batch(LightningHost(pl_module), part, labelled=False)
            self._law = HeadLaw(pl_module, self._reader.head_of(pl_module), self._penalties, self._step_fn)
            self._law.load_state_dict(self._loaded)
            if self._loss is not None and self._sharp_steps.is_on:
                self._loss.prepare(pl_module)
        self._loaded = {}
        self._steps.restart(trainer.global_step)
        self._sharp_steps.restart(-1)
        self._read(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read at the cadence."""
        if self._law is not None and self._steps.is_due(trainer.global_step):
            self._read(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read after the last step, if the cadence missed it."""
        if self._law is not None and self._last_step != trainer.global_step:
            self._read(trainer, pl_module)
        self.remove_hooks()

    def _read(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self._law is not None
        values = self._law.read()
        if self._sharpness is not None and self._sharp_steps.is_due(trainer.global_step):
            values |= self._sharpness.read(pl_module)
        self._last_step = trainer.global_step
        device = pl_module.device
        tensors = {tag: torch.as_tensor(value, dtype=torch.float64, device=device) for tag, value in values.items()}
        self.publish_at_step(trainer, tensors)

    def remove_hooks(self) -> None:
        """Leave no hook behind."""
        if self._law is not None:
            self._law.remove()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave no hook behind, and let go of the batches."""
        super().teardown(trainer, pl_module, stage)
        if self._loss is not None:
            self._loss.forget()

    def state(self) -> dict[str, Any]:
        """Return what checkpoints hold: the last values, and what was predicted."""
        return super().state() | {"laws": self._loaded if self._law is None else self._law.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        super().load_state_dict(state_dict)
        self._loaded = state_dict.get("laws", {})
