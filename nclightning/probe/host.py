"""The interface between measurement and the program that runs the model."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nclightning.probe.sweep import eager, frozen
from nclightning.ranks import rank, world_size

__all__ = ["Host", "PlainHost", "moved"]


class Host(Protocol):
    """A model in the program that runs it: a Lightning trainer, another trainer, or the user's own loop."""

    @property
    def module(self) -> nn.Module:
        """The model."""

    @property
    def device(self) -> torch.device:
        """Device of the batches, and for communication between processes."""

    @property
    def rank(self) -> int:
        """Number of this process."""

    @property
    def world_size(self) -> int:
        """Number of processes that share the data."""

    def unseen(self) -> AbstractContextManager[None]:
        """Return a context in which the model is frozen, not compiled, and logs nothing."""

    def precision(self) -> AbstractContextManager[Any]:
        """Return a context in which forwards have the precision of the user's steps."""

    def on_device(self, batch: Any) -> Any:
        """Convert a batch of a loader to the form in which the user's steps get it."""


class PlainHost:
    """A model without a trainer.

    Args:
        module: The model.
        device: Device of the batches. None is that of the first parameter or buffer, or the CPU if there is none.
        precision: Precision of Fabric, with ``convert_input`` and ``forward_context``. None keeps the precision that
            surrounds the call, such as the user's ``torch.autocast``.
    """

    def __init__(
        self, module: nn.Module, device: torch.device | str | None = None, precision: Any | None = None
    ) -> None:
        self.module, self.rank, self.world_size, self._precision = module, rank(), world_size(), precision
        first = next(chain(module.parameters(), module.buffers()), None)
        own = torch.device("cpu") if first is None else first.device
        self.device = own if device is None else torch.device(device)

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Freeze the model, and turn compilation off."""
        with frozen(self.module), eager():
            yield

    def precision(self) -> AbstractContextManager[Any]:
        """Return a context in which forwards have the precision of the user's steps."""
        context: AbstractContextManager[Any] = (
            nullcontext() if self._precision is None else self._precision.forward_context()
        )
        return context

    def on_device(self, batch: Any) -> Any:
        """Move the tensors in a batch, and convert them to the dtype of the user's steps."""
        return self.converted(moved(batch, self.device))

    def converted(self, batch: Any) -> Any:
        """Convert inputs to the dtype of the user's steps."""
        return batch if self._precision is None else self._precision.convert_input(batch)


def moved(batch: Any, device: torch.device) -> Any:
    """Move the tensors in a batch to a device.

    Args:
        batch: A tensor, an object with a method ``to``, or nested sequences and mappings of these. Anything else stays
            as it is.
        device: The device.

    Returns:
        The moved batch; the batch itself if all of it is already there.
    """
    # The class is asked, because an instance whose attributes are its keys would look for a key "to".
    if isinstance(batch, Tensor) or callable(getattr(type(batch), "to", None)):
        return batch.to(device)
    if isinstance(batch, Mapping):
        keys, parts = list(batch), list(batch.values())
    elif isinstance(batch, list | tuple):
        keys, parts = list(range(len(batch))), list(batch)
    else:
        return batch
    there = [moved(each, device) for each in parts]
    if all(map(operator.is_, there, parts)):
        return batch
    return _with_items(batch, keys, there)


def _with_items(batch: Any, keys: list[Any], items: list[Any]) -> Any:
    """Return a container of the same class with other items; a plain one if the class does not allow it."""
    try:
        if isinstance(batch, tuple):
            return getattr(type(batch), "_make", type(batch))(items)
        return _filled(batch, keys, items)
    except Exception:  # The class may raise anything.
        if isinstance(batch, Mapping):
            return dict(zip(keys, items, strict=True))
        return tuple(items) if isinstance(batch, tuple) else items


def _filled(batch: Any, keys: list[Any], items: list[Any]) -> Any:
    """Return a copy of a container with other items."""
    try:
        made = copy.copy(batch)
    except KeyError:  # Python 3.10 looks for __getstate__ among the keys of a mapping whose attributes are its keys.
        made = type(batch)(batch)
    for key, item in zip(keys, items, strict=True):
        made[key] = item
    return made
