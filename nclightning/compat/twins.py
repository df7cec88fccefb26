"""Lightning under its two package names.

``lightning.pytorch`` and ``pytorch_lightning`` have the same code, but separate classes. Modules and trainers of both
can be monitored. The functions here test classes of either package.
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
# Modules of Lightning's callbacks that change neither model nor data.
_LOOKING = ("callback", "early_stopping", "progress", "timer")


def _classes(module: str, name: str) -> tuple[type, ...]:
    """Return a class of each imported package. A package that is not imported has no instances."""
    loaded = (package for package in _PACKAGES if package in sys.modules)
    return tuple(getattr(import_module(f"{package}.{module}"), name) for package in loaded)


def is_of_twin(thing: Any) -> bool:
    """Return whether an object, such as a trainer, comes from ``pytorch_lightning``.

    Args:
        thing: The object. Its class may be a subclass.
    """
    return any(base.__module__.partition(".")[0] == _TWIN for base in type(thing).__mro__)


def lightning_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Yield all LightningModules among a module and its submodules.

    Args:
        module: Any module.
    """
    kinds = _classes("core", "LightningModule")
    return (child for child in module.modules() if isinstance(child, kinds))


def is_callback(callback: Any, name: str) -> bool:
    """Return whether a callback is an instance of one of Lightning's classes.

    Args:
        callback: The callback.
        name: Name of the class in ``lightning.pytorch.callbacks``.
    """
    return isinstance(callback, _classes("callbacks", name))


def is_strategy(strategy: Any, *names: str) -> bool:
    """Return whether a strategy is an instance of one of several classes of Lightning.

    Args:
        strategy: The strategy.
        *names: Names of classes in ``lightning.pytorch.strategies``.
    """
    return any(isinstance(strategy, _classes("strategies", name)) for name in names)


def is_torch_checkpoint_io(plugin: Any) -> bool:
    """Return whether checkpoints are written and read by Lightning's ``TorchCheckpointIO`` itself, not a subclass.

    Args:
        plugin: ``trainer.strategy.checkpoint_io``.
    """
    return type(plugin) in _classes("plugins.io", "TorchCheckpointIO")


def is_refusal(error: BaseException) -> bool:
    """Return whether an error is Lightning's ``MisconfigurationException``, about options of the user.

    Non-public: ``lightning.pytorch.utilities.exceptions`` (lightning 2.6). Without it the command line would show such
    an error as a bug of the program, with a traceback.

    Args:
        error: Any error.
    """
    return isinstance(error, _classes("utilities.exceptions", "MisconfigurationException"))


def is_termination(error: BaseException) -> bool:
    """Return whether an error is the one by which Lightning ends a fit after SIGTERM.

    Non-public: ``lightning.pytorch.utilities.exceptions`` (lightning 2.6). Without it a run that a scheduler ends would
    be saved only on a single process, and would end with the status of success.

    Args:
        error: Any error.
    """
    return isinstance(error, _classes("utilities.exceptions", "SIGTERMException"))


def termination(trainer: Any) -> BaseException:
    """Return the exception by which a trainer ends a fit after SIGTERM.

    Non-public: ``lightning.pytorch.utilities.exceptions`` (lightning 2.6). Without it the other processes would end
    with an error.

    Args:
        trainer: The trainer. It accepts only the exception of its own package.
    """
    kinds = _classes("utilities.exceptions", "SIGTERMException")
    made: BaseException = kinds[-1 if is_of_twin(trainer) else 0]()
    return made


def only_looks(callback: Any, hook: str) -> bool:
    """Return whether a hook of a callback is defined in this package, or in one of Lightning's that change nothing.

    Args:
        callback: The callback. The hook may be an attribute of the object.
        hook: Name of the hook.
    """
    function = getattr(callback, hook)
    module = getattr(getattr(function, "__func__", function), "__module__", None) or ""
    if module.partition(".")[0] == __name__.partition(".")[0]:
        return True
    return any(module.startswith(f"{package}.callbacks.{name}") for package in _PACKAGES for name in _LOOKING)


def run_last(trainer: Any, callback: Any) -> None:
    """Move a checkpoint callback behind all others, as a trainer does for those of its own package.

    Non-public: that ``Trainer.callbacks`` can be set in the hook ``setup`` (lightning 2.6). Without it a checkpoint
    would not include what other callbacks measure at its step.

    Args:
        trainer: The trainer.
        callback: One of its callbacks.
    """
    if is_of_twin(trainer):
        trainer.callbacks = [*(each for each in trainer.callbacks if each is not callback), callback]


@contextmanager
def logging_nothing(trainer: Any, pl_module: nn.Module) -> Iterator[None]:
    """Turn off ``log`` and ``log_dict`` of a module, and the loggers of its trainer, within the block.

    Non-public: that ``Trainer.loggers`` can be set to any loggers (lightning 2.6). Without it an evaluation pass would
    add to the values that the user logs.

    Args:
        trainer: The trainer.
        pl_module: The module. The LightningModules in it are included.
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
    """Do nothing, in place of ``LightningModule.log``."""
