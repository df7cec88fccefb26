"""What the optimizer of a full-batch run tells of its last step."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from torch import Tensor

from nclightning.compat.lightning import trainer_of
from nclightning.optim import ArmijoGD

__all__ = ["search_readings", "step_taken"]


def search_readings(pl_module: L.LightningModule) -> dict[str, Tensor | float]:
    """Return step size and evaluations of a line search; nothing outside a fit, and for other optimizers."""
    if trainer_of(pl_module) is None or not pl_module.trainer.training:
        return {}
    optimizer: Any = pl_module.optimizers(use_pl_optimizer=False)
    if not hasattr(optimizer, "outcome"):
        return {}
    outcome = optimizer.outcome
    return {
        "line_search/step_size": math.nan if outcome is None else outcome.step_size,
        "line_search/evaluations": optimizer.total_evaluations,
    }


def step_taken(pl_module: L.LightningModule) -> float | None:
    """Return the step to the iterate; None outside a fit, and for an optimizer that is not gradient descent."""
    if trainer_of(pl_module) is None or not pl_module.trainer.training:
        return None
    optimizer: Any = pl_module.optimizers(use_pl_optimizer=False)
    if isinstance(optimizer, ArmijoGD):
        return 0.0 if optimizer.outcome is None else float(optimizer.outcome.step_size)
    if type(optimizer) is not torch.optim.SGD:
        return None
    groups = optimizer.param_groups
    steps = {float(group["lr"]) for group in groups}
    plain = not any(group[name] for group in groups for name in ("momentum", "weight_decay", "maximize"))
    return steps.pop() if plain and len(steps) == 1 else None
