"""The pair that every reading is about: a linear head, and the features that enter it."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset

__all__ = ["capture_features", "detect_head", "find_head", "frozen", "sequential_loader", "split_batch"]

_HEAD_NAMES = ("head", "fc", "classifier", "score", "heads", "lm_head")
_LABEL_KEYS = ("labels", "label", "y", "target", "targets")


def find_head(module: nn.Module, name: str | None = None) -> nn.Linear:
    """Find the linear head of a model by name.

    Args:
        module: Any module.
        name: Dotted name of the head. None takes the only ``nn.Linear`` there is, or the one that is called as heads
            commonly are: the outermost called ``head``, ``fc``, ``classifier``, ``score``, ``heads`` or ``lm_head``.

    Returns:
        The head.

    Raises:
        ValueError: If there is no such ``nn.Linear``, or several by the same common name; the message lists those
            that exist.
    """
    linear = {path: child for path, child in module.named_modules() if isinstance(child, nn.Linear)}
    if name is not None:
        if name in linear:
            return linear[name]
        raise ValueError(f"no nn.Linear named {name!r} in {type(module).__name__}; {_list(linear)}")
    if len(linear) == 1:
        return next(iter(linear.values()))
    ranked = sorted(
        (path.count("."), _HEAD_NAMES.index(called), path)
        for path in linear
        if (called := path.rpartition(".")[2]) in _HEAD_NAMES
    )
    if ranked and (len(ranked) == 1 or ranked[0][:2] != ranked[1][:2]):
        return linear[ranked[0][2]]
    raise ValueError(f"cannot tell which layer of {type(module).__name__} is the head; {_list(linear)}")


def detect_head(module: nn.Module, inputs: Any) -> nn.Linear:
    """Find the head by running the model: the ``nn.Linear`` whose output is the model's output.

    Registration order does not matter, so that auxiliary heads do not mislead. Where the output is changed after the
    head, the names of :func:`find_head` decide.

    Args:
        module: Run once, as it is.
        inputs: As for :func:`capture_features`.

    Returns:
        The head.

    Raises:
        ValueError: As :func:`find_head`.
    """
    outputs: list[tuple[nn.Linear, Tensor]] = []
    handles = [
        child.register_forward_hook(lambda layer, _, output: outputs.append((layer, output)))
        for child in module.modules()
        if isinstance(child, nn.Linear)
    ]
    try:
        result = _call(module, inputs)
    finally:
        for handle in handles:
            handle.remove()
    logits = getattr(result, "logits", result)
    for layer, output in reversed(outputs):
        if output is logits:
            return layer
    return find_head(module)


def capture_features(module: nn.Module, head: nn.Linear, inputs: Any) -> Tensor:
    """Run a module and return what entered its head, with its graph if gradients are enabled.

    Args:
        module: Called once: with ``inputs``, or by keyword if that is a mapping whose names its ``forward`` has.
        head: A part of ``module``; its own hooks fire as usual.
        inputs: Model input.

    Returns:
        Features ``(N, d)``.

    Raises:
        ValueError: If the head was not called exactly once, or not with a matrix.
    """
    captured: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, args: captured.append(args[0]))
    try:
        _call(module, inputs)
    finally:
        handle.remove()
    if len(captured) != 1:
        raise ValueError(
            f"the head of {type(module).__name__} ran {len(captured)} times in one forward, expected once."
        )
    if captured[0].ndim != 2:
        raise ValueError(
            f"the head of {type(module).__name__} must get one feature row per sample, got shape "
            f"{tuple(captured[0].shape)}."
        )
    return captured[0]


def split_batch(batch: Any) -> tuple[Any, Tensor]:
    """Split a batch into model input and labels.

    Args:
        batch: A pair ``(x, y)``, or a mapping with the labels under ``labels``, ``label``, ``y``, ``target`` or
            ``targets``; the rest of a mapping is the input.

    Returns:
        Input and labels.

    Raises:
        ValueError: If the batch has another form.
    """
    if isinstance(batch, Mapping):
        for key in _LABEL_KEYS:
            if key in batch:
                rest = {name: value for name, value in batch.items() if name != key}
                return rest, batch[key]
        raise ValueError(f"a batch with keys {sorted(batch)} has no labels: expected one of {', '.join(_LABEL_KEYS)}.")
    if isinstance(batch, Sequence) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return batch[0], batch[1]
    raise ValueError(f"expected batches (x, y) or mappings with labels, got {type(batch).__name__}.")


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Look at a module without a trace: eval mode, no gradients, and all random states put back afterwards.

    Args:
        module: Its training flags are restored one by one, so that parts that were frozen stay so.
    """
    modes = [(child, child.training) for child in module.modules()]
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global state is what is protected
    devices = sorted(
        {p.device.index for p in module.parameters() if p.device.type == "cuda" and p.device.index is not None}
    )
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            module.eval()
            yield
    finally:
        for child, training in modes:
            child.training = training
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002


def sequential_loader(loader: Iterable[Any], rank: int = 0, world_size: int = 1) -> Iterable[Any]:
    """Make a loader over the same samples in order, each exactly once over all ranks.

    Shuffling, dropped last batches and the duplicates that a distributed sampler pads with would make a reading
    depend on the epoch, leave samples out or count some twice.

    Args:
        loader: A ``DataLoader`` over a map-style dataset; anything else is returned as it is.
        rank: Of this process.
        world_size: Number of processes.

    Returns:
        The loader.

    Raises:
        ValueError: If samples cannot be shared out over several processes.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        if world_size > 1:
            raise ValueError(
                f"a {type(loader).__name__} without a map-style dataset cannot be shared out over {world_size} "
                "processes without counting samples twice."
            )
        return loader
    dataset = loader.dataset
    if world_size > 1:
        dataset = Subset(dataset, range(rank, len(dataset), world_size))  # type: ignore[arg-type]
    batch_size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 1
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=False,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        generator=torch.Generator(),
    )


def _call(module: nn.Module, inputs: Any) -> Any:
    if not isinstance(inputs, Mapping):
        return module(inputs)
    accepted = inspect.signature(module.forward).parameters
    by_keyword = all(name in accepted for name in inputs) or any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    return module(**inputs) if by_keyword or len(inputs) != 1 else module(*inputs.values())


def _list(linear: Mapping[str, nn.Linear]) -> str:
    existing = ", ".join(repr(path) for path in linear) or "none"
    return f"linear layers are: {existing}. Pass head='name of the last layer'."
