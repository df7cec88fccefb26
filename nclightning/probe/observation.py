"""What one run of a model shows."""

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
    """What went into a layer and came out in one call of it.

    Attributes:
        layer: The layer.
        inputs: As it came, whatever the layer or others wrote to it later.
        output: As it went, the same.
        came: The tensor itself, which the model may have written to.
        went: The same.
    """

    layer: nn.Module
    inputs: Tensor
    output: Tensor
    came: Tensor
    went: Tensor


class Observation(NamedTuple):
    """One run of a model.

    Attributes:
        output: What the model returned.
        leaves: The floating tensors in it, by where they are.
        runs: Of its layers, in order, those that took and returned a floating tensor.
        calls: Modules as they began to run, the model included, with the first tensor that they got, itself and as it
            was.
        whole: Whether the output is that of the model's forward.
        with_labels: Layers whose ``forward`` takes ``labels``, with their arguments.
    """

    output: Any
    leaves: dict[str, Tensor]
    runs: list[Run]
    calls: list[tuple[nn.Module, Tensor, Tensor]]
    whole: bool
    with_labels: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]

    def of(self, layer: nn.Module) -> list[Run]:
        """Return the runs of a layer."""
        return [run for run in self.runs if run.layer is layer]


def observe(
    module: nn.Module, call: Callable[[], Any], replace: Mapping[nn.Module, Callable[[Tensor], Tensor]] | None = None
) -> Observation:
    """Run a model without a trace and note what went through its layers.

    Args:
        module: The model.
        call: Runs it.
        replace: Changes the outputs of layers on the way.

    Returns:
        What was seen. Values are those at the time, also where the model writes to the same memory later.
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
    """Do as :func:`observe` does with some layers of a model that is frozen already.

    To copy all activations would need as much memory again: the model runs a second time for copies of those that it
    writes to, unless it may run only ``once``.
    """
    watched = [child for child in layers if not isinstance(child, torch.jit.ScriptModule)]  # They take no hooks.
    recorder = _Recorder(module, watched, replace or {}, None if once else frozenset())
    seen, written = recorder.run(call)
    return _Recorder(module, watched, replace or {}, written).run(call)[0] if written else seen


class _Recorder:
    """Hooks of one run.

    Args:
        module: The model.
        watched: Those to hook.
        replace: As for :func:`observe`.
        copied: Numbers of the tensors, in the order in which they are met, of which copies are needed; None of all.
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
        """Run the model; return what was seen, and the numbers of tensors that it wrote to."""
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
        if tensor is None:
            return None
        number, version = len(self._met), version_of(tensor)
        self._met.append((tensor, version))
        return tensor.clone() if version < 0 or self._copied is None or number in self._copied else tensor

    def _before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        came = first_argument(args, kwargs)
        value = self._value(came)
        self._open.setdefault(layer, []).append((came, value))
        if came is not None and value is not None:
            self._calls.append((layer, came, value))

    def _after(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        changed = None
        if layer in self._replace and isinstance(output, Tensor):
            output = changed = self._replace[layer](output)
        came, inputs = self._open[layer].pop()
        if layer is self._module:
            self._returned = output
            return changed
        went = first_tensor(output)
        value = self._value(went)
        if came is not None and went is not None and came.is_floating_point() and went.is_floating_point():
            assert inputs is not None
            assert value is not None
            self._runs.append(Run(layer, inputs, value, came, went))
        if self._copied is not None and _takes_labels(layer):  # To ask takes longer than a small layer.
            self._with_labels.append((layer, args, kwargs))
        return changed


def _takes_labels(layer: nn.Module) -> bool:
    try:
        return "labels" in inspect.signature(layer.forward).parameters
    except (TypeError, ValueError):  # As of scripted modules.
        return False


def float_leaves(output: Any, name: str = "", depth: int = 6) -> Iterator[tuple[str, Tensor]]:
    """Yield the floating tensors in a tensor, sequence, mapping, dataclass or plain object, by where they are."""
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
