"""A full-batch module as its checkpoints know it."""

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
    """A module that checks the checkpoint from which a run goes on, and keeps in it why no iteration follows.

    Attributes:
        failure: Of the last fit: ``iteration`` at which no further one made sense, the ``sentence`` that says why, and
            ``is_error``, whether something is wrong; None if there is none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failure: dict[str, Any] | None = None
        self._ending: str | None = None  # The same in words, of the checkpoint that a run starts from.

    @protected
    def setup(self, stage: str) -> None:
        """Forget how the fit before ended."""
        if stage == "fit":
            self.failure = self._ending = None

    @protected
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check it, and say what a resume ignores."""
        self.check_checkpoint(checkpoint)
        if is_sharded(self):  # Its weights are in place, and on_fit_start was before.
            self.check_parameters()
        if trainer_of(self) is not None and world_size() == 1:
            check_weights(checkpoint, self)
        if trainer_of(self) is not None and self.trainer.training:
            check_resumable(checkpoint, weights_in_place=is_sharded(self))
            warn_of_optimizer_options(only_optimizer(self.configure_optimizers()), checkpoint["optimizer_states"])
            self.failure, self._ending = checkpoint.get("failure"), self.ending_of(checkpoint)

    def check_parameters(self) -> None:
        """Raise unless the parameters can be trained."""

    def check_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Refuse a checkpoint of another problem, whose curves would be continued under a wrong name.

        Args:
            checkpoint: Lightning's.

        Raises:
            ValueError: Naming the hyperparameters that differ.
        """
        check_problem(checkpoint, {name: self.hparams.get(name) for name in self._problem_hparams})

    def ending_of(self, checkpoint: Mapping[str, Any]) -> str | None:
        """Say why a run cannot go on from a checkpoint: its search ended there, or its objective was not finite.

        Returns:
            A sentence; None if it can. A resumed run keeps the optimizer's options, so that it would end again.
        """
        failure: dict[str, Any] = checkpoint.get("failure") or {}
        ended = failure.get("iteration") == checkpoint["global_step"]
        return f"Iteration {failure['iteration']}: {failure['sentence']}" if ended else None

    @protected
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep why no further iteration makes sense."""
        checkpoint["failure"] = self.failure

    _problem_hparams: tuple[str, ...] = ()
