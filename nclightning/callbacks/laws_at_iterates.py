"""Laws of the optimizer's steps at iterates of full-batch modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from nclightning.callbacks.full_batch import as_full_batch, head_reader
from nclightning.callbacks.head_law import HeadLaw
from nclightning.callbacks.monitor import Batch, MonitorAtIterates
from nclightning.callbacks.row_sums import StepFn
from nclightning.callbacks.sharpness import Sharpness
from nclightning.callbacks.step_cadence import StepCadence
from nclightning.errors import UserError
from nclightning.functional import balance_deviation, balance_residual
from nclightning.optim.rules import step_of, weight_decays
from nclightning.quantities import BALANCE, BALANCE_RESIDUAL, LAWS, mirrored_tags

__all__ = ["LawsAtIterates"]


class LawsAtIterates(MonitorAtIterates):
    """Reads the laws at iterates.

    Args:
        every_n_iterations: Cadence.
        step_fn: As for :class:`nclightning.callbacks.row_sums.RowSum`.
        sharpness_every_n_steps: Cadence of the sharpness in iterations, at the next reading; None reads none.
    """

    log10_tags = mirrored_tags(LAWS)

    def __init__(self, every_n_iterations: int, step_fn: StepFn | None, sharpness_every_n_steps: int | None) -> None:
        super().__init__(every_n_iterations)
        self._step_fn = step_fn
        self._sharp_steps = StepCadence(sharpness_every_n_steps)
        self._sharpness: Sharpness | None = None
        self._law: HeadLaw | None = None
        self._loaded: Mapping[str, Any] = {}
        self._iteration = 0  # Of the reading that is taken.
        self._before: tuple[int, Tensor, Tensor] | None = None  # Iterate before a reading, its head and features.

    def forget_values(self) -> None:
        """Forget an earlier fit."""
        super().forget_values()
        self._loaded = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse what cannot be read."""
        if self._sharp_steps.is_on and trainer.world_size > 1:
            raise UserError(
                "sharpness_every_n_steps needs the whole training set in one process, got "
                f"{trainer.world_size}: set trainer.devices=1, or sharpness_every_n_steps=None."
            )
        if self._sharp_steps.is_on and not hasattr(pl_module, "evaluate_objective"):
            raise UserError(
                f"sharpness_every_n_steps needs {type(pl_module).__name__}.evaluate_objective(batch), the objective "
                "with its graph, as nclightning.models.RegularizedClassifier has it: set it to None."
            )
        self._sharp_steps.restart(-1)
        self._before = None
        super().on_fit_start(trainer, pl_module)

    def prepare(self, pl_module: L.LightningModule, batch: Batch) -> None:
        """See which law the head follows."""
        self.remove_hooks()
        objective: Any = getattr(pl_module, "objective", None)
        if objective is None:
            penalties, missing = (0.0, 0.0), None
        else:
            penalties = float(objective.lambda_w), float(objective.lambda_b)
            missing = _why_not_invariant(objective)
        self._law = HeadLaw(pl_module, head_reader(as_full_batch(pl_module)), penalties, self._step_fn, missing)
        self._law.load_state_dict(self._loaded)
        self._sharpness = Sharpness(lambda module: module.evaluate_objective(batch))  # type: ignore[operator]
        self._loaded = {}

    def read(self, pl_module: L.LightningModule, batch: Batch) -> dict[str, Tensor | float]:
        """Read the laws at the current parameters."""
        assert self._law is not None
        values = self._law.read() | self._read_balance(pl_module, batch)
        if self._sharp_steps.is_due(self._iteration):
            assert self._sharpness is not None
            values |= self._sharpness.read(pl_module)
        return values

    @torch.no_grad()
    def _read_balance(self, pl_module: L.LightningModule, batch: Batch) -> dict[str, Tensor | float]:
        decays = _decays(pl_module)
        if decays is None:
            return {}
        before, self._before = self._before, None
        now = as_full_batch(pl_module).head.weight, as_full_batch(pl_module).features_of(batch[0])
        values: dict[str, Tensor | float] = {BALANCE.tag(): balance_deviation(*now, *decays)}
        step = _plain_step(pl_module.trainer.optimizers[0])
        if before is not None and before[0] == self._iteration - 1 and step is not None:
            values[BALANCE_RESIDUAL.tag()] = balance_residual(before[1:], now, step, *decays)
        return values

    def _record(self, trainer: L.Trainer, pl_module: L.LightningModule, iteration: int) -> None:
        self._iteration = iteration
        super()._record(trainer, pl_module, iteration)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Read the first iterate."""
        begins = self._batch is None
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if begins:
            self._copy_if_next_is_measured(pl_module, batch, trainer.global_step)

    def on_iteration_end(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, iteration: int) -> None:
        """Read at the cadence."""
        super().on_iteration_end(trainer, pl_module, batch, iteration)
        self._copy_if_next_is_measured(pl_module, batch, iteration)

    @torch.no_grad()
    def _copy_if_next_is_measured(self, pl_module: L.LightningModule, batch: Batch, iteration: int) -> None:
        """Copy head and features if the next iterate is read."""
        if (iteration + 1) % self.every_n_iterations == 0 and _decays(pl_module) is not None:
            module = as_full_batch(pl_module)
            self._before = iteration, module.head.weight.clone(), module.features_of(batch[0]).clone()

    def remove_hooks(self) -> None:
        """Leave no hook behind."""
        if self._law is not None:
            self._law.remove()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave no hook behind, and lose no reading."""
        self.remove_hooks()
        super().on_exception(trainer, pl_module, exception)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        self.remove_hooks()
        self._before = self._sharpness = None
        super().teardown(trainer, pl_module, stage)

    def state(self) -> dict[str, Any]:
        """Return what checkpoints hold: the last values, and what was predicted."""
        return super().state() | {"laws": self._loaded if self._law is None else self._law.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        super().load_state_dict(state_dict)
        self._loaded = state_dict.get("laws", {})


def _why_not_invariant(objective: Any) -> str | None:
    loss = objective.function
    if loss.shift_invariant:
        return None
    return (
        f"the loss {type(loss).__name__} changes when one number is added to all logits of a sample, so that its "
        "gradient does not sum to zero over the classes."
    )


def _decays(pl_module: L.LightningModule) -> tuple[float, float] | None:
    """Return the penalties of head and free features, with coupled weight decay; None where there is no balance."""
    objective: Any = getattr(pl_module, "objective", None)
    if objective is None or pl_module.trainer.world_size > 1 or not as_full_batch(pl_module).features_are_free:
        return None
    (optimizer,) = pl_module.trainer.optimizers
    known = all(
        not group.get("weight_decay") if step is None else not step.law.decoupled_decay
        for group in optimizer.param_groups
        for step in [step_of(optimizer, group)]
    )
    own = {decay for _, decay in weight_decays(optimizer)}
    if not known or len(own) != 1:
        return None
    (decay,) = own
    return float(objective.lambda_w) + decay, float(objective.lambda_h) + decay


def _plain_step(optimizer: Optimizer) -> float | None:
    """Return the step of gradient descent without momentum, the same for all parameters; None for others."""
    steps = {step_of(optimizer, group) for group in optimizer.param_groups}
    step = steps.pop()
    if steps or step is None or not step.is_linear or step.law.momentum or step.law.maximize:
        return None
    return step.law.lr
