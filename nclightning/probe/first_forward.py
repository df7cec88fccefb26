"""The head of a model whose first forward of training makes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from nclightning.probe.hooks import hook_result
from nclightning.ranks import raise_together

__all__ = ["FirstForward"]


class FirstForward:
    """Waits until the first forward of a model is over.

    Args:
        module: The model, before its first step.
        device: On which processes talk to each other.
        examine: Finds the head.
    """

    def __init__(self, module: nn.Module, device: torch.device, examine: Callable[[], None]) -> None:
        self._device, self._examine = device, examine
        self._then: Callable[[], None] | None = None
        self._failure: Exception | None = None
        self._is_over = False
        self._handle = hook_result(module, self._end)

    def follow(self, then: Callable[[], None]) -> None:
        """Have something called once the head is known."""
        self._then = then

    def _end(self, args: Any, output: Any) -> None:
        if not self._is_over:
            self._go_on()
            # Copies of weights in lower precision that were made without gradients are not for training.
            torch.clear_autocast_cache()

    def _go_on(self) -> None:
        self._is_over = True
        try:
            self._examine()
            if self._then is not None:
                self._then()
        except Exception as error:  # Not here, in the middle of somebody's forward.
            self._failure = error

    def finish(self) -> None:
        """End the first step.

        Raises:
            Exception: On all processes, if one of them failed.
        """
        self.remove()
        if not self._is_over:  # The step runs the model in another way.
            self._go_on()
        raise_together(self._failure, self._device)

    def remove(self) -> None:
        """Remove the hook."""
        self._handle.remove()
