"""The reader of pairs: features of a model with their labels, and the head of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nclightning.errors import UserError, listed, nearest
from nclightning.heads import Head, HeadReader, weight_shape
from nclightning.probe.agreement import Agreement
from nclightning.probe.detection import HeadArgument
from nclightning.probe.features import NoLabelsError, call_model, describe, pair_rows, split_batch
from nclightning.probe.first_batch import IGNORED, Findings, FirstBatch
from nclightning.probe.host import Host
from nclightning.probe.inputs import inputs_kept
from nclightning.probe.sweep import compiled_parts, has_lazy_parts
from nclightning.probe.watch import FirstStepHooks, Watch
from nclightning.ranks import rank_zero_warn
from nclightning.sharding import is_sharded, reshard

__all__ = ["BatchFn", "ForwardFn", "PairReader", "layer_named"]

BatchFn = Callable[[Any], tuple[Any, Tensor]]
ForwardFn = Callable[[Any, Any], Any]


class PairReader:
    """Reads features and labels of a model, and its head. The first batch shows where they are.

    Args:
        head: Dotted name of the head, the module, or a function ``(model) -> (weight, bias)``; None to detect it.
        layers: Dotted names of further layers.
        pooling: As for :class:`nclightning.probe.features.FeatureHooks`.
        batch_fn: Function that splits a batch into input and labels; None is
            :func:`nclightning.probe.features.split_batch`.
        forward_fn: Function that runs the model on the input of a batch; None is
            :func:`nclightning.probe.features.call_model`.
        ignore_index: Label of samples to leave out.
        agreement: As for :func:`nclightning.probe.detection.find_head`.
    """

    def __init__(
        self,
        head: HeadArgument = None,
        layers: tuple[str, ...] = (),
        pooling: Literal["mean", "flatten"] = "mean",
        batch_fn: BatchFn | None = None,
        forward_fn: ForwardFn | None = None,
        ignore_index: int | None = None,
        agreement: Agreement = "factor",
    ) -> None:
        self.agreement: Agreement = agreement
        self.layers, self.ignore_index = layers, ignore_index
        self._head, self._pooling = head, pooling
        self._batch_fn, self._forward_fn = batch_fn, forward_fn
        self._findings: Findings | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_findings": None}  # A weak reference cannot be pickled.

    def forget(self) -> None:
        """Forget what the first batch showed."""
        self._findings = None

    def has_examined(self, module: nn.Module) -> bool:
        """Return whether the first batch of a model has been examined, and its head has not been replaced since."""
        if self._findings is None or self._findings.module() is not module:
            return False
        reader = self._findings.found.reader
        if reader.layer is None:
            return True
        try:
            same = reader.layer is module.get_submodule(reader.name)
        except AttributeError:
            return False
        return same and (reader.form != "weight" or weight_shape(reader.layer) == weight_shape(reader))

    @property
    def findings(self) -> Findings:
        """What the first batch showed."""
        assert self._findings is not None
        return self._findings

    # Batches.

    def split(self, batch: Any, labelled: bool = True) -> tuple[Any, Tensor]:
        """Split a batch into the input of the model, and labels that belong to the rows of the features.

        Args:
            batch: The batch as a step gets it.
            labelled: Whether labels have a meaning. If not, a batch may have none.
        """
        try:
            inputs, labels = self._split(batch)
        except NoLabelsError:
            if labelled:
                raise
            return batch, torch.empty(0, dtype=torch.int64)
        if self._findings is None:
            return inputs, labels
        if self._findings.shifted:
            last = torch.full_like(labels[:, :1], IGNORED)
            labels = torch.cat([labels[:, 1:], last], dim=1)
        if labels.ndim > 1 and self.ignore_index not in (None, IGNORED):
            labels = labels.masked_fill(labels == IGNORED, self.ignore_index)
        return batch if self._findings.with_labels else inputs, labels

    def _split(self, batch: Any) -> tuple[Any, Tensor]:
        """Split a batch by the user's function, or by the default one."""
        if self._batch_fn is None:
            return split_batch(batch)
        split = self._batch_fn(batch)
        if not isinstance(split, tuple | list) or len(split) != 2:
            raise UserError(f"batch_fn must return (inputs, labels), it returned {describe(split)}.")
        return split[0], split[1]

    def pair(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Reshape features and labels to rows; see :func:`nclightning.probe.features.pair_rows`."""
        return pair_rows(features, labels)

    # The first batch.

    def check_batch(self, host: Host, batch: Any, *, labelled: bool = True) -> None:
        """Examine the first batch of a model: find the head, and check that labels fit it and pair with features.

        The first call runs the model without a trace; later ones return at once. All processes must call it.

        Args:
            host: The host of the model.
            batch: The batch as a step gets it.
            labelled: Whether its labels have a meaning.

        Raises:
            ValueError: If the batch cannot be split, the forward fails, no layer is seen to be the head, a further
                layer does not exist, or labels do not pair with features or fit the head. The message says what was
                seen, and names the argument that repairs it.
            TypeError: If labels are not integers.
        """
        module = host.module
        if self.has_examined(module):
            return
        self._findings = None
        if has_lazy_parts(module):
            raise UserError(
                f"{type(module).__name__} has lazy layers without weights, which its first forward initialises at "
                "random: run it on a batch before, or train it with a plain NeuralCollapseMonitor."
            )
        for name in self.layers:
            layer_named(module, name)
        with host.unseen(), host.precision():
            try:
                inputs, labels = self._split(batch)
                first = FirstBatch(module, batch, inputs, labels if labelled else None, self.call)
                plain = self._batch_fn is None, self._forward_fn is None
                self._findings = first.examine(self._head, self.ignore_index, *plain, self.agreement)
            finally:
                if is_sharded(module):
                    reshard(module)
        if self._findings.found.reader.normalizes:
            rank_zero_warn(
                f"{self._findings.found.reader.name!r} is a cosine head: features and the rows of its weight are "
                "divided by their norms before anything is measured."
            )

    # The head.

    def head_of(self, module: nn.Module) -> HeadReader:
        """Return the reader of the head."""
        assert self.has_examined(module)
        return self.findings.found.reader

    def head_snapshot(self, module: nn.Module) -> Head:
        """Copy weight and bias of the head, in eval mode and without a trace. All processes must call it."""
        reshard(module)  # Gathered weights may have a lower precision.
        return self.head_of(module).read().snapshot()

    # Forwards.

    def call(self, module: nn.Module, inputs: Any) -> Any:
        """Run the model on the input of a batch."""
        run = call_model if self._forward_fn is None else self._forward_fn
        if self._findings is None or not self._findings.entry.is_written:
            return run(module, inputs)
        with inputs_kept(inputs):
            return run(module, inputs)

    def call_and_verify(self, module: nn.Module, inputs: Any) -> Any:
        """Run the frozen model on the input of a batch, and check that the head is still what it was found to be."""
        return self.findings.found.call_and_verify(module, lambda: self.call(module, inputs))

    def verify_head(self, host: Host, inputs: Any) -> None:
        """Check by another forward without a trace that the head is still what it was found to be."""
        with host.unseen(), host.precision():
            self.call_and_verify(host.module, inputs)
        if is_sharded(host.module):
            reshard(host.module)

    def features(self, host: Host, inputs: Any) -> dict[str, Tensor]:
        """Run the model again on a batch, without compilation and without a trace, and return the features."""
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
        """Hook the place of the features, and further layers.

        Args:
            module: The model.
            in_steps: Whether the forwards are those of the user's steps, and not those of an evaluation pass.
            online: Whether these steps are training steps.

        Raises:
            ValueError: If a layer does not exist.
        """
        assert self.has_examined(module)
        layers = {name: layer_named(module, name) for name in self.layers}
        entry = self.findings.entry if in_steps else None
        return Watch(self.findings.found, module, layers, self._pooling, entry, online)

    def watch_first_step(self, module: nn.Module, head_only: bool = False) -> FirstStepHooks | None:
        """Hook the first training step, to compare it with the examined forward.

        Args:
            module: The model.
            head_only: Whether to check only that the head runs, and not the inputs.

        Returns:
            The hooks; None if a compiled graph would hide the step.
        """
        if compiled_parts(module) or not self.has_examined(module):
            return None
        return FirstStepHooks(module, self.findings.entry, self.layer_of(module), head_only)

    def layer_of(self, module: nn.Module) -> nn.Module:
        """Return the layer at which features are read: the head, if that is a layer."""
        assert self.has_examined(module)
        return self.findings.found.source(module).layer

    def is_compiled(self, module: nn.Module) -> bool:
        """Return whether the head or a further layer runs in a compiled graph, where hooks do not fire."""
        parts = compiled_parts(module)
        watched = [self.layer_of(module), *(layer_named(module, name) for name in self.layers)] if parts else []
        return any(child is layer for part in parts for child in part.modules() for layer in watched)

    # Readers of one model.

    def shares_features_with(self, other: PairReader) -> bool:
        """Return whether another reader of the same model needs the same features and labels."""
        own, theirs = self._key(), other._key()
        return own == theirs and (self._pooling == other._pooling or not (self.layers and other.layers))

    def _key(self) -> tuple[Any, ...]:
        """Return what determines the features and labels that this reader needs."""
        findings, found, head = self.findings, self.findings.found, self.findings.found.reader
        where = found.path, found.side, found.pooling, found.link.position if found.pooling and found.link else None
        weight = self._head if head.layer is None else head.layer, head.form, head.normalizes
        ignored = None if self.ignore_index in (None, IGNORED) else self.ignore_index
        batches = self._batch_fn, self._forward_fn, findings.with_labels, findings.shifted, ignored
        return (type(self), findings.module(), *where, *weight, *batches)

    def together_with(self, others: list[PairReader]) -> PairReader:
        """Return a reader that serves several readers of the same model, with the further layers of all.

        Args:
            others: Readers with which this one shares features.
        """
        if not others:
            return self
        everybody = [self, *others]
        strictest = max(everybody, key=lambda each: ("factor", "shift", "equal", "values").index(each.agreement))
        pooling = next((each._pooling for each in everybody if each.layers), self._pooling)
        layers = tuple(dict.fromkeys(name for each in everybody for name in each.layers))
        made = PairReader(
            strictest._head, layers, pooling, self._batch_fn, self._forward_fn, self.ignore_index, strictest.agreement
        )
        made._findings = strictest._findings
        return made


def layer_named(module: nn.Module, name: str) -> nn.Module:
    """Return a submodule by its dotted name.

    Raises:
        ValueError: If it does not exist.
    """
    try:
        return module.get_submodule(name)
    except AttributeError:
        known, title = [path for path, _ in module.named_modules() if path], type(module).__name__
        raise UserError(
            f"layer {name!r} does not exist in {title}; it has: {listed(known)}.{nearest(name, known)}"
        ) from None
