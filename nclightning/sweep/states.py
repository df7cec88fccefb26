"""Random states, and the states of torchmetrics that a model updates while it runs."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

__all__ = ["metrics_kept", "random_states_kept", "registered_metrics_kept"]

# A longer list or dictionary holds data, and not metrics: it is not searched.
_LONGEST_CONTAINER = 10_000


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Put the random states of Python, numpy and torch on the host back afterwards."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global state is what is protected
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002


@contextmanager
def metrics_kept(module: nn.Module) -> Iterator[None]:
    """Put the states of all metrics of a module back afterwards, bit for bit.

    Args:
        module: Its metrics are those among its submodules and attributes, also inside lists, tuples and dictionaries.
    """
    with _kept(_metrics_of(module)):
        yield


@contextmanager
def registered_metrics_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put back the states of the metrics among modules: with so little to search it costs microseconds."""
    with _kept([child for child in modules if isinstance(child, Metric | MetricCollection)]):
        yield


@contextmanager
def _kept(metrics: list[nn.Module]) -> Iterator[None]:
    restorers = [_keep(vars(metric)) for metric in metrics]
    try:
        yield
    finally:
        for restore in restorers:
            restore()


def _metrics_of(module: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []
    seen: set[int] = set()
    waiting: list[Any] = [module]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        if isinstance(value, nn.Module):
            seen.add(id(value))
            if isinstance(value, Metric | MetricCollection):
                found.append(value)
            waiting.extend(vars(value).values())
        elif isinstance(value, dict | list | tuple | set) and len(value) <= _LONGEST_CONTAINER:
            seen.add(id(value))
            waiting.extend(value.values() if isinstance(value, dict) else value)
    return found


def _keep(value: Any) -> Callable[[], Any]:
    """Remember what a value holds; the function returned puts it back into the same object, and returns that."""
    if isinstance(value, Tensor):
        saved = value.detach().clone()

        def restore() -> Any:
            if not torch.equal(value, saved):  # Else untouched, as what autograd still needs must be.
                with torch.inference_mode(value.is_inference()), torch.no_grad():
                    value.copy_(saved)
            return value
    elif isinstance(value, list):
        items = [_keep(item) for item in value]

        def restore() -> Any:
            value[:] = [item() for item in items]
            return value
    elif isinstance(value, dict):
        entries = {key: _keep(item) for key, item in value.items()}

        def restore() -> Any:
            restored = {key: item() for key, item in entries.items()}
            value.clear()
            value.update(restored)
            return value
    else:

        def restore() -> Any:
            return value

    return restore
