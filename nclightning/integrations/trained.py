"""Adapter of a model that a ``transformers.Trainer`` trains. This module imports no optional library."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nclightning.compat.transformers import prepared_inputs, shares_batches
from nclightning.errors import UserError, UserTypeError
from nclightning.probe.features import split_batch
from nclightning.probe.reader import PairReader
from nclightning.probe.sweep import eager, frozen
from nclightning.probe.validation import checked_model, unwrapped

__all__ = ["TransformersHost", "check_task", "labels_by_name"]


class TransformersHost:
    """Adapter of a model and its trainer for measuring.

    Args:
        trainer: The trainer.
        head: The head that the user named.
    """

    def __init__(self, trainer: Any, head: Any = None) -> None:
        if shares_batches(trainer):
            raise UserError(
                "NeuralCollapseCallback cannot run a model whose layers or sequences are split over processes, or "
                "whose weights DeepSpeed's ZeRO-3 shards: measure a checkpoint with nclightning.measure(model, data)."
            )
        self._trainer, self.module = trainer, unwrapped(checked_model(trainer.model, None), head).module
        self.device: torch.device = trainer.args.device
        self.rank: int = trainer.args.process_index
        self.world_size: int = trainer.args.world_size

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Run the model frozen and uncompiled."""
        with frozen(self.module), eager():
            yield

    def precision(self) -> AbstractContextManager[Any]:
        """Run forwards in the precision of the trainer's steps; most often accelerate has put it into the model."""
        context: AbstractContextManager[Any] = self._trainer.compute_loss_context_manager()
        return context

    def on_device(self, batch: Any) -> Any:
        """Take a batch where a step takes it, and through what a subclass does there."""
        return prepared_inputs(self._trainer, batch)


def labels_by_name(trainer: Any, batch: Any) -> Callable[[Any], tuple[Any, Tensor]] | None:
    """Return a function that splits a batch by the trainer's name of the labels, if the batch alone does not show it.

    Args:
        trainer: The trainer, with its ``label_names``.
        batch: A batch, as a training step gets it.

    Returns:
        A ``batch_fn``; None if none is needed.

    Raises:
        ValueError: If there are several labels.
    """
    names = [name for name in trainer.label_names or () if isinstance(batch, Mapping) and name in batch]
    if len(names) > 1:
        raise UserError(
            f"the trainer's label_names are {', '.join(names)}, and neural collapse has one label for each sample: "
            "pass batch_fn=(batch) -> (inputs, labels) with the labels of one head."
        )
    if not names:
        return None
    try:
        if split_batch(batch)[1] is batch[names[0]]:
            return None
    except UserError:
        pass
    return _TakeLabels(names[0])


class _TakeLabels:
    """Splits a batch by the name of its labels."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, batch: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
        return {name: value for name, value in batch.items() if name != self._name}, batch[self._name]


def check_task(module: nn.Module, reader: PairReader, batch: Any) -> None:
    """Refuse tasks without classes.

    Args:
        module: The model, with its ``config``.
        reader: Splits batches.
        batch: A batch, as a training step gets it.

    Raises:
        TypeError: If the task has no classes. The message names the task.
    """
    labels: Any = reader.split(batch)[1]
    config = getattr(module, "config", None)
    if not isinstance(labels, Tensor):
        return  # Said later.
    floating, several = labels.is_floating_point(), labels.ndim > 1 and labels.shape[-1] > 1
    task = getattr(config, "problem_type", None)
    if task == "regression" or getattr(config, "num_labels", 2) == 1 or (floating and not several):
        raise UserTypeError(
            f"{type(module).__name__} is trained for regression, on labels of {labels.dtype}, and neural collapse is "
            "of classes: leave NeuralCollapseCallback out, or pass batch_fn=(batch) -> (inputs, labels) with class "
            "numbers."
        )
    if task == "multi_label_classification" or (floating and several):
        raise UserTypeError(
            f"{type(module).__name__} is trained on several labels for each sample, {tuple(labels.shape)} "
            f"{labels.dtype}, and neural collapse is of one class for each: leave NeuralCollapseCallback out, or pass "
            "batch_fn=(batch) -> (inputs, labels) with the number of one class."
        )
