"""What a trainer must be like for the full-batch loop."""

from __future__ import annotations

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from nclightning.errors import UserError
from nclightning.models.sharded import check_strategy

__all__ = ["check_trainer"]


def check_trainer(
    trainer: L.Trainer, model: L.LightningModule, iterations_per_step: int, made: torch.dtype, present: torch.dtype
) -> None:
    """Raise unless a trainer's options fit the full-batch loop.

    Args:
        trainer: Before or at the start of a fit.
        model: The module.
        iterations_per_step: Its iterations per Lightning step.
        made: Type in which its parameters were made.
        present: Their type now.

    Raises:
        ValueError: Naming the option.
    """
    if trainer.max_steps < 0:
        raise UserError("trainer.max_steps must be set: it is the number of gradient-descent iterations.")
    if trainer.precision not in ("32-true", "64-true") or made != present:
        raise UserError(
            f"trainer.precision={trainer.precision!r} does not fit parameters of {made}: leave it "
            "out and set the model's dtype to float64 or float32, which then holds from start to checkpoint."
        )
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy):
        check_strategy(strategy, model)
    elif trainer.world_size > 1 and not isinstance(strategy, DDPStrategy):
        raise UserError(
            f"{type(strategy).__name__} does not fit the full-batch loop, which sums gradients over processes by "
            "itself: set trainer.strategy=ddp, or ModelParallelStrategy to share out the weights."
        )
    for callback in trainer.checkpoint_callbacks:
        every = getattr(callback, "_every_n_train_steps", 0) or 0
        if every % iterations_per_step:
            raise UserError(
                f"every_n_train_steps of {type(callback).__name__} must be a multiple of iterations_per_step = "
                f"{iterations_per_step}, got {every}: it would never save."
            )
