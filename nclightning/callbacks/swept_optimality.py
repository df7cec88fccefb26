"""Gap and distance of a module that is not full-batch, from one pass over its training set."""

from __future__ import annotations

from typing import Any, Literal

import lightning as L
from torch import Tensor

from nclightning.callbacks.attach import Attachment
from nclightning.probe.features import pair_rows
from nclightning.probe.optimality import OptimalityCollector

__all__ = ["sweep_optimality"]


def sweep_optimality(
    trainer: L.Trainer,
    pl_module: L.LightningModule,
    attachment: Attachment,
    training_set: tuple[Any, int | None],
    loss: Literal["mse", "ce"],
    penalties: tuple[float, float] | None,
) -> dict[str, Tensor]:
    """Sweep the training set once.

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
    collectors: list[OptimalityCollector] = []  # Of one: the head is known from the first batch on.

    def add(kept: dict[str, Tensor], labels: Tensor) -> None:
        if not collectors:
            collectors.append(OptimalityCollector(loss, attachment.whole_head_of(pl_module), penalties))
        collectors[0].update(*pair_rows(kept[""], labels), copy=False)

    loader, limit = training_set
    attachment.sweep(trainer, pl_module, loader, add, limit)
    return {f"optimality/{name}": value for name, value in collectors[0].read().items()}
