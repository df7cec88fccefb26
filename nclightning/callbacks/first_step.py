"""What the first step of training shows, and what a monitor refuses because of it."""

from __future__ import annotations

from typing import Any, Literal

import lightning as L

from nclightning.callbacks.host import LightningHost
from nclightning.callbacks.training_data import check_rest, check_split, labels_of, num_left_over, parts_of
from nclightning.errors import UserError
from nclightning.probe.first_batch import check_range
from nclightning.probe.first_forward import FirstForward
from nclightning.probe.reader import PairReader
from nclightning.probe.sweep import has_lazy_parts
from nclightning.probe.watch import FirstStepHooks
from nclightning.ranks import failing_together, rank_zero_warn

__all__ = ["FirstTrainingStep", "Reads"]

Reads = Literal["sweep", "online", ""]


class FirstTrainingStep:
    """Checks a module by the first batch of training, on all processes together, and by what its step does with it.

    Args:
        reader: Of features and labels.

    Attributes:
        forward: Waits for the first forward of a module, where that makes its head.
    """

    def __init__(self, reader: PairReader) -> None:
        self._reader, self._is_over = reader, False
        self._step: FirstStepHooks | None = None
        self.forward: FirstForward | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_step": None, "forward": None}  # Hooks cannot be pickled.

    @property
    def is_watched(self) -> bool:
        """Whether the step that runs, or did last, is the first one."""
        return self._step is not None or self.forward is not None

    def restart(self) -> None:
        """Forget what an earlier fit has shown."""
        self._reader.forget()
        self.remove()
        self._is_over = False

    def is_due(self, pl_module: L.LightningModule, reads: Reads) -> bool:
        """Whether the batch that comes is the first of a module that can be examined, for :meth:`begin`.

        A module with lazy layers is examined with its second batch: its first forward makes their weights.
        """
        return not self._is_over and (reads == "online" or not has_lazy_parts(pl_module))

    def begin(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, reads: Reads) -> None:
        """Check the first training batch, and hook the module for its step.

        Args:
            trainer: Of the module.
            pl_module: The module.
            batch: As the step gets it, of all loaders.
            reads: How training is read, if it is.

        Raises:
            Exception: On all processes, if one of them fails.
        """
        self._is_over = True
        if reads == "online" and has_lazy_parts(pl_module):
            self._wait(pl_module, batch)
            return
        with failing_together(pl_module.device):
            self._check(trainer, pl_module, batch, reads)

    def _check(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, reads: Reads) -> None:
        reader, host = self._reader, LightningHost(pl_module)
        parts = [batch] if reads == "online" else list(parts_of(batch, trainer.train_dataloader))
        check_split(reader.split, parts)
        reader.check_batch(host, parts[0])
        for other in parts[1:] if reads else []:
            labels = labels_of(reader.split, other)
            check_range(labels, reader.head_of(pl_module), reader.ignore_index, reader.agreement == "factor")
        if reads == "sweep" and (rest := num_left_over(trainer)):
            check_rest(reader, host, parts[0], rest)
        if reads == "online" and not reader.has_examined(pl_module):  # The forward made the head, and it was put back.
            self._wait(pl_module, batch)
        elif reads:
            self._step = reader.watch_first_step(pl_module)

    def _wait(self, pl_module: L.LightningModule, batch: Any) -> None:
        """Examine the module once its first forward is over, until :meth:`end`."""
        host = LightningHost(pl_module)
        self.forward = FirstForward(pl_module, host.device, lambda: self._reader.check_batch(host, batch))

    def end_forward(self) -> None:
        """End the forward of a module whose first one makes its head.

        Raises:
            Exception: On all processes, if it did not show what :meth:`PairReader.check_batch` needs.
        """
        if self.forward is not None:
            forward, self.forward = self.forward, None
            forward.finish()

    def end(self, pl_module: L.LightningModule, *, online: bool = False) -> None:
        """Say where the first step did something else than what was examined.

        Raises:
            ValueError: If features of the steps themselves are read, and their inputs are other ones.
        """
        step, self._step = self._step, None
        if step is None:
            return
        differs, runs = step.end()
        said = step.words(type(pl_module).__name__, self._reader.head_of(pl_module).name, differs, runs)
        if said and differs and online:
            raise UserError(said)
        if said:
            rank_zero_warn(said)

    def remove(self) -> None:
        """Leave no hook behind."""
        for each in (self._step, self.forward):
            if each is not None:
                each.remove()
        self._step = self.forward = None

    def check_sanity(self, pl_module: L.LightningModule, batch: Any, labelled: bool) -> None:
        """Check a batch of Lightning's sanity check, and forget it: training has others.

        Raises:
            Exception: On all processes, if one of them fails.
        """
        try:
            with failing_together(pl_module.device):
                self._reader.check_batch(LightningHost(pl_module), batch, labelled=labelled)
        finally:
            self._reader.forget()
