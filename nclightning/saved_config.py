"""The configuration of a run, as its folder keeps it."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.cli import SaveConfigCallback

from nclightning.files import make_folder, replaced
from nclightning.folders import run_folder

__all__ = ["SaveRunConfig"]


class SaveRunConfig(SaveConfigCallback):
    """Saves the resolved configuration in the run folder; a resumed run gets a file of its own beside it.

    That is when training has begun: a run that is refused leaves no file.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write nothing yet."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Write the configuration of a new run."""
        if trainer.ckpt_path is None:
            self._write(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write that of a resumed run, whose checkpoint is accepted only now."""
        self._write(trainer)

    def _write(self, trainer: L.Trainer) -> None:
        """Write ``config.yaml``, or ``config_resumed_N.yaml`` where that is there already."""
        if self.already_saved or not trainer.is_global_zero:
            return
        self.already_saved = True
        folder = run_folder(trainer)
        if folder is None or not (trainer.loggers or trainer.checkpoint_callbacks):
            return  # A run that leaves nothing else.
        path, count = folder / "config.yaml", 0
        while path.exists():
            count += 1
            path = folder / f"config_resumed_{count}.yaml"
        make_folder(folder)
        with replaced(path) as partial:
            self.parser.save(self.config, partial, skip_none=False, overwrite=True, multifile=self.multifile)
