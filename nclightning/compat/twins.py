"""Lightning under its two package names.

``lightning.pytorch`` and ``pytorch_lightning`` are the same code installed twice, whose classes know nothing of each
other. Modules and trainers of either can be monitored: what is asked of their classes is asked here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "is_callback",
    "is_of_twin",
    "is_refusal",
    "is_strategy",
    "is_termination",
    "is_torch_checkpoint_io",
    "lightning_modules",
    "logging_nothing",
    "only_looks",
    "run_last",
    "termination",
]

_TWIN = "pytorch_lightning"
_PACKAGES = ("lightning.pytorch", _TWIN)
# Where callbacks are defined that do nothing at the end of an epoch of training, or show what they see.
_LOOKING = ("callback", "early_stopping", "progress", "timer")


def _classes(module: str, name: str) -> tuple[type, ...]:
    """Find a class under both package names; what the user has not imported makes no objects."""
    loaded = (package for package in _PACKAGES if package in sys.modules)
    return tuple(getattr(import_module(f"{package}.{module}"), name) for package in loaded)


def is_of_twin(thing: Any) -> bool:
    """Whether something, such as a trainer, is of ``pytorch_lightning``.

    Args:
        thing: Of that class or one made from it.
    """
    return any(base.__module__.partition(".")[0] == _TWIN for base in type(thing).__mro__)


def lightning_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a module and its submodules that are LightningModules, of either package.

    Args:
        module: Any module.
    """
    kinds = _classes("core", "LightningModule")
    return (child for child in module.modules() if isinstance(child, kinds))


def is_callback(callback: Any, name: str) -> bool:
    """Whether a callback is of one of Lightning's classes, of either package.

    Args:
        callback: Of a trainer.
        name: Of the class in ``lightning.pytorch.callbacks``.
    """
    return isinstance(callback, _classes("callbacks", name))


def is_strategy(strategy: Any, *names: str) -> bool:
    """Whether a strategy is of one of Lightning's classes, of either package.

    Args:
        strategy: Of a trainer.
        *names: Of the classes in ``lightning.pytorch.strategies``.
    """
    return any(isinstance(strategy, _classes("strategies", name)) for name in names)


def is_torch_checkpoint_io(plugin: Any) -> bool:
    """Whether a checkpoint is written and read by Lightning's own ``TorchCheckpointIO`` and by no class made from it.

    Args:
        plugin: ``trainer.strategy.checkpoint_io``.
    """
    return type(plugin) in _classes("plugins.io", "TorchCheckpointIO")


def is_refusal(error: BaseException) -> bool:
    """Whether Lightning refuses what the user asks for.

    Non-public: ``lightning.pytorch.utilities.exceptions`` (lightning 2.6). Without it the command line would show such
    a refusal as a fault of the program, with a traceback.

    Args:
        error: Any.
    """
    return isinstance(error, _classes("utilities.exceptions", "MisconfigurationException"))


def is_termination(error: BaseException) -> bool:
    """Whether Lightning ends a fit because the process was asked to by SIGTERM.

    Non-public: ``lightning.pytorch.utilities.exceptions`` (lightning 2.6). Without it a run that a scheduler ends would
    be saved only on a single process, and would end with the status of success.

    Args:
        error: Any.
    """
    return isinstance(error, _classes("utilities.exceptions", "SIGTERMException"))


def termination(trainer: Any) -> BaseException:
    """Make the exception by which a trainer ends a fit on SIGTERM.

    Non-public: ``lightning.pytorch.utilities.exceptions`` (lightning 2.6). Without it the other processes would end
    with an error.

    Args:
        trainer: Of either package, which takes its own exception only.
    """
    kinds = _classes("utilities.exceptions", "SIGTERMException")
    made: BaseException = kinds[-1 if is_of_twin(trainer) else 0]()
    return made


def only_looks(callback: Any, hook: str) -> bool:
    """Whether a hook of a callback is one of this package, or of those of Lightning that change neither model nor data.

    Args:
        callback: Any; the hook may have been set on the object alone.
        hook: Its name.
    """
    function = getattr(callback, hook)
    module = getattr(getattr(function, "__func__", function), "__module__", None) or ""
    if module.partition(".")[0] == __name__.partition(".")[0]:
        return True
    return any(module.startswith(f"{package}.callbacks.{name}") for package in _PACKAGES for name in _LOOKING)


def run_last(trainer: Any, callback: Any) -> None:
    """Let a checkpoint callback run after all others, as a trainer does with those of its own package by itself.

    Non-public: that ``Trainer.callbacks`` can be set in the hook ``setup`` (lightning 2.6). Without it a checkpoint
    would not have what other callbacks measure at its step.

    Args:
        trainer: Of either package.
        callback: In its list.
    """
    if is_of_twin(trainer):
        trainer.callbacks = [*(each for each in trainer.callbacks if each is not callback), callback]


@contextmanager
def logging_nothing(trainer: Any, pl_module: nn.Module) -> Iterator[None]:
    """Let calls of ``log`` and ``log_dict`` of a module and of its trainer's loggers do nothing.

    Non-public: that ``Trainer.loggers`` can be set to any loggers (lightning 2.6). Without it a sweep would add to the
    values that the user logs.

    Args:
        trainer: Of either package.
        pl_module: With the LightningModules in it.
    """
    names = ("log", "log_dict")
    modules = [vars(child) for child in lightning_modules(pl_module)]
    own = [{name: state[name] for name in names if name in state} for state in modules]
    loggers, (nothing, *_) = trainer.loggers, _classes("loggers.logger", "DummyLogger")
    try:
        for state in modules:
            state.update(dict.fromkeys(names, _log_nothing))
        trainer.loggers = [nothing() for _ in loggers]
        yield
    finally:
        trainer.loggers = loggers
        for state, before in zip(modules, own, strict=True):
            for name in names:
                del state[name]
            state.update(before)


def _log_nothing(*_: Any, **__: Any) -> None:
    """Stand in for ``LightningModule.log``."""
