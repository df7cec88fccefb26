"""What the optimizer of a full-batch run tells of its last step."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor

from nclightning.compat.lightning import trainer_of
from nclightning.optim import ArmijoGD, HeavyBall, Nesterov
from nclightning.quantities import EVALUATIONS, STEP_SIZE

__all__ = ["FixedStep", "search_readings", "step_found", "step_set"]


class FixedStep(NamedTuple):
    """How an iteration of gradient descent is made.

    Attributes:
        size: Of the step.
        momentum: Factor of the last displacement.
        nesterov: Whether it is Nesterov's.
    """

    size: float
    momentum: float = 0.0
    nesterov: bool = False


def search_readings(pl_module: L.LightningModule) -> dict[str, Tensor | float]:
    """Return step size and evaluations of a line search; nothing outside a fit, and for other optimizers."""
    optimizer = _optimizer_in_fit(pl_module)
    if not hasattr(optimizer, "outcome"):
        return {}
    outcome = optimizer.outcome
    return {
        STEP_SIZE.tag(): math.nan if outcome is None else outcome.step_size,
        EVALUATIONS.tag(): optimizer.total_evaluations,
    }


def step_found(pl_module: L.LightningModule) -> float | None:
    """Return the step to the iterate that a line search along the gradient took, 0.0 before the first; else None."""
    optimizer = _optimizer_in_fit(pl_module)
    if not isinstance(optimizer, ArmijoGD):
        return None
    return 0.0 if optimizer.outcome is None else float(optimizer.outcome.step_size)


def step_set(pl_module: L.LightningModule) -> FixedStep | None:
    """Return how the next step is made; None outside a fit, and for an optimizer other than torch's plain SGD.

    Nor is there one step for groups of parameters with different options, or a law for a momentum of 1 and more.
    """
    optimizer = _optimizer_in_fit(pl_module)
    if type(optimizer) not in (torch.optim.SGD, HeavyBall, Nesterov):
        return None
    groups = optimizer.param_groups
    if any(group["weight_decay"] or group["maximize"] for group in groups):
        return None
    steps = {
        # A dampening scales what enters the buffer, and so the step.
        FixedStep(
            float(group["lr"]) * (1 - group["dampening"] * bool(group["momentum"])),
            float(group["momentum"]),
            bool(group["nesterov"]),
        )
        for group in groups
    }
    step = steps.pop()
    return step if not steps and step.size >= 0 and 0 <= step.momentum < 1 else None


def _optimizer_in_fit(pl_module: L.LightningModule) -> Any:
    if trainer_of(pl_module) is None or not pl_module.trainer.training:
        return None
    return pl_module.optimizers(use_pl_optimizer=False)
