"""A progress bar over iterations."""

from __future__ import annotations

from typing import Any

import lightning as L

from nclightning.compat.lightning import DescribedProgressBar
from nclightning.compat.twins import is_of_twin
from nclightning.errors import UserError
from nclightning.quantities import DISTANCE, LOSS

__all__ = ["IterationProgressBar"]


class IterationProgressBar(DescribedProgressBar):
    """Rich progress bar that counts gradient-descent iterations up to ``trainer.max_steps``.

    Example:
        >>> import lightning as L
        >>> from nclightning.callbacks import IterationProgressBar
        >>> trainer = L.Trainer(max_steps=1000, accelerator="cpu", logger=False, callbacks=[IterationProgressBar()])
        >>> type(trainer.progress_bar_callback).__name__
        'IterationProgressBar'
    """

    def __init__(self) -> None:
        super().__init__()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a trainer that cannot use this bar.

        Raises:
            ValueError: If the trainer is that of ``pytorch_lightning``.
        """
        if is_of_twin(trainer):
            raise UserError(
                "IterationProgressBar counts the iterations of full-batch runs, which need lightning.Trainer, got that "
                "of pytorch_lightning: leave it out, and the trainer takes a bar of its own."
            )
        super().setup(trainer, pl_module, stage)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Show the last distance, or the last objective if there is no distance. The bar has space for one value."""
        for name, tag in ((each.text, each.tag()) for each in (DISTANCE, LOSS)):
            if tag in trainer.callback_metrics:
                return {name: f"{float(trainer.callback_metrics[tag]):.1e}"}
        return {}

    @property
    def total_train_batches(self) -> int:
        """Length of the bar."""
        return self.trainer.max_steps

    def describe_training(self) -> str:
        """Say what is counted."""
        return "Iterations"

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep one bar over all epochs."""
        if not self.has_training_bar:
            super().on_train_epoch_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance to the iteration reached."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, trainer.global_step - 1)
