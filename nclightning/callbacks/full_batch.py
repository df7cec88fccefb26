"""Modules that run full-batch iterations, and how monitors read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
from torch import nn

from nclightning.errors import UserError
from nclightning.heads import HeadReader

__all__ = ["full_batch", "full_batch_head", "full_batch_method"]


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
