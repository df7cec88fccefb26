"""Checks of what ``configure_optimizers`` returns: one optimizer, and schedulers that need no metric."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from nclightning.errors import UserError

__all__ = ["check_optimization", "only_optimizer"]


def check_optimization(trainer: L.Trainer) -> None:
    """Raise an error unless the full-batch loop can step the trainer's optimizers and schedulers.

    Args:
        trainer: A trainer at the start of a fit.

    Raises:
        ValueError: If it cannot.
    """
    _refuse_other_numbers(len(trainer.optimizers))
    for config in trainer.lr_scheduler_configs:
        if isinstance(config.scheduler, ReduceLROnPlateau):
            raise UserError(
                "configure_optimizers returned ReduceLROnPlateau, which needs a metric after each iteration, but "
                "metrics are only logged at a cadence: return a scheduler that needs none, such as StepLR."
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
    """Return all optimizers in a result of ``configure_optimizers``."""
    if isinstance(configured, Optimizer):
        return [configured]
    if isinstance(configured, dict):
        return _optimizers_in(configured.get("optimizer"))
    if isinstance(configured, (list, tuple)):
        return [optimizer for part in configured for optimizer in _optimizers_in(part)]
    return []


def _refuse_other_numbers(count: int) -> None:
    """Raise an error unless there is exactly one optimizer."""
    if count != 1:
        raise UserError(
            f"the full-batch loop steps one optimizer, but configure_optimizers returned {count}: return one, with "
            "several parameter groups if necessary."
        )
