"""The part of a full-batch module that writes and checks its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L

from nclightning.compat.lightning import trainer_of
from nclightning.models.resume import check_problem, check_resumable, check_weights, warn_of_optimizer_options
from nclightning.models.schedules import only_optimizer
from nclightning.overrides import ProtectedHooks, protected
from nclightning.ranks import world_size
from nclightning.sharding import is_sharded

__all__ = ["ResumableModule"]


class ResumableModule(ProtectedHooks, L.LightningModule):
    """A module that checks the checkpoint of a resumed run, and saves in it why training ended early.

    Attributes:
        failure: Why the last fit ended early: the ``iteration``, a ``sentence`` that gives the reason, and
            ``is_error``, whether something is wrong. None if it did not end early.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failure: dict[str, Any] | None = None
        self._ending: str | None = None  # Why the run that is resumed had ended, in words.

    @protected
    def setup(self, stage: str) -> None:
        """Forget how the previous fit ended."""
        if stage == "fit":
            self.failure = self._ending = None

    @protected
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check the checkpoint, and warn of options that a resumed run ignores."""
        self.check_checkpoint(checkpoint)
        if is_sharded(self):  # The weights are loaded already, and on_fit_start has run.
            self.check_parameters()
        if trainer_of(self) is not None and world_size() == 1:
            check_weights(checkpoint, self)
        if trainer_of(self) is not None and self.trainer.training:
            check_resumable(checkpoint, weights_in_place=is_sharded(self))
            warn_of_optimizer_options(only_optimizer(self.configure_optimizers()), checkpoint["optimizer_states"])
            self.failure, self._ending = checkpoint.get("failure"), self.ending_of(checkpoint)

    def check_parameters(self) -> None:
        """Raise an error unless the parameters can be trained."""

    def check_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Refuse a checkpoint of another problem: a resumed run would mix two problems in one curve.

        Args:
            checkpoint: A Lightning checkpoint.

        Raises:
            ValueError: If hyperparameters differ; the message names them.
        """
        check_problem(checkpoint, {name: self.hparams.get(name) for name in self._problem_hparams})

    def ending_of(self, checkpoint: Mapping[str, Any]) -> str | None:
        """Return why a run cannot continue from a checkpoint: its search ended, or its objective was not finite.

        Returns:
            One sentence; None if the run can continue. A resumed run has the same optimizer options, so that it would
            end in the same way.
        """
        failure: dict[str, Any] = checkpoint.get("failure") or {}
        ended = failure.get("iteration") == checkpoint["global_step"]
        return f"Iteration {failure['iteration']}: {failure['sentence']}" if ended else None

    @protected
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save why training ended early."""
        checkpoint["failure"] = self.failure

    _problem_hparams: tuple[str, ...] = ()
