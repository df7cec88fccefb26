"""Detection of the head after the first training forward, for models with lazy layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from nclightning.probe.hooks import hook_result
from nclightning.ranks import raise_together

__all__ = ["FirstForward"]


class FirstForward:
    """A hook that finds the head of a model at the end of its first forward.

    Args:
        module: The model, before its first step.
        device: Device for communication between processes.
        examine: Function that finds the head.
    """

    def __init__(self, module: nn.Module, device: torch.device, examine: Callable[[], None]) -> None:
        self._device, self._examine = device, examine
        self._then: Callable[[], None] | None = None
        self._failure: Exception | None = None
        self._is_over = False
        self._handle = hook_result(module, self._end)

    def follow(self, then: Callable[[], None]) -> None:
        """Set a function that is called once the head is known."""
        self._then = then

    def _end(self, args: Any, output: Any) -> None:
        """Find the head at the end of the first forward."""
        if not self._is_over:
            self._go_on()
            # Training must not use copies of weights in lower precision that were made without gradients.
            torch.clear_autocast_cache()

    def _go_on(self) -> None:
        """Find the head, and call the function that waits for it."""
        self._is_over = True
        try:
            self._examine()
            if self._then is not None:
                self._then()
        except Exception as error:  # Raised later: an error here would end the user's own forward.
            self._failure = error

    def finish(self) -> None:
        """Finish after the first step, also if it did not call the model.

        Raises:
            Exception: On all processes, if one of them failed.
        """
        self.remove()
        if not self._is_over:  # The step ran the model without calling it.
            self._go_on()
        raise_together(self._failure, self._device)

    def remove(self) -> None:
        """Remove the hook."""
        self._handle.remove()
