"""The steps of a trainer, handed to a measurement of them; and what becomes of errors in a measurement."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import lightning as L
from torch import Tensor

from nclightning.callbacks.host import LightningHost
from nclightning.callbacks.modules import name_loaders
from nclightning.callbacks.publishing import HookingMonitor
from nclightning.probe.first_forward import FirstForward
from nclightning.probe.step_measurement import StepMeasurement
from nclightning.probe.sweep import TraceError
from nclightning.ranks import rank_zero_warn

__all__ = ["OnError", "TrainerSteps"]


class OnError:
    """What becomes of an error in a measurement.

    Args:
        choice: ``"raise"``, or ``"warn"``.
    """

    def __init__(self, choice: Literal["raise", "warn"]) -> None:
        self._choice = choice

    def raises(self, error: Exception) -> bool:
        """Whether an error ends the run: that a module was changed always does."""
        return self._choice == "raise" or isinstance(error, TraceError)

    @contextmanager
    def guard(self, callback: HookingMonitor) -> Iterator[None]:
        """Turn errors inside into a warning where the user asked for that, and leave no hook of the callback behind."""
        try:
            yield
        except Exception as error:
            callback.remove_hooks()
            if self.raises(error):
                raise
            rank_zero_warn(f"no reading of neural collapse: {error}")


class TrainerSteps:
    """Hands the steps of a trainer over to a measurement, and keeps errors until processes can hear of them together.

    Args:
        measurement: Of the steps.
        on_error: What becomes of errors.
    """

    def __init__(self, measurement: StepMeasurement, on_error: OnError) -> None:
        self._measurement, self._on_error = measurement, on_error
        self._named: dict[int, tuple[str, Any]] = {}  # Name and loader by its number.
        self._host: LightningHost | None = None  # That of the steps, which is the same for all of them.

    def _loader(self, loaders: Any, index: int) -> tuple[str, Any]:
        """Return name and loader by its number."""
        if index not in self._named:
            self._named[index] = list(name_loaders(loaders))[index]
        return self._named[index]

    def hook(
        self, pl_module: L.LightningModule, batch: Any, loaders: Any, index: int = 0, first: FirstForward | None = None
    ) -> None:
        """Hook the module before a step."""
        try:  # Not the guard itself, which costs as much as the rest.
            self._host = self._host or LightningHost(pl_module)
            self._measurement.hook(self._host, batch, self._loader(loaders, index)[0], first)
        except Exception as error:
            self._fail(error)

    def collect(self, pl_module: L.LightningModule, loaders: Any, index: int = 0) -> None:
        """Take the features of the step."""
        try:
            self._measurement.collect(self._host or LightningHost(pl_module), *self._loader(loaders, index))
        except Exception as error:
            self._fail(error)

    def read(self, pl_module: L.LightningModule) -> dict[str, Tensor]:
        """Evaluate the measures when all steps are over."""
        return self._measurement.read(LightningHost(pl_module))

    def _fail(self, error: Exception) -> None:
        if self._on_error.raises(error):
            self._measurement.remove()
            raise error
        self._measurement.fail(error)  # Processes hear of it together, when they read.

    def remove(self) -> None:
        """Remove the hooks. The next :meth:`hook` brings them back."""
        self._measurement.remove()
