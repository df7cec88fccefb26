"""Checks that a trainer's options fit the full-batch loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from nclightning.arguments import check_memory
from nclightning.compat.lightning import cadence_of
from nclightning.errors import UserError
from nclightning.models.sharded import check_strategy

if TYPE_CHECKING:
    from nclightning.models.classifier import RegularizedClassifier

__all__ = ["check_trainer"]


def check_trainer(trainer: L.Trainer, model: RegularizedClassifier, dtype: torch.dtype) -> None:
    """Raise an error unless a trainer's options fit the full-batch loop.

    Args:
        trainer: A trainer before or at the start of a fit.
        model: The module.
        dtype: Dtype in which its parameters were constructed.

    Raises:
        ValueError: If an option does not fit; the message names it.
    """
    if trainer.max_steps < 0:
        raise UserError("trainer.max_steps must be set: it is the number of gradient-descent iterations.")
    _check_loop(trainer, model)
    if trainer.precision not in ("32-true", "64-true") or model.head.weight.dtype != dtype:
        raise UserError(
            f"trainer.precision={trainer.precision!r} does not fit parameters of {dtype}: leave it "
            "out and set the model's dtype to float64 or float32, which then applies to training and checkpoints."
        )
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy):
        check_strategy(strategy, model)
    elif trainer.world_size > 1 and not isinstance(strategy, DDPStrategy):
        raise UserError(
            f"{type(strategy).__name__} does not fit the full-batch loop, which itself sums gradients over "
            "processes: set trainer.strategy=ddp, or ModelParallelStrategy to shard the weights."
        )
    for callback in trainer.checkpoint_callbacks:
        every = cadence_of(callback)
        if every % model.iterations_per_step:
            raise UserError(
                f"every_n_train_steps of {type(callback).__name__} must be a multiple of iterations_per_step = "
                f"{model.iterations_per_step}, got {every}: it would never save."
            )


def _check_loop(trainer: L.Trainer, model: RegularizedClassifier) -> None:
    """Raise an error if an option would change the full-batch loop, or if the host has too little memory."""
    for name, neutral in (("gradient_clip_val", (None, 0)), ("accumulate_grad_batches", (1,))):
        if (value := getattr(trainer, name)) not in neutral:
            raise UserError(
                f"trainer.{name}={value} does not fit the full-batch loop, which uses the whole gradient in each step: "
                "leave it out."
            )
    if trainer.limit_train_batches == 0:
        raise UserError("trainer.limit_train_batches=0 leaves nothing to train on: leave it out.")
    if trainer.world_size == 1 and trainer.strategy.root_device.type == "cpu":
        # Parameters and gradients, of this iterate and of the last accepted one.
        parameters = list(model.parameters())
        elements = 4 * sum(p.numel() for p in parameters) + model.num_samples * model.head.out_features
        check_memory("training on this many samples and classes", elements, parameters[0].dtype)
