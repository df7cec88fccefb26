"""How the values of a monitor reach loggers and other callbacks, also after a resume."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Set
from copy import deepcopy
from typing import Any

import lightning as L
import torch
from torch import Tensor

from nclightning.compat.lightning import present, present_logged, state_key_unchecked
from nclightning.errors import UserError
from nclightning.sending import send_values

__all__ = ["HookingMonitor", "Publisher", "as_metrics", "changed_settings"]


class Publisher(L.Callback):
    """Base of callbacks that log values.

    In a fit all values are logged at ``trainer.global_step``, the number of optimizer steps done; Lightning's own
    values of an epoch's end come at one less. ``callback_metrics`` has them as if they had been logged by
    ``LightningModule.log_dict``. The last values are saved in checkpoints, so that callbacks that monitor them find
    them right after a resume.

    Several monitors of a class can be in one trainer if they log different tags.

    Attributes:
        separation: How several monitors of the class log different tags, as the end of a sentence; empty if they
            cannot.
    """

    separation = ""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}
        self._settings: dict[str, Any] = {}

    def tags(self, pl_module: L.LightningModule) -> set[str]:
        """Return tags that are logged, but for the names of the trainer's loaders in them."""
        return set()

    @property
    def state_key(self) -> str:
        """Name of the state in checkpoints, by the settings that say which values are logged."""
        name = type(self).__qualname__
        return f"{name}{self._settings!r}" if self._settings else name

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget the values of an earlier fit, and refuse another monitor that logs the same tags.

        Raises:
            ValueError: If there is one.
        """
        if stage == "fit":
            self.forget_values()  # Those of a checkpoint are loaded after this.
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for other in callbacks:
            if (
                isinstance(other, Publisher)
                and other is not self
                and (common := sorted(self.tags(pl_module) & other.tags(pl_module)))
            ):
                raise UserError(
                    f"two callbacks of this trainer, {type(self).__name__} and {type(other).__name__}, both log "
                    f"{common[0]!r}{f' and {len(common) - 1} more of the same tags' if len(common) > 1 else ''}: leave "
                    f"one of them out{self.separation}."
                )

    def forget_values(self) -> None:
        """Forget the values of an earlier fit."""
        self._last = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the last values of the checkpoint to other callbacks."""
        present(trainer, as_metrics(self._last))

    def on_iteration_end(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, iteration: int) -> None:
        """Called after each iteration of a full-batch module."""

    def publish(self, pl_module: L.LightningModule, values: dict[str, Tensor]) -> None:
        """Log values of the end of an epoch."""
        trainer, arrived = pl_module.trainer, self._remember(values)
        fitting = trainer.state.fn == "fit"
        if fitting:
            self._send(trainer, arrived)
        self.publish_to_callbacks(pl_module, values, logger=False if fitting else None)

    @staticmethod
    def publish_to_callbacks(
        pl_module: L.LightningModule, values: dict[str, Tensor], logger: bool | None = False
    ) -> None:
        """Show values to other callbacks, and to Lightning's own loggers if they are asked for."""
        # The metrics have merged all processes; averaging equal values is what keeps Lightning from warning.
        pl_module.log_dict(values, sync_dist=True, logger=logger)

    def publish_at_step(self, trainer: L.Trainer, values: dict[str, Tensor]) -> None:
        """Log values in the middle of an epoch."""
        arrived = self._remember(values)
        present(trainer, as_metrics(arrived))
        self._send(trainer, arrived)

    @staticmethod
    def _send(trainer: L.Trainer, values: dict[str, float]) -> None:
        if values:
            present_logged(trainer, as_metrics(values))
            for logger in trainer.loggers:
                send_values(logger, values | {"epoch": trainer.current_epoch}, trainer.global_step)

    def _remember(self, values: dict[str, Tensor]) -> dict[str, float]:
        arrived = torch.stack([value.double() for value in values.values()]).tolist() if values else []
        self._last |= zip(values, arrived, strict=True)
        return dict(zip(values, arrived, strict=True))

    def state(self) -> dict[str, Any]:
        """Return what checkpoints hold: the last values."""
        return {"last": dict(self._last)}

    @state_key_unchecked  # By Lightning; setup() does it.
    def state_dict(self) -> dict[str, Any]:
        """Return what checkpoints hold."""
        return self.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them."""
        self._last = dict(state_dict.get("last", {}))

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Load also the state of a checkpoint whose key is the name of the class, as all were before."""
        states, name = checkpoint.get("callbacks", {}), type(self).__qualname__
        if self.state_key not in states and name in states:
            self.load_state_dict(deepcopy(states[name]))


class HookingMonitor(Publisher):
    """Base of monitors that hook modules: no hook stays behind when a fit, a validation or a test ends."""

    @abstractmethod
    def remove_hooks(self) -> None:
        """Leave no hook behind."""

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self.remove_hooks()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        self.remove_hooks()


def changed_settings(init: Callable[..., None], given: Mapping[str, Any], leave_out: Set[str]) -> dict[str, Any]:
    """Return the arguments of a constructor that are not at their defaults, in a form whose ``repr`` is the same anew.

    Args:
        init: The constructor.
        given: Its arguments by name.
        leave_out: Names of arguments to leave out.
    """
    defaults = {name: each.default for name, each in inspect.signature(init).parameters.items() if name in given}
    chosen = defaults.keys() - leave_out - {"self"}
    values = {name: _plain(given[name]) for name in defaults if name in chosen}
    return {name: value for name, value in values.items() if value != _plain(defaults[name])}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Iterable):  # Of a mapping its names.
        return tuple(_plain(each) for each in value) or None
    return type(value).__qualname__


def as_metrics(values: dict[str, float]) -> dict[str, Tensor]:
    """Make of values what ``trainer.callback_metrics`` holds."""
    return {tag: torch.tensor(value, dtype=torch.float64) for tag, value in values.items()}
