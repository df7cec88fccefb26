"""What ``configure_optimizers`` may return for the full-batch loop: one optimizer, schedulers that need no metric."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from nclightning.arguments import check_memory
from nclightning.errors import UserError

__all__ = ["check_loop", "check_optimization", "only_optimizer"]


def check_loop(trainer: L.Trainer, module: L.LightningModule, logits: int) -> None:
    """Raise unless a trainer leaves the full-batch loop as it is, and the host holds what it works on.

    Args:
        trainer: Before or at the start of a fit.
        module: With its parameters.
        logits: How many numbers the output on the training set has.

    Raises:
        ValueError: Naming the option.
    """
    for name, neutral in (("gradient_clip_val", (None, 0)), ("accumulate_grad_batches", (1,))):
        if (value := getattr(trainer, name)) not in neutral:
            raise UserError(
                f"trainer.{name}={value} does not fit the full-batch loop, which takes whole steps: leave it out."
            )
    if trainer.limit_train_batches == 0:
        raise UserError("trainer.limit_train_batches=0 leaves nothing to train on: leave it out.")
    if trainer.world_size == 1 and trainer.strategy.root_device.type == "cpu":
        # Each parameter with its gradient and those of the last accepted iterate.
        parameters = list(module.parameters())
        elements = 4 * sum(p.numel() for p in parameters) + logits
        check_memory("training on this many samples and classes", elements, parameters[0].dtype)


def check_optimization(trainer: L.Trainer) -> None:
    """Raise unless the full-batch loop can step what a trainer was given.

    Args:
        trainer: At the start of a fit.

    Raises:
        ValueError: With the reason.
    """
    _refuse_other_numbers(len(trainer.optimizers))
    for config in trainer.lr_scheduler_configs:
        if isinstance(config.scheduler, ReduceLROnPlateau):
            raise UserError(
                "configure_optimizers returned ReduceLROnPlateau, which wants a metric after each iteration, and there "
                "are metrics at a cadence only: return a scheduler that needs none, such as StepLR."
            )


def only_optimizer(configured: Any) -> Optimizer:
    """Return the optimizer among what ``configure_optimizers`` returned, in any of Lightning's forms.

    Args:
        configured: An optimizer, a mapping, or a sequence of either, perhaps followed by schedulers.

    Raises:
        ValueError: If there is none, or more than one.
    """
    found = _optimizers_in(configured)
    _refuse_other_numbers(len(found))
    return found[0]


def _optimizers_in(configured: Any) -> list[Optimizer]:
    if isinstance(configured, Optimizer):
        return [configured]
    if isinstance(configured, dict):
        return _optimizers_in(configured.get("optimizer"))
    if isinstance(configured, (list, tuple)):
        return [optimizer for part in configured for optimizer in _optimizers_in(part)]
    return []


def _refuse_other_numbers(count: int) -> None:
    if count != 1:
        raise UserError(
            f"the full-batch loop steps one optimizer, and configure_optimizers returned {count}: return one, with "
            "its parameters in several groups if need be."
        )
