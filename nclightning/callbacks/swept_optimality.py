"""Gap and distance of a module that is not full-batch, from two passes over its training set."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import lightning as L
from torch import Tensor

from nclightning.callbacks.attach import Attachment
from nclightning.functional import distance_to_collapse
from nclightning.metrics import NeuralCollapse, Optimality
from nclightning.metrics.optimality import check_counts
from nclightning.probe.features import pair_rows
from nclightning.theory import UFMProblem

__all__ = ["sweep_optimality"]

# What is logged with fitted penalties.
_FITTED = ("gap", "distance", "relative_distance", "lambda_w", "lambda_h")


def sweep_optimality(
    trainer: L.Trainer,
    pl_module: L.LightningModule,
    attachment: Attachment,
    training_set: tuple[Any, int | None],
    loss: Literal["mse", "ce"],
    penalties: tuple[float, float] | None,
) -> dict[str, Tensor]:
    """Sweep the training set for its class means, and again for the distance to the optimum.

    Args:
        trainer: Of the module.
        pl_module: The module.
        attachment: That found its head.
        training_set: The loader, and the number of batches to which training is held.
        loss: Of the problem.
        penalties: On head and features; None fits both.

    Returns:
        Values by tag; nan where no penalties make the scales of the features optimal.
    """
    loader, limit = training_set

    def run(make: Callable[[], NeuralCollapse]) -> NeuralCollapse:
        metrics: list[NeuralCollapse] = []  # Of one: the head is known from the first batch on.

        def add(kept: dict[str, Tensor], labels: Tensor) -> None:
            if not metrics:
                metrics.append(make().to(pl_module.device))
            metrics[0].update(*pair_rows(kept[""], labels))

        attachment.sweep(trainer, pl_module, loader, add, limit)
        return metrics[0]

    def light() -> NeuralCollapse:
        head = attachment.head_of(pl_module)
        return NeuralCollapse(head.out_features, head.in_features, head, measures=("nc1_ratio",))

    stats, head = run(light).gathered(), attachment.whole_head_of(pl_module)
    check_counts(stats.counts, int(stats.counts.max()))
    sizes = loss, head.out_features, int(stats.counts.max()), head.in_features
    if penalties is None:
        fitted = distance_to_collapse(stats, head.weight)
        scales = float(fitted.head_scale), float(fitted.feature_scale)
        if not min(scales) > 0 or (loss == "mse" and scales[0] * scales[1] >= 1):
            return {f"optimality/{name}": stats.spreads.new_tensor(math.nan) for name in _FITTED}
        problem = UFMProblem.at_scale(*sizes, *scales)
    else:
        problem = UFMProblem(*sizes, *penalties)
    values = {f"optimality/{name}": v for name, v in run(lambda: Optimality(problem, head)).compute().items()}
    if penalties is None:
        for name in ("lambda_w", "lambda_h"):
            values[f"optimality/{name}"] = stats.counts.new_tensor(getattr(problem, name))
    return values
