"""What the first batch of a module shows: whether it runs, its head, and which labels belong to which features."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn

from nclightning.detection import HeadArgument, find_head
from nclightning.errors import UserError, UserTypeError
from nclightning.features import call_model, describe, pair_rows
from nclightning.found import Found
from nclightning.heads import HeadReader
from nclightning.observation import Observation
from nclightning.shift import is_shifted

__all__ = ["IGNORED", "FirstBatch", "Known", "check_range", "first_of"]

IGNORED = -100  # As for torch's cross_entropy.


class Known(NamedTuple):
    """What was seen of a module.

    Attributes:
        module: The module.
        found: Its head.
        with_labels: Whether it is called with the whole mapping, since it does not run without labels.
        shifted: Whether the label at a position belongs to the features one position before.
    """

    module: weakref.ref[nn.Module]
    found: Found
    with_labels: bool
    shifted: bool


class _DoesNotRunError(Exception):
    """The module failed on inputs, for the reason that is its cause."""


class FirstBatch:
    """Examines a module by a batch, with forwards that leave no trace.

    Args:
        pl_module: The module.
        batch: The batch as its step gets it.
        inputs: What of the batch the module is called with.
        labels: None if they mean nothing.
        call: Runs the module on inputs.
    """

    def __init__(
        self,
        pl_module: L.LightningModule,
        batch: Any,
        inputs: Any,
        labels: Any,
        call: Callable[[L.LightningModule, Any], Any],
    ) -> None:
        self._module, self._batch, self._inputs, self._labels, self._call = pl_module, batch, inputs, labels, call

    def examine(
        self,
        head: HeadArgument,
        ignore_index: int | None,
        plain_batch: bool,
        plain_call: bool,
        seen: Observation | None = None,
    ) -> Known:
        """Find the head, and check what it needs.

        Args:
            head: As for :func:`nclightning.detection.find_head`.
            ignore_index: Label of samples to leave out.
            plain_batch: Whether no function of the user splits batches.
            plain_call: Whether no function of the user runs the module.
            seen: An ordinary forward on the batch; None runs one.

        Raises:
            ValueError: With what was seen and the argument that repairs it.
            TypeError: If labels are no integers.
        """
        labels = self._labels
        if labels is not None:
            _check_labels(labels)
        whole = isinstance(self._batch, Mapping) and plain_batch
        ignored, inputs = IGNORED if ignore_index is None else ignore_index, self._inputs
        try:
            found, seen = find_head(self._module, partial(self._run, inputs), head, labels, ignored, seen)
        except _DoesNotRunError as failure:
            inputs = self._batch  # As encoder-decoders need labels to run.
            try:
                if not whole:
                    raise
                found, seen = find_head(self._module, partial(self._run, inputs), head, labels, ignored)
            except _DoesNotRunError:
                raise self._refusal(failure.__cause__) from failure.__cause__
        if labels is not None:
            pair_rows(torch.empty(found.shape, device="meta"), labels)
            check_range(labels, found.reader, ignore_index)
        shifted = False
        if labels is not None and labels.ndim == 2 and labels.shape == found.shape[:-1]:
            calls = [self._labelled] if whole and plain_call else []
            layer = found.reader.layer
            logits = None if layer is None else seen.of(layer)[-1].output
            shifted = is_shifted(self._module, self._inputs, labels, logits, seen, calls, given=not plain_batch)
        return Known(weakref.ref(self._module), found, inputs is not self._inputs, shifted)

    def _run(self, inputs: Any) -> Any:
        try:
            return self._call(self._module, inputs)
        except Exception as error:
            raise _DoesNotRunError from error

    def _refusal(self, failure: BaseException | None) -> ValueError:
        return ValueError(
            f"{type(self._module).__name__} could not be run on the inputs of the first batch, "
            f"{describe(self._inputs)}: {type(failure).__name__}: {failure} Pass forward_fn=(module, inputs) -> output "
            "if it is to be called in another way, or batch_fn=(batch) -> (inputs, labels) if its inputs are others."
        )

    def _labelled(self, labels: Tensor) -> Any:
        """Run the module on the whole mapping with other labels."""
        key = next(name for name in self._batch if name not in self._inputs)
        return call_model(self._module, {**self._batch, key: labels})


def first_of(batch: Any, loaders: Any) -> Any:
    """Return the batch of the first loader out of one that several loaders made together."""
    if isinstance(loaders, Mapping) and isinstance(batch, Mapping) and batch.keys() == loaders.keys():
        return next(iter(batch.values()))
    if isinstance(loaders, list | tuple) and isinstance(batch, list | tuple) and len(batch) == len(loaders):
        return batch[0]
    return batch


def _check_labels(labels: Any) -> None:
    if not isinstance(labels, Tensor):
        raise UserTypeError(
            f"labels must be a tensor of integers, got {describe(labels)}: pass batch_fn=(batch) -> (inputs, labels) "
            "with the labels of one head."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        pair_rows(labels, labels)  # Raises.


def check_range(labels: Tensor, reader: HeadReader, ignore_index: int | None) -> None:
    """Raise unless labels are classes of a head. Transfers to the host.

    Args:
        labels: Integers of any shape.
        reader: The head.
        ignore_index: Label to leave out, and with it -100 where labels are those of positions.

    Raises:
        ValueError: With the least and the greatest.
    """
    counted = labels.flatten()
    if ignore_index is not None:
        counted = counted[counted != ignore_index]
        if labels.ndim > 1:
            counted = counted[counted != IGNORED]
    if counted.numel() and (int(counted.min()) < 0 or int(counted.max()) >= reader.out_features):
        raise UserError(
            f"labels must be within 0..{reader.out_features - 1}, the outputs of the head {reader.name!r}, got "
            f"{int(counted.min())}..{int(counted.max())}: pass batch_fn=(batch) -> (inputs, labels) with labels of "
            "this head, ignore_index if a label marks samples to leave out, or head= the layer that the labels belong "
            "to."
        )
