"""Checks of the model, the data and the layer names that a user passes, before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from nclightning.compat.accelerate import origin_of
from nclightning.compat.fabric import loader_of_fabric, precision_of_fabric
from nclightning.compat.torch import COMPILED_PREFIX, uncompiled
from nclightning.errors import UserError, UserTypeError
from nclightning.probe.features import describe
from nclightning.ranks import rank_zero_warn

__all__ = ["check_samples", "checked_model", "names_of", "plain_name", "readable", "unwrapped"]

_WRAPPED = ("module.", COMPILED_PREFIX)


class Unwrapped(NamedTuple):
    """A model without its wrappers.

    Attributes:
        module: The model inside the wrappers. A single layer, such as a linear probe, is put into a ``Sequential``,
            because the head is searched among submodules.
        is_compiled: Whether ``torch.compile`` was one of the wrappers.
        precision: Fabric's precision, if Fabric was one of the wrappers.
    """

    module: nn.Module
    is_compiled: bool
    precision: Any


def unwrapped(model: nn.Module, head: Any = None) -> Unwrapped:
    """Remove the wrappers that a model has for training.

    The forward of the model inside is the same. The wrappers are in the way: ``DistributedDataParallel`` makes all
    processes wait for each other in each forward, ``DataParallel`` runs copies without hooks, and compiled graphs do
    not call hooks either.

    Args:
        model: Any model.
        head: The head that the user named.
    """
    is_compiled, precision = False, None
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif (inner := uncompiled(model)) is not None:
            model, is_compiled = inner, True
        elif (of_fabric := precision_of_fabric(model)) is not None:
            model, precision = model.module, of_fabric  # type: ignore[assignment]
        else:
            break
    alone = next(model.children(), None) is None and (head is None or head is model)
    return Unwrapped(nn.Sequential(model) if alone else model, is_compiled, precision)


def plain_name(name: Any, model: nn.Module) -> Any:
    """Remove the prefixes of wrappers from the name of a submodule.

    Args:
        name: The name as the user typed it. Anything but a name is returned as it is.
        model: The model without its wrappers.
    """
    plain = name
    while isinstance(plain, str) and (prefix := next((each for each in _WRAPPED if plain.startswith(each)), "")):
        plain = plain.removeprefix(prefix)
        if plain in (parts := dict(model.named_modules())) and name not in parts:
            return plain
    return name


def checked_model(model: Any, device: torch.device | str | None) -> nn.Module:
    """Return a model if it can be measured on its device.

    Args:
        model: The model as the user passed it.
        device: Device for the batches; None for that of the model.

    Raises:
        TypeError: If it is not a module.
        ValueError: If it is on another device, or has no weights yet.
    """
    if not isinstance(model, nn.Module):
        if isinstance(model, Tensor | np.ndarray):
            raise UserTypeError(
                f"model must be a torch.nn.Module, got {describe(model)}: pass features by name, as "
                "measure(features=..., labels=..., weight=...)."
            )
        raise UserTypeError(
            f"model must be a torch.nn.Module, got a {type(model).__name__}: pass measure(model, data), or "
            "measure(features=..., labels=...)."
        )
    if any(type(child).__name__ == "FullyShardedDataParallel" for child in model.modules()):
        raise UserError(
            "FullyShardedDataParallel shards the weights, so that no process can read the head: shard with "
            "torch.distributed.fsdp.fully_shard, or load a checkpoint into the plain model."
        )
    first = next(chain(model.parameters(), model.buffers()), None)
    if first is not None and first.is_meta:
        raise UserError(
            f"{type(model).__name__} is on the device 'meta', where weights have no values: load them first."
        )
    if device is None or first is None:
        return model
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"device must be one of torch's, such as 'cpu' or 'cuda:0', got {device!r}.") from error
    if wanted.type != first.device.type or wanted.index not in (None, first.device.index):
        raise UserError(
            f"{type(model).__name__} is on {str(first.device)!r}, and measure does not move it: pass "
            f"model.to({str(wanted)!r}), or leave device out."
        )
    return model


def names_of(layers: Any) -> tuple[str, ...]:
    """Return names of layers as a tuple.

    Raises:
        TypeError: If they are not a sequence of names.
        ValueError: If a name occurs twice, or is empty.
    """
    if isinstance(layers, str):
        raise UserTypeError(f"layers must be a sequence of names: write ({layers!r},).")
    names = tuple(layers)
    if unnamed := [each for each in names if not isinstance(each, str)]:
        raise UserTypeError(
            f"layers must be dotted names, got a {type(unnamed[0]).__name__}: see model.named_modules()."
        )
    if len(set(names)) < len(names) or "" in names:
        raise UserError(f"layers must be different names of parts of the model, got {list(names)}.")
    return names


def readable(data: Any, once_more: Sequence[str] = ()) -> Iterable[Any]:
    """Return data as an iterable of batches that an evaluation pass can read.

    Args:
        data: The data as the user passed them.
        once_more: Names of options that need a second pass over the data.

    Raises:
        TypeError: If they are not an iterable of batches.
        ValueError: If they can be read only once, and a second pass is needed.
    """
    data = loader_of_fabric(data)
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise UserTypeError(
            f"data must be an iterable of batches, got the data set {type(data).__name__}: pass "
            "torch.utils.data.DataLoader(data, batch_size=256)."
        )
    if isinstance(data, Tensor | np.ndarray | str | bytes) or not hasattr(data, "__iter__"):
        raise UserTypeError(
            f"data must be an iterable of batches, such as a DataLoader or [(x, y)], got {describe(data)}."
        )
    if isinstance(data, Mapping) or _is_pair(data):
        raise UserTypeError(
            f"data must be an iterable of batches, got what seems to be one batch, {describe(data)}: pass [batch]."
        )
    if isinstance(data, Iterator):
        if once_more:
            raise UserError(
                f"{', '.join(once_more)} need a second pass over data, and a {type(data).__name__} can be read once: "
                "pass a DataLoader, a list, or another iterable that starts again."
            )
        return _PlainIterable(data)
    inner = origin_of(data).loader
    if isinstance(inner, DataLoader) and type(inner).__iter__ is not DataLoader.__iter__:
        return _PlainIterable(data)  # Its data set need not contain what it yields.
    batches: Iterable[Any] = data
    return batches


def _is_pair(data: Any) -> bool:
    """Return whether data are a pair of inputs and labels. A list of two batches has no tensor in the second place."""
    return isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[1], Tensor)


class _PlainIterable:
    """Hides the type of an iterable, so that it is iterated over and not replaced by another loader."""

    def __init__(self, data: Iterable[Any]) -> None:
        self._data = data

    def __iter__(self) -> Iterator[Any]:
        return iter(self._data)


def check_samples(counts: Tensor, means: Tensor, head: str, name: str = "") -> None:
    """Raise if data have fewer than two classes, and warn if features are not finite. Transfers to the host.

    Args:
        counts: Number of samples of each class.
        means: Class means.
        head: Name of the head.
        name: Name of the data set, if there are several.

    Raises:
        ValueError: If there are fewer than two classes.
    """
    present, finite = torch.stack([(counts > 0).sum(), means.isfinite().all()]).tolist()
    which = f"the data set {name!r}" if name else "data"
    if present < 2:
        raise UserError(
            f"neural collapse compares classes, and the labels of {which} have {['none', 'only one'][present]}: pass "
            "samples of two classes at least, or another ignore_index if that leaves them out."
        )
    if not finite:
        rank_zero_warn(
            f"features of {which} at the head {head!r} have numbers that are not finite, so that their measures are "
            "nan: measure weights from before training diverged, or inputs without nan."
        )
