"""Modules that run full-batch iterations, and the interface that monitors need."""

from __future__ import annotations

from typing import Protocol, cast

import lightning as L
from torch import Tensor, nn

from nclightning.errors import UserError
from nclightning.heads import HeadReader
from nclightning.ranks import rank_zero_warn

__all__ = ["FullBatchModule", "as_full_batch", "full_batch", "head_reader", "warn_of_steps"]


class FullBatchModule(Protocol):
    """A module whose training steps run iterations on the whole training set.

    :class:`nclightning.models.RegularizedClassifier` and its subclasses are such modules. After each iteration it calls
    ``on_iteration_end(trainer, pl_module, batch, iteration)`` of the trainer's callbacks. With an attribute
    ``problem``, a :class:`nclightning.theory.UFMProblem` or :class:`nclightning.problems.Problem`, gap and distance can
    be measured, too. With an attribute ``objective`` whose ``targets`` are a table, labels are its rows.

    Attributes:
        iterations_per_step: Iterations of a training step. A module with this attribute is taken to be full-batch.
        num_samples: N, the size of the training set.
        head: The last layer.
        features_are_free: Whether the features themselves are parameters, one row per sample.
    """

    iterations_per_step: int
    num_samples: int
    head: nn.Linear

    @property
    def features_are_free(self) -> bool: ...  # noqa: D102

    def features_of(self, x: Tensor) -> Tensor:
        """Return what enters the head, ``(B, d)``."""

    def value_and_grad_norm(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor | float, Tensor | float]:
        """Return the objective and the norm of its gradient at the current parameters."""

    def count_free_parameters(self) -> int:
        """Return the number of trained parameters."""


_MEMBERS = ("num_samples", "head", "features_are_free", "features_of", "value_and_grad_norm", "count_free_parameters")


def full_batch(pl_module: nn.Module) -> bool:
    """Whether a module runs full-batch iterations."""
    return hasattr(pl_module, "iterations_per_step")


def as_full_batch(pl_module: L.LightningModule) -> FullBatchModule:
    """Check that a full-batch module has the whole interface, and return it.

    Raises:
        ValueError: If an attribute is missing.
    """
    # The class is asked first, because evaluating a property may be costly or raise an error.
    missing = [name for name in _MEMBERS if not (hasattr(type(pl_module), name) or hasattr(pl_module, name))]
    if not missing and not isinstance(pl_module.head, nn.Linear):
        missing = ["head as an nn.Linear"]
    if missing or not full_batch(pl_module):
        raise UserError(
            f"{type(pl_module).__name__} has iterations_per_step, as full-batch modules have, and no "
            f"{', '.join(missing)}: derive it from nclightning.models.RegularizedClassifier, or rename "
            "iterations_per_step if its batches are not the whole training set."
        )
    return cast(FullBatchModule, pl_module)


def head_reader(module: FullBatchModule) -> HeadReader:
    """Return the head of a full-batch module."""
    return HeadReader(module.head, "head", "weight", False, module.head.out_features, module.head.in_features)


def warn_of_steps(pl_module: L.LightningModule, every_n_steps: int) -> None:
    """Warn that a cadence in steps has no effect on a full-batch module.

    Args:
        pl_module: The module.
        every_n_steps: The cadence that the user gave.
    """
    rank_zero_warn(
        f"every_n_steps={every_n_steps} has no effect on {type(pl_module).__name__}, which runs full-batch iterations: "
        "set every_n_iterations."
    )
