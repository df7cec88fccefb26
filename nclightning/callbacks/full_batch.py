"""Modules that run full-batch iterations, and how monitors read them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
from torch import nn

from nclightning.errors import UserError
from nclightning.heads import HeadReader

__all__ = ["check_used", "full_batch", "full_batch_head", "full_batch_method"]


def full_batch(pl_module: L.LightningModule) -> bool:
    """Whether a module runs our full-batch iterations."""
    return hasattr(pl_module, "iterations_per_step")


def full_batch_method(pl_module: L.LightningModule, name: str) -> Callable[..., Any]:
    """Return a method by which full-batch modules are read.

    Raises:
        ValueError: If there is none.
    """
    method: Callable[..., Any] | None = getattr(pl_module, name, None)
    if method is None:
        raise UserError(
            f"a full-batch module is read by its method {name}, which {type(pl_module).__name__} does not have: derive "
            "it from nclightning.models.RegularizedClassifier."
        )
    return method


def full_batch_head(pl_module: L.LightningModule) -> HeadReader:
    """Return the head of a full-batch module, its attribute ``head``.

    Raises:
        ValueError: If it has none.
    """
    head = getattr(pl_module, "head", None)
    if not isinstance(head, nn.Linear):
        raise UserError(
            f"a full-batch module is read by its attribute head, an nn.Linear; that of {type(pl_module).__name__} is "
            f"{type(head).__name__}: derive it from nclightning.models.RegularizedClassifier."
        )
    return HeadReader(head, "head", "weight", False, head.out_features, head.in_features)


# Arguments by which monitors read other modules, and no full-batch run.
_OF_OTHERS = {
    "NeuralCollapseMonitor": ("every_n_epochs", "every_n_steps", "source", "pictures_every_n_epochs", "datasets"),
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
