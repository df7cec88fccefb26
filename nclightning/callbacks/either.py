"""Monitors of two kinds of module: callbacks of their own behind one name."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import wraps
from typing import Any, Generic, TypeVar

import lightning as L

from nclightning.callbacks.full_batch import full_batch
from nclightning.callbacks.publishing import Publisher
from nclightning.errors import UserTypeError
from nclightning.overrides import ProtectedHooks, protected

__all__ = ["EitherMonitor"]

AtIterates = TypeVar("AtIterates", bound=Publisher)
AtEpochs = TypeVar("AtEpochs", bound=Publisher)


class EitherMonitor(ProtectedHooks, Publisher, Generic[AtIterates, AtEpochs]):
    """Hands the hooks of a trainer on to callbacks: one at iterates of full-batch modules, or one at epochs of others.

    Both are made when they are first needed, and kept: a test after a fit knows what the fit has seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[bool, Publisher] = {}
        self._parts: list[Publisher] = []
        self._loaded: dict[str, Any] | None = None  # A state that came before the module was known.

    @abstractmethod
    def make_at_iterates(self) -> AtIterates:
        """Make the callback for full-batch modules."""

    @abstractmethod
    def make_at_epochs(self) -> AtEpochs:
        """Make the callback for other modules."""

    @property
    def parts(self) -> list[Publisher]:
        """Callbacks to which hooks are handed on."""
        return self._parts

    def always(self) -> list[Publisher]:
        """Return callbacks for modules of both kinds."""
        return []

    def at_iterates(self) -> AtIterates:
        """Return the callback for full-batch modules."""
        if True not in self._made:
            self._made[True] = self.make_at_iterates()
        return self._made[True]  # type: ignore[return-value]

    def at_epochs(self) -> AtEpochs:
        """Return the callback for other modules."""
        if False not in self._made:
            self._made[False] = self.make_at_epochs()
        return self._made[False]  # type: ignore[return-value]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Choose by the module, forget the values of an earlier fit, and refuse another monitor of the same tags.

        Raises:
            ValueError: If there is one.
        """
        chosen: Publisher = self.at_iterates() if full_batch(pl_module) else self.at_epochs()
        self._parts = [chosen, *self.always()]
        super().setup(trainer, pl_module, stage)
        if self._loaded is not None:
            self.load_state_dict(self._loaded)
            self._loaded = None

    def forget_values(self) -> None:
        """Forget the values of an earlier fit."""
        super().forget_values()
        for part in self._parts:
            part.forget_values()

    def state(self) -> dict[str, Any]:
        """Return what checkpoints hold: the state of the callbacks, with the last values of all."""
        state, last = dict[str, Any](), self._last
        for part in self._parts:
            own = part.state()
            state, last = state | own, last | own["last"]
        return state | {"last": last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        if not self._parts:
            self._loaded = state_dict
            return
        super().load_state_dict(state_dict)
        for part in self._parts:
            part.load_state_dict(state_dict | {"last": {}})

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the last values of the checkpoint to other callbacks."""
        super().on_fit_start(trainer, pl_module)
        for part in self._parts:
            part.on_fit_start(trainer, pl_module)


def _handed_on(name: str) -> Callable[..., None]:
    def hook(self: EitherMonitor[Any, Any], *args: Any, **kwargs: Any) -> None:
        for part in self._parts:
            getattr(part, name)(*args, **kwargs)

    hook.__name__, hook.__doc__ = name, f"Hand ``{name}`` on."
    return hook


def _refusing_classes(hook: Callable[..., None]) -> Callable[..., None]:
    @wraps(hook)
    def refuse(self: Any, *args: Any) -> None:
        if not isinstance(self, EitherMonitor):  # A trainer, which calls a hook of a class as if that were an object's.
            name = next(each.__name__ for each in self.callbacks if isinstance(each, type))
            raise UserTypeError(f"callbacks must be objects, got the class {name}: write {name}(...) with parentheses.")
        hook(self, *args)

    return refuse


for _stage in ("train", "validation", "test"):
    for _hook in ("start", "epoch_start", "batch_start", "batch_end", "epoch_end", "end"):
        setattr(EitherMonitor, f"on_{_stage}_{_hook}", _handed_on(f"on_{_stage}_{_hook}"))
for _hook in ("on_iteration_end", "teardown"):
    setattr(EitherMonitor, _hook, _handed_on(_hook))
EitherMonitor.on_exception = _refusing_classes(_handed_on("on_exception"))  # type: ignore[method-assign]
EitherMonitor.on_save_checkpoint = protected(_handed_on("on_save_checkpoint"))  # type: ignore[method-assign]
