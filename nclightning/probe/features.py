"""Hooks that capture features in a model, and functions that split batches and pair features with labels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.hooks import RemovableHandle

from nclightning.errors import UserError, UserTypeError
from nclightning.probe.hooks import hook_call, hook_result

__all__ = [
    "FeatureHooks",
    "FeatureSource",
    "NoLabelsError",
    "Pooling",
    "call_model",
    "capture_during",
    "capture_features",
    "class_last",
    "describe",
    "first_argument",
    "first_tensor",
    "pair_rows",
    "split_batch",
]

Result = TypeVar("Result")


class NoLabelsError(UserError):
    """A batch has no labels."""


Pooling = Literal["", "mean", "one"]

_LABEL_KEYS = ("labels", "label", "y", "target", "targets")
_PLAIN_SEQUENCES = (tuple, list)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def capture_features(module: nn.Module, head: nn.Linear, inputs: Any) -> Tensor:
    """Run a module and return the input of its head, with its graph if gradients are enabled.

    Args:
        module: The module. It is called once as :func:`call_model` does.
        head: A submodule of ``module``. Its hooks fire as usual.
        inputs: Model input.

    Returns:
        Features ``(N, d)``.

    Raises:
        ValueError: If the head was not called exactly once, or not with a matrix.
    """
    return capture_during(lambda: call_model(module, inputs), module, head)[1]


def capture_during(call: Callable[[], Result], module: nn.Module, head: nn.Linear) -> tuple[Result, Tensor]:
    """Call a function that runs a module once, and return its result and the input of the head.

    Args:
        call: The function, without arguments.
        module: The module, for messages.
        head: A submodule of ``module``. Its hooks fire as usual.

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
        raise UserError(f"the head of {type(module).__name__} ran {len(captured)} times in one forward, expected once.")
    if captured[0].ndim != 2:
        raise UserError(
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
    # Plain sequences come first, without an abstract base class, because this runs in every training step.
    if isinstance(batch, _PLAIN_SEQUENCES) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return batch[0], batch[1]
    if isinstance(batch, Mapping):
        keys = [key for key in _LABEL_KEYS if key in batch]
        if len(keys) == 1:
            rest = {name: value for name, value in batch.items() if name != keys[0]}
            return rest, batch[keys[0]]
        if keys:
            raise UserError(
                f"a batch has several keys under which labels may be: {', '.join(map(repr, keys))}. Pass "
                "batch_fn=(batch) -> (inputs, labels) that returns the labels of the head."
            )
        raise NoLabelsError(
            f"a batch with keys {sorted(map(str, batch))} has no labels: expected one of {', '.join(_LABEL_KEYS)}. "
            "Pass batch_fn=(batch) -> (inputs, labels)."
        )
    if isinstance(batch, Sequence) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return batch[0], batch[1]
    repair = "lambda b: (b[0], b[1])"
    if isinstance(batch, Sequence) and len(batch) == 2 and isinstance(batch[1], int):
        raise UserError(
            f"expected batches (x, y) with a tensor of labels, got {describe(batch)}, which seems to be one sample. "
            "Pass a DataLoader, which makes batches."
        )
    if isinstance(batch, Sequence) and len(batch) == 2:
        repair = "lambda b: (torch.as_tensor(b[0]), torch.as_tensor(b[1]))"
    raise UserError(
        f"expected batches (x, y) with a tensor of labels, or mappings with labels, got {describe(batch)}. Pass "
        f"batch_fn=(batch) -> (inputs, labels), such as {repair}."
    )


def describe(value: Any, depth: int = 2) -> str:
    """Describe type and shapes of a value in words, such as ``"a tuple of (8, 3) float32, (8,) int64"``."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, str | bytes) or depth == 0:
        return f"a {type(value).__name__}"
    if isinstance(value, Mapping):
        inside = [f"{key}: {describe(each, depth - 1)}" for key, each in list(value.items())[:8]]
    elif isinstance(value, Sequence):
        inside = [describe(each, depth - 1) for each in list(value)[:8]]
    else:
        return f"a {type(value).__name__}"
    return f"a {type(value).__name__} of {', '.join(inside) or 'nothing'}"


def call_model(module: nn.Module, inputs: Any) -> Any:
    """Call a module with the input of a batch.

    Args:
        module: Any module.
        inputs: Passed as they are, unless they are a mapping. A mapping is passed by keyword if ``forward`` has
            arguments of its names. If it has a single value, that is passed. If ``forward`` has a single argument, the
            mapping is passed as a whole.

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
    # If nothing fits, the call by keyword raises an error that names the argument.
    return module(inputs) if len(accepted) == 1 and not accepted.keys() & inputs.keys() else module(**inputs)


def pair_rows(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Reshape features and labels to one row per label.

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
        hot = labels.ndim > 1 and labels.shape[-1] > 1
        means = (
            "one-hot labels by their argmax (soft labels have no class)" if hot else "class numbers by labels.long()"
        )
        raise UserTypeError(
            f"labels must be integers, got {labels.dtype} of shape {tuple(labels.shape)}: pass batch_fn=(batch) -> "
            f"(inputs, labels) that makes integers of {means}. Several labels of a sample, and soft ones, are read by "
            "nclightning.metrics.Optimality('bce', head).update(features, targets), real targets by "
            "RegressionCollapseMonitor."
        )
    if labels.ndim == 2 and labels.shape[1] == 1 and features.ndim == 2:
        labels = labels.squeeze(1)
    if features.ndim < 2 or labels.shape != features.shape[:-1]:
        raise UserError(
            f"there must be one label per feature row, got features of shape {tuple(features.shape)} and labels of "
            f"shape {tuple(labels.shape)}: pass batch_fn=(batch) -> (inputs, labels) with labels of shape "
            f"{tuple(features.shape[:-1])}."
        )
    return features.reshape(-1, features.shape[-1]), labels.reshape(-1).long()


class FeatureSource(NamedTuple):
    """The place in a model where features are read.

    Attributes:
        layer: The layer.
        output: Whether features are the output of the layer, and not its input.
        pooling: How positions are reduced to one row per sample: by their ``"mean"``, or to ``"one"`` position; empty
            to keep all.
        position: Index of the one position; None to keep all positions, of which one is chosen later.
        normalized: Whether features are divided by their norms, as a cosine head does.
    """

    layer: nn.Module
    output: bool = False
    pooling: Pooling = ""
    position: int | None = None
    normalized: bool = False

    def copy_of(self, tensor: Tensor) -> Tensor:
        """Copy the tensor at the layer as features ``(B, d)``, or ``(B, ..., d)`` with a row per position."""
        rows = tensor if self.output else class_last(self.layer, tensor)
        several = rows.ndim > 2 and bool(self.pooling)
        if several and self.pooling == "one" and self.position is not None:
            rows = rows.flatten(1, -2)[:, self.position]
        if self.normalized:
            rows = normalize(rows, dim=-1)
        elif not several or self.pooling != "mean":
            return rows.clone()
        return rows.flatten(1, -2).mean(dim=1) if several and self.pooling == "mean" else rows


class FeatureHooks:
    """Hooks that copy the features at the head, and the outputs of further layers.

    They copy during the forward, because the model may overwrite the memory later.

    Args:
        source: Where to read the features; a module stands for its input. They are kept under the name ``""``.
        layers: Further modules by name. The first tensor of their output is kept, one row per sample.
        pooling: ``"mean"`` averages maps ``(B, C, H, W)`` over space and sequences ``(B, T, d)`` over positions,
            ``"flatten"`` keeps all entries.
        wanted: Function that returns whether the features of the current run are needed. The first run for which they
            are is kept. With None, the last run is kept.
    """

    def __init__(
        self,
        source: nn.Module | FeatureSource,
        layers: Mapping[str, nn.Module] | None = None,
        pooling: Literal["mean", "flatten"] = "mean",
        wanted: Callable[[], bool] | None = None,
    ) -> None:
        self.kept: dict[str, Tensor] = {}
        self.runs = 0
        self._pooling, self._wanted = pooling, wanted
        self._failure: str | None = None
        self._source = FeatureSource(source) if isinstance(source, nn.Module) else source
        self._handles = [
            hook_result(self._source.layer, self._keep_features)
            if self._source.output
            else _hook_input(self._source.layer, self._keep)
        ]
        for name, layer in (layers or {}).items():
            self._handles.append(hook_result(layer, self._keep_output(name)))

    def _is_wanted(self, name: str) -> bool:
        """Return whether the tensor of a name is needed."""
        return self._wanted is None or (self._wanted() and name not in self.kept)

    def _keep_output(self, name: str) -> Callable[[Any, Any], None]:
        """Return a hook that keeps the output of a further layer."""

        def keep(args: Any, output: Any) -> None:
            if not self._is_wanted(name):
                return
            tensor = first_tensor(output)
            if tensor is None:  # Raised later: an error here would end the user's own forward.
                self._failure = f"layer {name!r} returns no tensor: its features cannot be read."
                return
            tensor = tensor.detach()
            pooled = tensor if self._pooling == "flatten" else _pool(tensor)
            self.kept[name] = tensor.clone() if pooled is tensor else pooled

        return keep

    def _keep_features(self, args: Any, output: Any) -> None:
        if (tensor := first_tensor(output)) is not None:
            self._keep(tensor)

    def _keep(self, tensor: Tensor) -> None:
        """Keep the features of a run if they are needed."""
        self.runs += 1
        if self._is_wanted(""):
            self.kept[""] = self._source.copy_of(tensor.detach())

    def take(self, once: bool = False) -> dict[str, Tensor]:
        """Return the copies since the last call, and drop them.

        Args:
            once: Whether to raise if the head ran several times.

        Returns:
            Features by name; those of further layers with one row per sample.

        Raises:
            ValueError: If the head did not run as it should, or a layer returned no tensor.
        """
        kept, self.kept = self.kept, {}
        runs, self.runs = self.runs, 0
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise UserError(failure)
        if once and runs > 1:
            raise UserError(
                f"the head ran {runs} times in one forward, expected once: pass forward_fn=(module, inputs) -> output "
                "that runs it once, or head= another layer."
            )
        if "" not in kept and once:
            raise UserError(
                "the head ran on the first batch but not on a later one, so that there are no features: pass "
                "forward_fn=(module, inputs) -> output that runs one head on each batch, or head= a layer that always "
                "runs."
            )
        if "" not in kept:
            raise UserError(
                "the head did not run here, so there are no features. If the step computes its logits in another way "
                "than forward does, pass head= the layer that it runs; if the model is compiled, or a copy of it runs, "
                "hooks are not seen: use source='sweep' and stages=('train',), or Probe.read."
            )
        return {name: tensor.flatten(1) if name else tensor for name, tensor in kept.items()}

    def remove(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.kept = [], {}

    def __enter__(self) -> FeatureHooks:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def class_last(layer: nn.Module, tensor: Tensor) -> Tensor:
    """Move channels to the last dimension, as for linear layers, if the layer is a convolution."""
    return tensor.movedim(1, -1) if isinstance(layer, _CONVOLUTIONS) and tensor.ndim > 2 else tensor


def _hook_input(head: nn.Module, keep: Callable[[Tensor], None]) -> RemovableHandle:
    """Hook a head, and pass its input to a function, whether it is given by position or by keyword."""

    def hand_on(args: Any, kwargs: dict[str, Any]) -> None:
        if (tensor := first_argument(args, kwargs)) is not None:
            keep(tensor)

    return hook_call(head, hand_on)


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the first tensor among the arguments of a call."""
    # It is almost always the first argument, and this runs in every training step.
    return args[0] if args and isinstance(args[0], Tensor) else first_tensor((*args, *kwargs.values()))


def first_tensor(output: Any) -> Tensor | None:
    """Return a tensor, or the first one in a mapping or sequence; None if there is none."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, Iterable) else ()
    return next((value for value in values if isinstance(value, Tensor)), None)


def _pool(tensor: Tensor) -> Tensor:
    """Average a tensor over all dimensions except samples and channels."""
    if tensor.ndim == 3:
        return tensor.mean(dim=1)
    return tensor.flatten(2).mean(dim=2) if tensor.ndim > 3 else tensor
