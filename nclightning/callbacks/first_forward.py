"""The head as the first ordinary forward of training shows it, so that no forward is run to find it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import nn

from nclightning.observation import Observation, Recorder
from nclightning.passes import measurements
from nclightning.ranks import raise_together

__all__ = ["FirstForward"]


class FirstForward:
    """Watches a module until its first forward is over.

    Args:
        pl_module: The module, in its first step.
        examine: Finds the head, given what was seen; None if the step did not call the module itself.
    """

    def __init__(self, pl_module: L.LightningModule, examine: Callable[[Observation | None], None]) -> None:
        self._module, self._examine = pl_module, examine
        self._then: Callable[[Observation | None], None] | None = None
        self._failure: Exception | None = None
        self._recorder: Recorder | None = Recorder(pl_module, ordinary=True)
        # It comes after those of the user, which may change the output.
        self._handle = pl_module.register_forward_hook(self._end)

    def follow(self, then: Callable[[Observation | None], None]) -> None:
        """Have something called once the head is known."""
        self._then = then

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._recorder is None or measurements():  # A measurement of another monitor, say.
            return
        seen = self._recorder.observation(output)
        self.remove()
        self._go_on(seen)
        # Copies of weights in lower precision that were made without gradients are not for training.
        torch.clear_autocast_cache()

    def _go_on(self, seen: Observation | None) -> None:
        try:
            self._examine(seen)
            if self._then is not None:
                self._then(seen)
        except Exception as error:  # Not here, in the middle of somebody's forward.
            self._failure = error

    def finish(self) -> None:
        """End the first step.

        Raises:
            Exception: On all processes, if one of them failed.
        """
        if self._recorder is not None:
            self.remove()
            self._go_on(None)
        raise_together(self._failure, self._module.device)

    def remove(self) -> None:
        """Remove the hooks."""
        if self._recorder is not None:
            self._recorder.remove()
        self._handle.remove()
        self._recorder = None
