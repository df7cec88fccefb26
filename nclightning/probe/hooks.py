"""Forward hooks that copies of a module do not call, and that ignore each other's measurements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from nclightning.probe.nesting import measurements

__all__ = ["hook_call", "hook_result"]


class _Hook:
    """A hook that calls a function for one module.

    ``copy.deepcopy`` and ``torch.save`` copy the hooks of a module. The copy of this hook does nothing. A hook that was
    made outside of measurements does not fire in the forwards of a measurement, which may be another monitor's. A hook
    that was made within a measurement fires in the forwards of this one only.
    """

    def __init__(self, layer: nn.Module | None = None, function: Callable[..., None] | None = None) -> None:
        self._layer, self._function, self._measurements = layer, function, measurements()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, ()

    def __call__(self, layer: nn.Module, *args: Any) -> None:
        if self._function is not None and layer is self._layer and measurements() == self._measurements:
            self._function(*args)


def hook_call(layer: nn.Module, function: Callable[..., None]) -> RemovableHandle:
    """Call a function before each call of a layer, with its positional and keyword arguments."""
    return layer.register_forward_pre_hook(_Hook(layer, function), with_kwargs=True)


def hook_result(layer: nn.Module, function: Callable[..., None]) -> RemovableHandle:
    """Call a function after each call of a layer, with its positional arguments and its output."""
    return layer.register_forward_hook(_Hook(layer, function))
