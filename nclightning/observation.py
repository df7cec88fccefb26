"""What one run of a model shows."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from nclightning.features import first_tensor
from nclightning.passes import measurements
from nclightning.sweep import eager, frozen

__all__ = ["Observation", "Recorder", "Run", "float_leaves", "observe", "recording"]


class Run(NamedTuple):
    """What went into a layer and came out in one call of it."""

    layer: nn.Module
    inputs: Tensor
    output: Tensor


class Observation(NamedTuple):
    """One run of a model.

    Attributes:
        output: What the model returned.
        leaves: The floating tensors in it, by where they are.
        runs: Of its layers, in order, those that took and returned a tensor.
        with_labels: Layers whose ``forward`` takes ``labels``, with their arguments.
    """

    output: Any
    leaves: dict[str, Tensor]
    runs: list[Run]
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
        What was seen; tensors are those of the run, not copies.
    """
    with Recorder(module, replace) as recorder, frozen(module), eager():
        return recorder.observation(call())


class Recorder:
    """Hooks that note what goes through the layers of a model.

    Args:
        module: The model.
        replace: Changes the outputs of layers on the way.
        ordinary: Whether to look at training's own forwards only.
    """

    def __init__(
        self,
        module: nn.Module,
        replace: Mapping[nn.Module, Callable[[Tensor], Tensor]] | None = None,
        ordinary: bool = False,
    ) -> None:
        self._replace, self._ordinary = replace or {}, ordinary
        self._runs = list[Run]()
        self._record = recording(self._runs)
        self._with_labels: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []
        layers = (child for child in module.modules() if child is not module)
        self._handles = [layer.register_forward_hook(self._hook, with_kwargs=True) for layer in layers]

    def _hook(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        changed = None
        if self._ordinary and measurements():
            return None
        if layer in self._replace and isinstance(output, Tensor):
            changed = self._replace[layer](output)
        self._record(layer, args, kwargs, output if changed is None else changed)
        if _takes_labels(layer):
            self._with_labels.append((layer, args, kwargs))
        return changed

    def observation(self, output: Any) -> Observation:
        """Return what was seen in a run with this output."""
        return Observation(output, dict(float_leaves(output)), self._runs, self._with_labels)

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def recording(runs: list[Run]) -> Callable[..., None]:
    """Make a hook that adds each run of a layer that takes and returns a tensor."""

    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        came, went = first_tensor((*args, *kwargs.values())), first_tensor(output)
        if came is not None and went is not None and came.is_floating_point() and went.is_floating_point():
            runs.append(Run(layer, came, went))

    return hook


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
