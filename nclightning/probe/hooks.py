"""Hooks that stay with the module they were made for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from nclightning.probe.nesting import measurements

__all__ = ["hook_call", "hook_result"]


class _Hook:
    """Calls a function for one module; a copy of the module, made or saved while it is hooked, has a hook of nothing.

    ``copy.deepcopy`` and ``torch.save`` take the hooks of a module along. A hook made outside of measurements is not
    for the forwards of one, which may be another monitor's, and one made inside is for those alone.
    """

    def __init__(self, layer: nn.Module | None = None, function: Callable[..., None] | None = None) -> None:
        self._layer, self._function, self._measurements = layer, function, measurements()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, ()

    def __call__(self, layer: nn.Module, *args: Any) -> None:
        if self._function is not None and layer is self._layer and measurements() == self._measurements:
            self._function(*args)


def hook_call(layer: nn.Module, function: Callable[..., None]) -> RemovableHandle:
    """Tell a function the arguments of each call of a layer, by place and by keyword, before it runs."""
    return layer.register_forward_pre_hook(_Hook(layer, function), with_kwargs=True)


def hook_result(layer: nn.Module, function: Callable[..., None]) -> RemovableHandle:
    """Tell a function the arguments by place and the output of each call of a layer."""
    return layer.register_forward_hook(_Hook(layer, function))
