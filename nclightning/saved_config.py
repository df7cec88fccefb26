"""The saved configuration of a run."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.cli import SaveConfigCallback

from nclightning.files import make_folder, replaced
from nclightning.folders import run_folder

__all__ = ["SaveRunConfig"]


class SaveRunConfig(SaveConfigCallback):
    """Saves the resolved configuration in the run folder. A resumed run gets a second file.

    The file is written when training has begun, so that a run that ends with an error at its start leaves no file.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Do nothing: the file is written later."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Write the configuration of a new run."""
        if trainer.ckpt_path is None:
            self._write(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the configuration of a resumed run, whose checkpoint has been accepted by now."""
        self._write(trainer)

    def _write(self, trainer: L.Trainer) -> None:
        """Write ``config.yaml``, or ``config_resumed_N.yaml`` if that exists."""
        if self.already_saved or not trainer.is_global_zero:
            return
        self.already_saved = True
        folder = run_folder(trainer)
        if folder is None or not (trainer.loggers or trainer.checkpoint_callbacks):
            return  # The run writes no other files either.
        path, count = folder / "config.yaml", 0
        while path.exists():
            count += 1
            path = folder / f"config_resumed_{count}.yaml"
        make_folder(folder)
        with replaced(path) as partial:
            self.parser.save(self.config, partial, skip_none=False, overwrite=True, multifile=self.multifile)
