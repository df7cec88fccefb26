"""Which arguments of monitors do something in the fit of a full-batch module."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import lightning as L

from nclightning.callbacks.full_batch import full_batch
from nclightning.errors import UserError

__all__ = ["check_used"]

# Arguments by which monitors read other modules, and no full-batch run.
_OF_OTHERS = {
    "NeuralCollapseMonitor": ("every_n_epochs", "every_n_steps", "source", "pictures_every_n_epochs", "datasets"),
    "RegressionCollapseMonitor": ("every_n_epochs", "head", "batch_fn", "forward_fn"),
    "OptimalityMonitor": ("loss", "lambda_w", "lambda_h", "every_n_epochs", "head", "batch_fn", "forward_fn"),
}
# Those by which a validation or test reads full-batch modules, too.
_OF_PASSES = {
    "NeuralCollapseMonitor": (
        "head",
        "layers",
        "layer_pooling",
        "batch_fn",
        "forward_fn",
        "ood",
        "ignore_index",
        "on_error",
    )
}


def check_used(
    monitor: type, given: Mapping[str, Any], pl_module: L.LightningModule, validates: bool, prefix: str = ""
) -> None:
    """Raise if a monitor is given an argument that does nothing in the fit of a full-batch module.

    Args:
        monitor: Class of the monitor, or of one made from it.
        given: Its arguments by name; those at their defaults are not meant.
        pl_module: The module; others are let be.
        validates: Whether the fit has validation loaders.
        prefix: What comes before the names of arguments where the user types them.

    Raises:
        ValueError: Naming the first one.
    """
    if not full_batch(pl_module):
        return
    for base in monitor.__mro__:
        names = (*_OF_OTHERS.get(base.__name__, ()), *(() if validates else _OF_PASSES.get(base.__name__, ())))
        defaults = inspect.signature(base.__init__).parameters if names else {}  # type: ignore[misc]
        for name in names:
            if name in given and _differs(given[name], defaults[name].default):
                raise UserError(
                    f"{prefix}{name} does nothing in a fit of {type(pl_module).__name__}, which runs full-batch "
                    f"iterations and is read at iterates: leave it out, got {given[name]!r}."
                )
    if "train" not in (given.get("stages") or ("train",)):
        raise UserError(
            f"{prefix}stages={list(given['stages'])} leaves out 'train', and a fit of {type(pl_module).__name__} reads "
            "its training set at iterates: add it, or leave the monitor out."
        )


def _differs(value: Any, default: Any) -> bool:
    if isinstance(default, tuple) or default is None:
        value, default = value or None, default or None
    return bool(value != default)
