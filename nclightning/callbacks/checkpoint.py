"""A checkpoint that is always there to resume from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn

from nclightning.errors import UserError
from nclightning.files import make_folder
from nclightning.files import save_checkpoint as write_checkpoint

__all__ = ["LastCheckpoint"]


class _DirectCheckpointIO(TorchCheckpointIO):
    """Writes local files straight to disk, in one step; Lightning's own makes each a second time in memory."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint, or leave what is there."""
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        make_folder(Path(path).parent)
        write_checkpoint(checkpoint, Path(path))


class LastCheckpoint(Checkpoint):
    """Keeps ``checkpoints/last.ckpt`` of the run folder: at a cadence, at the end, and on an interrupt or error.

    Lightning's ``ModelCheckpoint`` does not save the last iterate of a run whose length is no multiple of its cadence.
    The file is replaced in one step, so that a crash while saving leaves the one before. Lightning runs checkpoint
    callbacks after all others: the readings up to the checkpoint are on disk when it appears.

    Args:
        every_n_iterations: Cadence. It acts at ends of Lightning steps, at the first one past each multiple.

    Raises:
        ValueError: If the cadence is below 1.
    """

    def __init__(self, every_n_iterations: int = 1000) -> None:
        if every_n_iterations < 1:
            raise UserError(f"every_n_iterations must be at least 1, got {every_n_iterations}.")
        self.every_n_iterations = every_n_iterations
        self._saved: int | None = None  # Until a fit has started there is nothing to save.
        self._first = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget the fit before; write files without a copy in memory, unless the user chose how to write."""
        self._saved = None
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = _DirectCheckpointIO()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count from the iterate that the run starts from."""
        self._saved = self._first = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save at the cadence, but not the last iterate: its row is complete when training has ended."""
        assert self._saved is not None
        due = trainer.global_step // self.every_n_iterations > self._saved // self.every_n_iterations
        if due and not _is_ending(trainer):
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the last iterate, with all that was read there."""
        if self._saved == trainer.global_step != self._first:
            self._saved = self._first  # What ended the run came after the checkpoint of this iterate.
        self._save(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save what was reached; a resume that was refused leaves the checkpoint that it came from."""
        alone = trainer.world_size > 1 and not isinstance(exception, KeyboardInterrupt)
        if trainer.training and not alone:  # Saving takes all processes; interrupts reach them together.
            try:
                self._save(trainer)
            except (UserError, OSError) as error:  # The first error is what the user has to hear.
                if str(error) != str(exception):
                    rank_zero_warn(f"the last checkpoint could not be saved: {error}")

    def _save(self, trainer: L.Trainer) -> None:
        if self._saved is not None and trainer.global_step > self._saved:
            for logger in trainer.loggers:
                logger.save()  # A run that is killed after the checkpoint has its readings up to it.
            folder = Path(trainer.log_dir or trainer.default_root_dir)
            trainer.save_checkpoint(folder / "checkpoints" / "last.ckpt", weights_only=False)
            self._saved = trainer.global_step


def _is_ending(trainer: L.Trainer) -> bool:
    """Whether training ends with the present Lightning step, as far as is known by now."""
    steps, epochs = trainer.global_step, trainer.current_epoch + 1
    stops = trainer.should_stop and steps >= (trainer.min_steps or 0) and epochs >= (trainer.min_epochs or 0)
    return stops or 0 <= trainer.max_steps <= steps
