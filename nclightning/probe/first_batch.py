"""Examination of a module by its first batch: does it run, what is its head, which labels belong to which features."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nclightning.errors import UserError, UserTypeError
from nclightning.heads import HeadReader, tolerance
from nclightning.probe.agreement import Agreement, in_another_order
from nclightning.probe.detection import HeadArgument, find_head
from nclightning.probe.features import call_model, class_last, describe, pair_rows
from nclightning.probe.found_head import FoundHead
from nclightning.probe.inputs import inputs_kept, tensors_of
from nclightning.probe.observation import Observation, observe
from nclightning.probe.shift import is_shifted
from nclightning.probe.watch import Entry, entry_of

__all__ = ["IGNORED", "Findings", "FirstBatch", "check_range"]

IGNORED = -100  # The default of torch's cross_entropy.


class Findings(NamedTuple):
    """What the first batch showed of a module.

    Attributes:
        module: The module.
        found: Its head.
        with_labels: Whether the module is called with the whole batch, including the labels, because it needs them.
        shifted: Whether the label at a position belongs to the features one position before.
        entry: Where inputs enter the module.
    """

    module: weakref.ref[nn.Module]
    found: FoundHead
    with_labels: bool
    shifted: bool
    entry: Entry


class _DoesNotRunError(Exception):
    """The module failed on the inputs. The cause of this exception has the reason."""


class FirstBatch:
    """The examination of a module by a batch. Its forwards leave no trace.

    Args:
        module: The module.
        batch: The batch as the user's step gets it.
        inputs: The part of the batch that the module is called with.
        labels: The labels; None if they have no meaning.
        call: Function that runs the module on inputs.
    """

    def __init__(
        self,
        module: nn.Module,
        batch: Any,
        inputs: Any,
        labels: Any,
        call: Callable[[nn.Module, Any], Any],
    ) -> None:
        self._module, self._batch, self._inputs, self._labels, self._call = module, batch, inputs, labels, call
        self._is_written = False

    def examine(
        self,
        head: HeadArgument,
        ignore_index: int | None,
        plain_batch: bool,
        plain_call: bool,
        agreement: Agreement = "factor",
    ) -> Findings:
        """Find the head, and check that labels fit it.

        Args:
            head: As for :func:`nclightning.probe.detection.find_head`.
            ignore_index: Label of samples to leave out.
            plain_batch: Whether batches are split without a function of the user.
            plain_call: Whether the module is run without a function of the user.
            agreement: As for :func:`nclightning.probe.detection.find_head`.

        Raises:
            ValueError: With what was seen, and the argument that repairs it.
            TypeError: If labels are not integers.
        """
        labels, places = self._labels, self._labels
        if agreement == "values" and labels is not None:
            labels, places = None, _places_of(labels)
        elif labels is not None:
            _check_labels(labels)
        whole = isinstance(self._batch, Mapping) and plain_batch
        ignored = IGNORED if ignore_index is None else ignore_index

        def find(inputs: Any) -> tuple[FoundHead, Observation]:
            return find_head(self._module, partial(self._run, inputs), head, places, ignored, agreement)

        found, seen, inputs = self._find(find, whole and agreement != "values")
        if labels is not None:
            pair_rows(torch.empty(found.shape, device="meta"), labels)
            check_range(labels, found.reader, ignore_index, agreement == "factor")
        if places is not None:
            self._check_order(found, seen)
        if labels is not None:
            self._check_positions(found, seen, inputs, labels)
        shifted = False
        if labels is not None and labels.ndim == 2 and labels.shape == found.shape[:-1]:
            calls = [self._labelled] if whole and plain_call else []
            layer = found.reader.layer
            logits = None if layer is None else seen.of(layer)[-1].output
            shifted = is_shifted(self._module, self._inputs, labels, logits, seen, calls, given=not plain_batch)
        entry = entry_of(self._module, seen, inputs, self._is_written)
        return Findings(weakref.ref(self._module), found, inputs is not self._inputs, shifted, entry)

    def _find(
        self, find: Callable[[Any], tuple[FoundHead, Observation]], whole: bool
    ) -> tuple[FoundHead, Observation, Any]:
        """Find the head from the inputs alone, or from the whole batch if the features depend on the labels.

        Some encoder-decoder models do not run without labels. Others run, but feed the encoder's tokens to the decoder,
        which training does not do.
        """
        decides = whole and isinstance(self._labels, Tensor) and self._labels.ndim > 1
        try:
            found, seen = find(self._inputs)
            if not (decides and self._labels_decide(found, seen)):
                return found, seen, self._inputs
        except _DoesNotRunError as failure:
            try:
                if not whole:
                    raise
                return *find(self._batch), self._batch
            except _DoesNotRunError:
                raise self._refusal(failure.__cause__) from failure.__cause__
        except UserError:
            if not decides:
                raise
            with suppress(_DoesNotRunError, UserError):
                return *find(self._batch), self._batch
            raise
        return *find(self._batch), self._batch

    def _labels_decide(self, found: FoundHead, seen: Observation) -> bool:
        """Return whether features change when the module gets the labels, too, and there still is one per label."""
        layer = self._module.get_submodule(found.path)
        try:
            again = observe(self._module, partial(self._run, self._batch)).of(layer)
        except _DoesNotRunError:
            return False
        if len(again) != 1:
            return False
        own, new = (
            run.output if found.side == "output" else class_last(layer, run.inputs)
            for run in (seen.of(layer)[-1], again[0])
        )
        if new.shape[:-1] != self._labels.shape or own.shape[-1] != new.shape[-1]:
            return False
        bound = tolerance(own) * max(float(own.abs().max()), 1e-30)
        return own.shape != new.shape or not torch.allclose(own, new, rtol=0, atol=bound, equal_nan=True)

    def _check_order(self, found: FoundHead, seen: Observation) -> None:
        """Raise if the head gets samples in another order than that of the output, for example sorted by length.

        If the output was seen to follow from the head, the order is the same.
        """
        layer = found.reader.layer
        if layer is None or found.link is not None:
            return
        logits = class_last(layer, seen.of(layer)[-1].output)
        if any(in_another_order(leaf, logits) for leaf in seen.leaves.values()):
            raise UserError(
                f"the head {found.reader.name!r} of {type(self._module).__name__} gets the samples in another order "
                "than the output of the model, for example sorted by length: features cannot be paired with "
                "labels. Pass forward_fn=(module, inputs) -> output that gives the head the samples in the order of "
                "the labels, or batch_fn=(batch) -> (inputs, labels) with inputs and labels in the order of the head."
            )

    def _check_positions(self, found: FoundHead, seen: Observation, inputs: Any, labels: Tensor) -> None:
        """Raise if labels that have the shape of positions may be one-hot labels, or have positions first."""
        if labels.ndim < 2 or labels.shape != found.shape[:-1]:
            return
        classes, count = found.reader.out_features, len(labels)
        if labels.ndim == 2 and labels.shape[1] == classes and _are_one_hot(labels):
            raise UserError(
                f"labels of shape {tuple(labels.shape)} are one-hot rows for the {classes} outputs of the head "
                f"{found.reader.name!r}, or labels of as many positions: pass batch_fn=(batch) -> (inputs, labels) "
                "with their argmax over the last place, or batches of another number of positions."
            )
        if labels.shape[1] != count or count < 2:
            return
        # There are as many positions as samples. Changing one sample shows which dimension of the features is which.
        layer = self._module.get_submodule(found.path)
        changed = partial(self._run, _with_first_sample_changed(inputs, count))
        try:
            again = observe(self._module, changed).of(layer)
        except _DoesNotRunError:
            return
        before, after = seen.of(layer)[-1], again[-1] if again else None
        if after is not None and before.inputs.shape == after.inputs.shape:
            moved = (class_last(layer, before.inputs) != class_last(layer, after.inputs)).any(dim=-1)
            if bool(moved[1:].any()) and not bool(moved[:, 1:].any()):
                raise UserError(
                    f"the features at the head {found.reader.name!r} have positions before samples, and labels of "
                    f"shape {tuple(labels.shape)} samples before positions: pass batch_fn=(batch) -> (inputs, labels) "
                    "that transposes the labels, as lambda b: (b[0], b[1].transpose(0, 1))."
                )

    def _run(self, inputs: Any) -> Any:
        """Run the module on inputs, and restore these."""
        try:
            with inputs_kept(inputs) as written:
                return self._call(self._module, inputs)
        except Exception as error:
            raise _DoesNotRunError from error
        finally:
            self._is_written |= bool(written)

    def _refusal(self, failure: BaseException | None) -> ValueError:
        """Return the error for a module that does not run."""
        said = f"{type(failure).__name__}: {failure}".rstrip()
        said += "" if said.endswith((".", "!", "?")) else "."
        return UserError(
            f"{type(self._module).__name__} could not be run on the inputs of the first batch, "
            f"{describe(self._inputs)}: {said} {self._cast()}Pass forward_fn=(module, inputs) -> output if it is to be "
            "called in another way, or batch_fn=(batch) -> (inputs, labels) if its inputs are others."
        )

    def _cast(self) -> str:
        """Return advice if inputs and weights have different dtypes."""
        weights = {each.dtype for each in self._module.parameters() if each.is_floating_point()}
        others = {each.dtype for each in tensors_of(self._inputs) if each.is_floating_point()} - weights
        if len(weights) != 1 or not others:
            return ""
        own, other = (str(kinds.pop()).removeprefix("torch.") for kinds in (weights, others))
        return f"Inputs are {other} and weights {own}: cast the inputs, or the model with model.to(torch.{other}). "

    def _labelled(self, labels: Tensor) -> Any:
        """Run the module on the whole batch, with these labels in it."""
        key = next(name for name in self._batch if name not in self._inputs)
        with inputs_kept(batch := {**self._batch, key: labels}):
            return call_model(self._module, batch)


def _are_one_hot(labels: Tensor) -> bool:
    return bool(((labels == 0) | (labels == 1)).all()) and bool((labels.sum(dim=1) == 1).all())


def _with_first_sample_changed(inputs: Any, count: int) -> Any:
    """Replace the first sample by the second one."""
    if isinstance(inputs, Tensor):
        if inputs.ndim == 0 or len(inputs) != count:
            return inputs
        return torch.cat([inputs[1:2], inputs[1:]])
    if isinstance(inputs, Mapping):
        return {key: _with_first_sample_changed(value, count) for key, value in inputs.items()}
    if type(inputs) in (tuple, list):
        return type(inputs)(_with_first_sample_changed(value, count) for value in inputs)
    return inputs


def _places_of(targets: Any) -> Tensor:
    """Return an empty tensor with the shape that labels of the same samples would have."""
    if isinstance(targets, Tensor):
        return torch.empty(targets.shape[: max(targets.ndim - 1, 1)])
    raise UserTypeError(
        f"targets must be a tensor, got {describe(targets)}: pass batch_fn=(batch) -> (inputs, targets) with the "
        "targets of one head."
    )


def _check_labels(labels: Any) -> None:
    """Raise unless labels are a tensor of integers."""
    if not isinstance(labels, Tensor):
        raise UserTypeError(
            f"labels must be a tensor of integers, got {describe(labels)}: pass batch_fn=(batch) -> (inputs, labels) "
            "with the labels of one head."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        pair_rows(labels, labels)  # Raises.


def check_range(labels: Tensor, reader: HeadReader, ignore_index: int | None, can_ignore: bool = True) -> None:
    """Raise unless labels are classes of a head. Transfers to the host.

    Args:
        labels: Integers of any shape.
        reader: The head.
        ignore_index: Label to leave out. If labels have positions, -100 is left out, too.
        can_ignore: Whether the user can pass ``ignore_index``.

    Raises:
        ValueError: With the smallest and the largest label.
    """
    counted = labels.flatten()
    if ignore_index is not None:
        counted = counted[counted != ignore_index]
        if labels.ndim > 1:
            counted = counted[counted != IGNORED]
    if counted.numel() and (int(counted.min()) < 0 or int(counted.max()) >= reader.out_features):
        ignored = (
            "ignore_index if a label marks samples to leave out"
            if can_ignore
            else "a loader without the samples whose label marks them to be left out"
        )
        raise UserError(
            f"labels must be within 0..{reader.out_features - 1}, the outputs of the head {reader.name!r}, got "
            f"{int(counted.min())}..{int(counted.max())}: pass batch_fn=(batch) -> (inputs, labels) with labels of "
            f"this head, {ignored}, or head= the layer that the labels belong to."
        )
