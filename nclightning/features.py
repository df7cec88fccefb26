"""The pair that every reading is about: a linear head, and the features that enter it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = [
    "Taps",
    "call_model",
    "capture_during",
    "capture_features",
    "detect_head",
    "find_head",
    "pair_rows",
    "split_batch",
]

Result = TypeVar("Result")

_HEAD_NAMES = ("head", "fc", "classifier", "score", "heads", "lm_head")
_LABEL_KEYS = ("labels", "label", "y", "target", "targets")
_PLAIN_SEQUENCES = (tuple, list)


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
        result = call_model(module, inputs)
    finally:
        for handle in handles:
            handle.remove()
    logits = getattr(result, "logits", result)
    for layer, output in reversed(outputs):
        if output is logits:
            return layer
    for child in module.modules():
        named = getattr(child, "get_classifier", None)  # As timm's models name theirs.
        if callable(named) and isinstance(layer := named(), nn.Linear):
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
    return capture_during(lambda: call_model(module, inputs), module, head)[1]


def capture_during(call: Callable[[], Result], module: nn.Module, head: nn.Linear) -> tuple[Result, Tensor]:
    """Call something that runs a module once, and return also what entered its head.

    Args:
        call: Without arguments.
        module: The module, for messages.
        head: A part of it; its own hooks fire as usual.

    Returns:
        Result of the call, and features ``(N, d)`` with their graph if gradients are enabled.

    Raises:
        ValueError: If the head was not called exactly once, or not with a matrix.
    """
    captured: list[Tensor] = []
    handle = _hook_input(head, captured.append)
    try:
        result = call()
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
    return result, captured[0]


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
    # Plain sequences first and without an abstract base class: this is asked in every training step.
    if isinstance(batch, _PLAIN_SEQUENCES) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return batch[0], batch[1]
    if isinstance(batch, Mapping):
        for key in _LABEL_KEYS:
            if key in batch:
                rest = {name: value for name, value in batch.items() if name != key}
                return rest, batch[key]
        raise ValueError(f"a batch with keys {sorted(batch)} has no labels: expected one of {', '.join(_LABEL_KEYS)}.")
    if isinstance(batch, Sequence) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return batch[0], batch[1]
    raise ValueError(f"expected batches (x, y) or mappings with labels, got {type(batch).__name__}.")


def call_model(module: nn.Module, inputs: Any) -> Any:
    """Call a module with the input of a batch.

    Args:
        module: Any module.
        inputs: Passed as they are; a mapping by keyword if its names are those of ``forward``, and as a whole to a
            ``forward`` that takes one argument of another name, or its only value.

    Returns:
        The module's output.
    """
    if not isinstance(inputs, Mapping):
        return module(inputs)
    accepted = inspect.signature(module.forward).parameters
    if all(name in accepted for name in inputs) or any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        return module(**inputs)
    if len(inputs) == 1:
        return module(*inputs.values())
    # A forward that takes one thing takes the mapping; with several, the error of the call says what does not fit.
    return module(inputs) if len(accepted) == 1 and not accepted.keys() & inputs.keys() else module(**inputs)


def pair_rows(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Bring features to one row per label.

    Args:
        features: ``(B, d)`` with labels ``(B,)``; or ``(B, T, d)`` with a label per position ``(B, T)``.
        labels: Integers of any type.

    Returns:
        Features ``(N, d)`` and labels ``(N,)`` int64.

    Raises:
        ValueError: If there is not one label per row.
        TypeError: If labels are not integers.
    """
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers, got {labels.dtype}: for one-hot or soft labels pass a batch_fn.")
    if labels.ndim == 2 and labels.shape[1] == 1 and features.ndim == 2:
        labels = labels.squeeze(1)
    if features.ndim < 2 or labels.shape != features.shape[:-1]:
        raise ValueError(
            f"there must be one label per feature row, got features of shape {tuple(features.shape)} and labels of "
            f"shape {tuple(labels.shape)}."
        )
    return features.reshape(-1, features.shape[-1]), labels.reshape(-1).long()


class Taps:
    """Hooks that copy what last went into the head and came out of further layers.

    At once, while it is in the cache, and whatever is written to the same memory later.

    Args:
        head: Its input is kept under the name ``""``.
        layers: Modules by name; of their outputs the first tensor is kept, one row per sample.
        pooling: ``"mean"`` averages maps ``(B, C, H, W)`` over space and sequences ``(B, T, d)`` over positions,
            ``"flatten"`` takes all entries.
    """

    def __init__(
        self,
        head: nn.Module,
        layers: Mapping[str, nn.Module] | None = None,
        pooling: Literal["mean", "flatten"] = "mean",
    ) -> None:
        self._kept: dict[str, Tensor] = {}
        self._runs = 0
        self._pooling = pooling
        self._failure: str | None = None
        self._handles = [_hook_input(head, self._keep)]
        for name, layer in (layers or {}).items():
            self._handles.append(layer.register_forward_hook(self._keep_output(name)))

    def _keep_output(self, name: str) -> Any:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            tensor = _first_tensor(output)
            if tensor is None:  # No error here, in the middle of somebody's forward.
                self._failure = f"layer {name!r} returns no tensor: its features cannot be read."
                return
            tensor = tensor.detach()
            pooled = tensor if self._pooling == "flatten" else _pool(tensor)
            self._kept[name] = tensor.clone() if pooled is tensor else pooled

        return hook

    def _keep(self, tensor: Tensor) -> None:
        self._kept[""] = tensor.detach().clone()
        self._runs += 1

    def take(self, once: bool = False) -> dict[str, Tensor]:
        """Return what was copied since the last call, and forget it.

        Args:
            once: Refuse a head that ran several times; else the last time counts, as in a step with several closures.

        Returns:
            Features by name; those of layers with one row per sample.

        Raises:
            ValueError: If the head did not run as it should, or a layer returned no tensor.
        """
        kept, self._kept = self._kept, {}
        runs, self._runs = self._runs, 0
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise ValueError(failure)
        if once and runs > 1:
            raise ValueError(f"the head ran {runs} times in one forward, expected once.")
        if "" not in kept:
            raise ValueError(
                "the head did not run in this step, so there are no features to read. A compiled model does not see "
                "the hook: there only sweeps work (source='sweep', stages=('train',))."
            )
        return {name: tensor.flatten(1) if name else tensor for name, tensor in kept.items()}

    def remove(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._kept = [], {}

    def __enter__(self) -> Taps:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _hook_input(head: nn.Module, keep: Callable[[Tensor], None]) -> RemovableHandle:
    """Hand on what enters a head, by place or by keyword."""

    def hook(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        keep(args[0] if args else next(iter(kwargs.values())))

    return head.register_forward_pre_hook(hook, with_kwargs=True)


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, Iterable) else ()
    return next((value for value in values if isinstance(value, Tensor)), None)


def _pool(tensor: Tensor) -> Tensor:
    if tensor.ndim == 3:
        return tensor.mean(dim=1)
    return tensor.flatten(2).mean(dim=2) if tensor.ndim > 3 else tensor


def _list(linear: Mapping[str, nn.Linear]) -> str:
    existing = ", ".join(repr(path) for path in linear) or "none"
    return f"linear layers are: {existing}. Pass head='name of the last layer'."
