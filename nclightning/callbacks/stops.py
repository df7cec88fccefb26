"""What ended training by ``trainer.should_stop``, as checkpoints remember it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from types import CodeType, FunctionType
from typing import Any

import lightning as L

from nclightning.callbacks.optimality import OptimalityMonitor
from nclightning.compat.progress import epochs_done
from nclightning.compat.twins import is_callback

__all__ = ["Stops", "may_end", "standing_stop"]

_EARLY_STOPPING = (
    *("monitor", "mode", "min_delta", "patience"),
    *("check_finite", "stopping_threshold", "divergence_threshold"),
)
_NOT_OF_OTHERS = ("nclightning.", "lightning.", "pytorch_lightning.")


class Stops:
    """Tells who ended training, and with which settings.

    Args:
        trainer: When all callbacks are set up, and before a checkpoint is loaded.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        self._trainer = trainer
        self._settings = {id(each): _settings(each) for each in _callbacks(trainer)}
        self._patience = {each: each.patience for each in _callbacks(trainer) if is_callback(each, "EarlyStopping")}
        self._earlier: dict[Any, Any] = {}
        self._restored: list[dict[str, Any]] = []

    def begin(self) -> None:
        """Begin to train, with all that a checkpoint has restored."""
        for each, patience in self._patience.items():
            each.patience = patience  # Lightning takes that of the checkpoint, whatever the user gives now.
        self._earlier = {each: _decision(each) for each in self._patience}

    def record(self, pl_module: L.LightningModule) -> dict[str, Any] | None:
        """Return what a checkpoint holds of a decision to stop; None if there is none."""
        trainer = self._trainer
        if not trainer.should_stop:
            return None
        by = [*self._restored]
        for each in _callbacks(trainer):
            if is_callback(each, "EarlyStopping") and _decision(each) != self._earlier.get(each):
                by.append(self._of_early_stopping(each))
            elif is_callback(each, "Timer") and (left := each.time_remaining()) is not None and left <= 0:
                by.append({"kind": "timer", "name": type(each).__name__})
        if not by and not _is_ours(trainer, pl_module):
            by.append(self._of_others(pl_module))
        return {"iteration": trainer.global_step, "by": by} if by else None

    def take_over(self, stop: Mapping[str, Any]) -> None:
        """Keep a decision that was made before the checkpoint from which the run goes on."""
        self._restored = [dict(each) for each in stop["by"]]

    def standing(self, checkpoint: Mapping[str, Any], pl_module: L.LightningModule) -> str | None:
        """Say what :func:`standing_stop` says, by the settings as they were before the checkpoint was loaded."""
        return standing_stop(checkpoint, self._trainer, pl_module, self._settings)

    def _of_early_stopping(self, callback: Any) -> dict[str, Any]:
        settings = _early_stopping(callback) | {"patience": repr(self._patience[callback])}
        waited = callback.wait_count if callback.wait_count >= callback.patience else None
        said = re.sub(r"\s*Signaling Trainer to stop\.?", "", callback.stopping_reason_message or "").strip()
        name = type(callback).__name__
        return {"kind": "early stopping", "name": name, "settings": settings, "waited": waited, "said": said}

    def _of_others(self, pl_module: L.LightningModule) -> dict[str, Any]:
        """Those whose code has the word, or all if none has: a function elsewhere may have set it."""
        candidates = [each for each in (*_callbacks(self._trainer), pl_module) if _is_of_others(each)]
        found = [each for each in candidates if _says_should_stop(each)] or [*candidates, pl_module]
        callbacks = {_name(each): self._unchanged(each) for each in found if each is not pl_module}
        of_module = pl_module in found
        return {
            "kind": "other",
            "names": list(dict.fromkeys(map(_name, found))),
            "callbacks": callbacks,
            "module": _plain_items(pl_module.hparams.items()) if of_module else None,
        }

    def _unchanged(self, callback: L.Callback) -> dict[str, str]:
        """Attributes that the run has left as they were: the settings, and no counters."""
        now = _settings(callback)
        return {name: value for name, value in self._settings[id(callback)].items() if now.get(name) == value}


def standing_stop(
    checkpoint: Mapping[str, Any],
    trainer: L.Trainer,
    pl_module: L.LightningModule,
    settings: Mapping[int, Mapping[str, str]] | None = None,
) -> str | None:
    """Say what ended the training of a checkpoint, if the present settings leave it at that.

    Args:
        checkpoint: Lightning's.
        trainer: Before the fit.
        pl_module: The module.
        settings: Of callbacks, by their id; None takes them as they are.

    Returns:
        A sentence; None if nothing had stopped it, or its settings have changed.
    """
    stop = checkpoint.get("stop")
    if not stop:
        return None
    now = {id(each): _settings(each) for each in _callbacks(trainer)} if settings is None else settings
    for each in stop["by"]:
        said = _STANDS[each["kind"]](each, checkpoint, trainer, pl_module, now)
        if said is not None:
            return f"{said[0]} ended it at iteration {stop['iteration']}{said[1]}. To train on, {said[2]}."
    return None


def may_end(trainer: L.Trainer, checkpoint: Mapping[str, Any]) -> bool:
    """Whether ``min_steps`` and ``min_epochs`` let training end where a checkpoint is.

    Args:
        trainer: With the settings that hold now.
        checkpoint: Lightning's.
    """
    steps: int = checkpoint["global_step"]
    return steps >= (trainer.min_steps or 0) and bool(epochs_done(checkpoint) >= (trainer.min_epochs or 0))


def _early_stopping_stands(
    stop: Mapping[str, Any], checkpoint: Any, trainer: L.Trainer, pl_module: Any, now: Any
) -> tuple[str, str, str] | None:
    wanted = stop["settings"]
    for each in _callbacks(trainer):
        if not is_callback(each, "EarlyStopping"):
            continue
        found = {name: value for name, value in now[id(each)].items() if name in _EARLY_STOPPING}
        different = {name for name in wanted if found.get(name) != wanted[name]}
        # Less patience would have stopped it, too.
        shorter = different == {"patience"} and stop["waited"] is not None
        if not different or (shorter and int(found["patience"]) <= stop["waited"]):
            said = f": {stop['said'].rstrip('.')}" if stop["said"] else ""
            name = f"{stop['name']}(monitor={wanted['monitor']})"
            return name, said, f"change the settings of {stop['name']} or leave it out"
    return None


def _timer_stands(
    stop: Mapping[str, Any], checkpoint: Mapping[str, Any], trainer: L.Trainer, pl_module: Any, now: Any
) -> tuple[str, str, str] | None:
    for each in _callbacks(trainer):
        remaining = each.time_remaining() if is_callback(each, "Timer") else None
        if not is_callback(each, "Timer") or remaining is None:
            continue
        duration = remaining + each.time_elapsed()
        elapsed = checkpoint["callbacks"].get(each.state_key, {}).get("time_elapsed", {}).get("train", 0)
        if elapsed >= duration:
            return stop["name"], f", after the {timedelta(seconds=duration)} that it was given", "give it more time"
    return None


def _other_stands(
    stop: Mapping[str, Any], checkpoint: Any, trainer: L.Trainer, pl_module: L.LightningModule, now: Any
) -> tuple[str, str, str] | None:
    present = {_name(each): now[id(each)] for each in _callbacks(trainer)}
    for name, wanted in stop["callbacks"].items():
        found = present.get(name)
        if found is None or any(found.get(key) != value for key, value in wanted.items()):
            return None
    if stop["module"] is not None and _plain_items(pl_module.hparams.items()) != stop["module"]:
        return None
    said = " or ".join(stop["names"])
    return f"trainer.should_stop, set by {said},", "", f"change the settings of {said} or leave it out"


_STANDS = {"early stopping": _early_stopping_stands, "timer": _timer_stands, "other": _other_stands}


def _callbacks(trainer: L.Trainer) -> Sequence[Any]:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def _is_of_others(each: object) -> bool:
    """Whether a class is neither Lightning's nor ours."""
    return not type(each).__module__.startswith(_NOT_OF_OTHERS)


def _says_should_stop(each: object) -> bool:
    classes = [cls for cls in type(each).__mro__ if not cls.__module__.startswith(_NOT_OF_OTHERS)]
    codes = [value.__code__ for cls in classes for value in vars(cls).values() if isinstance(value, FunctionType)]
    while codes:
        code = codes.pop()
        if "should_stop" in (*code.co_names, *code.co_consts):  # An attribute, or a text for setattr.
            return True
        codes += [const for const in code.co_consts if isinstance(const, CodeType)]
    return False


def _name(each: object) -> str:
    return type(each).__qualname__.rpartition("<locals>.")[2]


def _is_ours(trainer: L.Trainer, pl_module: L.LightningModule) -> bool:
    """Whether a decision of ours ends training, which has a record of its own."""
    stopped = [each.state().get("stopped_at") for each in _callbacks(trainer) if isinstance(each, OptimalityMonitor)]
    return getattr(pl_module, "failure", None) is not None or any(each is not None for each in stopped)


def _decision(callback: Any) -> tuple[Any, ...]:
    return callback.stopped_epoch, callback.stopping_reason, callback.stopping_reason_message


def _early_stopping(callback: Any) -> dict[str, str]:
    return {name: repr(getattr(callback, name)) for name in _EARLY_STOPPING}


def _settings(callback: L.Callback) -> dict[str, str]:
    return _plain_items(vars(callback).items())


def _plain_items(items: Iterable[tuple[Any, Any]]) -> dict[str, str]:
    """Those of numbers and text, in a form that is the same anew."""
    return {str(name): repr(value) for name, value in items if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, (*value, *value.values())))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
