"""A recording of one run of a model: inputs and outputs of its layers, and its own output."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nclightning.compat.torch import version_of
from nclightning.probe.features import first_argument, first_tensor
from nclightning.probe.sweep import eager, frozen

__all__ = ["Observation", "Run", "float_leaves", "observe", "record"]


class Run(NamedTuple):
    """Input and output of one call of a layer.

    Attributes:
        layer: The layer.
        inputs: The input with its values at the time of the call.
        output: The output with its values at the time of the call.
        raw_input: The input tensor itself, which the model may have overwritten later.
        raw_output: The output tensor itself, which the model may have overwritten later.
    """

    layer: nn.Module
    inputs: Tensor
    output: Tensor
    raw_input: Tensor
    raw_output: Tensor


class Observation(NamedTuple):
    """One run of a model.

    Attributes:
        output: What the call returned.
        leaves: The floating tensors in the output, by their place in it.
        runs: The calls of layers that took and returned a floating tensor, in order.
        calls: All modules in the order in which they were called, the model included, each with its first input tensor:
            the tensor itself, and its values at the time of the call.
        whole: Whether the call returned the output of the model's forward unchanged.
        with_labels: Layers whose ``forward`` has an argument ``labels``, with the arguments of their call.
    """

    output: Any
    leaves: dict[str, Tensor]
    runs: list[Run]
    calls: list[tuple[nn.Module, Tensor, Tensor]]
    whole: bool
    with_labels: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]

    def of(self, layer: nn.Module) -> list[Run]:
        """Return the calls of a layer."""
        return [run for run in self.runs if run.layer is layer]


def observe(
    module: nn.Module, call: Callable[[], Any], replace: Mapping[nn.Module, Callable[[Tensor], Tensor]] | None = None
) -> Observation:
    """Run a model without a trace, and record inputs and outputs of its layers.

    Args:
        module: The model.
        call: Function that runs the model.
        replace: Functions that change the outputs of layers during the run.

    Returns:
        The recording. Its values are those at the time of each call, also if the model overwrote them later.
    """
    with frozen(module), eager():
        return record(module, module.modules(), call, replace)


def record(
    module: nn.Module,
    layers: Iterable[nn.Module],
    call: Callable[[], Any],
    replace: Mapping[nn.Module, Callable[[Tensor], Tensor]] | None = None,
    once: bool = False,
) -> Observation:
    """Record some layers of a model that is already frozen, as :func:`observe` does.

    Copying all activations would double the memory. Instead the model runs a second time if it overwrote some of them,
    and only these are copied. With ``once``, the model runs a single time and all activations are copied.
    """
    watched = [child for child in layers if not isinstance(child, torch.jit.ScriptModule)]  # These take no hooks.
    recorder = _Recorder(module, watched, replace or {}, None if once else frozenset())
    seen, written = recorder.run(call)
    return _Recorder(module, watched, replace or {}, written).run(call)[0] if written else seen


class _Recorder:
    """The hooks of one recording.

    Args:
        module: The model.
        watched: The layers to record.
        replace: As for :func:`observe`.
        copied: Which tensors to copy, numbered in the order in which they occur; None for all.
    """

    def __init__(
        self,
        module: nn.Module,
        watched: list[nn.Module],
        replace: Mapping[nn.Module, Callable[[Tensor], Tensor]],
        copied: frozenset[int] | None,
    ) -> None:
        self._module, self._watched, self._replace, self._copied = module, watched, replace, copied
        self._met: list[tuple[Tensor, int]] = []
        self._open: dict[nn.Module, list[tuple[Tensor | None, Tensor | None]]] = {}
        self._runs: list[Run] = []
        self._calls: list[tuple[nn.Module, Tensor, Tensor]] = []
        self._with_labels: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []
        self._returned: Any = None

    def run(self, call: Callable[[], Any]) -> tuple[Observation, frozenset[int]]:
        """Run the model. Return the recording, and the numbers of the tensors that were overwritten without a copy."""
        with ExitStack() as stack:
            for child in self._watched:
                stack.callback(child.register_forward_pre_hook(self._before, with_kwargs=True).remove)
                stack.callback(child.register_forward_hook(self._after, with_kwargs=True).remove)
            output = call()
        written = frozenset(i for i, (tensor, version) in enumerate(self._met) if version != version_of(tensor))
        whole, leaves = output is self._returned, dict(float_leaves(output))
        seen = Observation(output, leaves, self._runs, self._calls, whole, self._with_labels)
        return seen, frozenset() if self._copied is None else written - self._copied

    def _value(self, tensor: Tensor | None) -> Tensor | None:
        """Return a tensor, or a copy if it will be overwritten, and record its version."""
        if tensor is None:
            return None
        number, version = len(self._met), version_of(tensor)
        self._met.append((tensor, version))
        return tensor.clone() if version < 0 or self._copied is None or number in self._copied else tensor

    def _before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record the input of a layer, as a hook before its forward."""
        raw_input = first_argument(args, kwargs)
        value = self._value(raw_input)
        self._open.setdefault(layer, []).append((raw_input, value))
        if raw_input is not None and value is not None:
            self._calls.append((layer, raw_input, value))

    def _after(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Record the output of a layer, and replace it if requested, as a hook after its forward."""
        changed = None
        if layer in self._replace and isinstance(output, Tensor):
            output = changed = self._replace[layer](output)
        raw_input, inputs = self._open[layer].pop()
        if layer is self._module:
            self._returned = output
            return changed
        raw_output = first_tensor(output)
        value = self._value(raw_output)
        if (
            raw_input is not None
            and raw_output is not None
            and raw_input.is_floating_point()
            and raw_output.is_floating_point()
        ):
            assert inputs is not None
            assert value is not None
            self._runs.append(Run(layer, inputs, value, raw_input, raw_output))
        if self._copied is not None and _takes_labels(layer):  # The inspection takes longer than a small layer runs.
            self._with_labels.append((layer, args, kwargs))
        return changed


def _takes_labels(layer: nn.Module) -> bool:
    """Return whether the forward of a layer has an argument ``labels``."""
    try:
        return "labels" in inspect.signature(layer.forward).parameters
    except (TypeError, ValueError):  # For example for scripted modules.
        return False


def float_leaves(output: Any, name: str = "", depth: int = 6) -> Iterator[tuple[str, Tensor]]:
    """Yield the floating tensors in a tensor, sequence, mapping, dataclass or plain object, with their place in it."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield name, output
        return
    if depth == 0 or output is None or isinstance(output, str | bytes | nn.Module | type):
        return
    items: Any
    if isinstance(output, Mapping):
        items = output.items()
    elif isinstance(output, Sequence):
        items = zip(getattr(output, "_fields", range(len(output))), output, strict=True)
    else:
        items = getattr(output, "__dict__", {}).items()
    for key, value in items:
        yield from float_leaves(value, f"{name}.{key}" if name else str(key), depth - 1)
