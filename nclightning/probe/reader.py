"""The features of a model, the labels that belong to them, and its head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nclightning.errors import UserError, listed, nearest
from nclightning.heads import Head, HeadReader, weight_shape
from nclightning.probe.detection import HeadArgument
from nclightning.probe.features import NoLabelsError, call_model, describe, pair_rows, split_batch
from nclightning.probe.first_batch import IGNORED, FirstBatch, Known
from nclightning.probe.host import Host
from nclightning.probe.inputs import inputs_kept
from nclightning.probe.likeness import Like
from nclightning.probe.sweep import compiled_parts, has_lazy_parts
from nclightning.probe.watch import FirstStepHooks, Watch
from nclightning.ranks import rank_zero_warn
from nclightning.sharding import is_sharded, reshard

__all__ = ["BatchFn", "ForwardFn", "PairReader", "layer_named"]

BatchFn = Callable[[Any], tuple[Any, Tensor]]
ForwardFn = Callable[[Any, Any], Any]


class PairReader:
    """Reads features and labels of a model, and the head, once a batch has shown where they are.

    Args:
        head: Dotted name of the head, the module, or a function ``(model) -> (weight, bias)``; None finds it.
        layers: Dotted names of further layers.
        pooling: As for :class:`nclightning.probe.features.FeatureHooks`.
        batch_fn: Splits a batch into input and labels; None is :func:`nclightning.probe.features.split_batch`.
        forward_fn: Runs the model on the input of a batch; None is :func:`nclightning.probe.features.call_model`.
        ignore_index: Label of samples to leave out.
        like: As for :func:`nclightning.probe.detection.find_head`.
    """

    def __init__(
        self,
        head: HeadArgument = None,
        layers: tuple[str, ...] = (),
        pooling: Literal["mean", "flatten"] = "mean",
        batch_fn: BatchFn | None = None,
        forward_fn: ForwardFn | None = None,
        ignore_index: int | None = None,
        like: Like = "factor",
    ) -> None:
        self.like: Like = like
        self.layers, self.ignore_index = layers, ignore_index
        self._head, self._pooling = head, pooling
        self._batch_fn, self._forward_fn = batch_fn, forward_fn
        self._known: Known | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_known": None}  # A weak reference cannot be pickled.

    def forget(self) -> None:
        """Forget what the last model showed."""
        self._known = None

    def knows(self, module: nn.Module) -> bool:
        """Whether the first batch of a model has been seen, and its head has not been replaced since."""
        if self._known is None or self._known.module() is not module:
            return False
        reader = self._known.found.reader
        if reader.layer is None:
            return True
        try:
            same = reader.layer is module.get_submodule(reader.name)
        except AttributeError:
            return False
        return same and (reader.form != "weight" or weight_shape(reader.layer) == weight_shape(reader))

    @property
    def known(self) -> Known:
        """What the first batch showed."""
        assert self._known is not None
        return self._known

    # Batches.

    def split(self, batch: Any, labelled: bool = True) -> tuple[Any, Tensor]:
        """Split a batch into what the model is called with, and the labels as they belong to the feature rows.

        Args:
            batch: As a step gets it.
            labelled: Whether labels mean anything; else a batch may have none, and no labels are returned.
        """
        try:
            inputs, labels = self._split(batch)
        except NoLabelsError:
            if labelled:
                raise
            return batch, torch.empty(0, dtype=torch.int64)
        if self._known is None:
            return inputs, labels
        if self._known.shifted:
            last = torch.full_like(labels[:, :1], IGNORED)
            labels = torch.cat([labels[:, 1:], last], dim=1)
        if labels.ndim > 1 and self.ignore_index not in (None, IGNORED):
            labels = labels.masked_fill(labels == IGNORED, self.ignore_index)
        return batch if self._known.with_labels else inputs, labels

    def _split(self, batch: Any) -> tuple[Any, Tensor]:
        if self._batch_fn is None:
            return split_batch(batch)
        split = self._batch_fn(batch)
        if not isinstance(split, tuple | list) or len(split) != 2:
            raise UserError(f"batch_fn must return (inputs, labels), it returned {describe(split)}.")
        return split[0], split[1]

    def pair(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Bring features and labels to rows; see :func:`nclightning.probe.features.pair_rows`."""
        return pair_rows(features, labels)

    # The first batch.

    def check_batch(self, host: Host, batch: Any, *, labelled: bool = True) -> None:
        """Find head, features and pairing on the first batch of a model, and check what they need.

        Runs the model without a trace, the first time only. All processes must come here.

        Args:
            host: Of the model.
            batch: As its step gets it.
            labelled: Whether its labels mean anything.

        Raises:
            ValueError: With what was seen and the argument that repairs it: if the batch cannot be split, the forward
                fails, no layer is seen to be the head, a further layer does not exist, or labels do not pair with
                features or fit the head.
            TypeError: If labels are no integers.
        """
        module = host.module
        if self.knows(module):
            return
        self._known = None
        if has_lazy_parts(module):
            raise UserError(
                f"{type(module).__name__} has lazy layers without weights, which its first forward makes by chance: "
                "run it once on a batch before, or train it with a plain NeuralCollapseMonitor."
            )
        for name in self.layers:
            layer_named(module, name)
        with host.unseen(), host.precision():
            try:
                inputs, labels = self._split(batch)
                first = FirstBatch(module, batch, inputs, labels if labelled else None, self.call)
                plain = self._batch_fn is None, self._forward_fn is None
                self._known = first.examine(self._head, self.ignore_index, *plain, self.like)
            finally:
                if is_sharded(module):
                    reshard(module)
        if self._known.found.reader.normalizes:
            rank_zero_warn(
                f"{self._known.found.reader.name!r} is a cosine head: features and the rows of its weight are divided "
                "by their norms before anything is measured."
            )

    # The head.

    def head_of(self, module: nn.Module) -> HeadReader:
        """Return the head that the first batch showed."""
        assert self.knows(module)
        return self.known.found.reader

    def whole_head_of(self, module: nn.Module) -> Head:
        """Copy weight and bias as they are now, in eval mode and without a trace. All processes must ask."""
        reshard(module)  # Gathered ones may be of a lower precision.
        return self.head_of(module).read().snapshot()

    # Forwards.

    def call(self, module: nn.Module, inputs: Any) -> Any:
        """Run the model on the input of a batch."""
        run = call_model if self._forward_fn is None else self._forward_fn
        if self._known is None or not self._known.entry.is_written:
            return run(module, inputs)
        with inputs_kept(inputs):
            return run(module, inputs)

    def call_again(self, module: nn.Module, inputs: Any) -> Any:
        """Run the frozen model on the input of a batch, and see that the head is still what it was found to be."""
        return self.known.found.call_again(module, lambda: self.call(module, inputs))

    def check_again(self, host: Host, inputs: Any) -> None:
        """Run a known model once more without a trace, for :meth:`call_again` alone."""
        with host.unseen(), host.precision():
            self.call_again(host.module, inputs)
        if is_sharded(host.module):
            reshard(host.module)

    def features(self, host: Host, inputs: Any) -> dict[str, Tensor]:
        """Run the model once more on a batch, uncompiled and without a trace; return what was captured."""
        with host.unseen(), host.precision():
            watch = self.watch(host.module)
            try:
                kept = watch.take(self.call(host.module, inputs))
                watch.verify()
                return kept
            finally:
                watch.remove()

    # Hooks.

    def watch(self, module: nn.Module, *, in_steps: bool = False, online: bool = False) -> Watch:
        """Hook the place where features arise, and further layers.

        Args:
            module: The model.
            in_steps: Whether steps of the user are watched, and not forwards of our own.
            online: Whether they are those of training.

        Raises:
            ValueError: If a layer does not exist.
        """
        assert self.knows(module)
        layers = {name: layer_named(module, name) for name in self.layers}
        entry = self.known.entry if in_steps else None
        return Watch(self.known.found, module, layers, self._pooling, entry, online)

    def watch_first_step(self, module: nn.Module, head_only: bool = False) -> FirstStepHooks | None:
        """See what the first step of training does otherwise; nothing where a compiled graph hides it.

        Args:
            module: The model.
            head_only: Whether only the head is looked at, and not the inputs.
        """
        if compiled_parts(module) or not self.knows(module):
            return None
        return FirstStepHooks(module, self.known.entry, self.layer_of(module), head_only)

    def layer_of(self, module: nn.Module) -> nn.Module:
        """Return the layer at which features are seen; the head, where that is a layer."""
        assert self.knows(module)
        return self.known.found.source(module).layer

    def is_compiled(self, module: nn.Module) -> bool:
        """Whether the head or a layer runs inside a compiled graph, where hooks do not fire."""
        parts = compiled_parts(module)
        watched = [self.layer_of(module), *(layer_named(module, name) for name in self.layers)] if parts else []
        return any(child is layer for part in parts for child in part.modules() for layer in watched)

    # Readers of one model.

    def sees_as(self, other: PairReader) -> bool:
        """Whether features and labels of a known model are those that another reader sees, so that one can do both."""
        own, theirs = self._as_seen(), other._as_seen()
        return own == theirs and (self._pooling == other._pooling or not (self.layers and other.layers))

    def _as_seen(self) -> tuple[Any, ...]:
        known, found, head = self.known, self.known.found, self.known.found.reader
        where = found.path, found.side, found.pooling, found.link.position if found.pooling and found.link else None
        weight = self._head if head.layer is None else head.layer, head.form, head.normalizes
        ignored = None if self.ignore_index in (None, IGNORED) else self.ignore_index
        batches = self._batch_fn, self._forward_fn, known.with_labels, known.shifted, ignored
        return (type(self), known.module(), *where, *weight, *batches)

    def together_with(self, others: list[PairReader]) -> PairReader:
        """Return a reader that sees what several see of a known model, with the layers of all.

        Args:
            others: Of which each sees as this one does.
        """
        if not others:
            return self
        everybody = [self, *others]
        strictest = max(everybody, key=lambda each: ("factor", "shift", "equal", "values").index(each.like))
        pooling = next((each._pooling for each in everybody if each.layers), self._pooling)
        layers = tuple(dict.fromkeys(name for each in everybody for name in each.layers))
        made = PairReader(
            strictest._head, layers, pooling, self._batch_fn, self._forward_fn, self.ignore_index, strictest.like
        )
        made._known = strictest._known
        return made


def layer_named(module: nn.Module, name: str) -> nn.Module:
    """Return a part of a model by its dotted name.

    Raises:
        ValueError: If there is none.
    """
    try:
        return module.get_submodule(name)
    except AttributeError:
        known, title = [path for path, _ in module.named_modules() if path], type(module).__name__
        raise UserError(
            f"layer {name!r} does not exist in {title}; it has: {listed(known)}.{nearest(name, known)}"
        ) from None
