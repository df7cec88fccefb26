"""Which layer of a model is its head, as one run of the model shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nclightning.errors import UserError, UserTypeError
from nclightning.features import class_last
from nclightning.found import REPAIRS, Found
from nclightning.heads import HeadReader, fits, has_more_than_a_weight, has_weight, pair_of, read_head
from nclightning.likeness import follows, follows_from, makes, pattern
from nclightning.observation import Observation, Run, observe
from nclightning.sweep import frozen

__all__ = ["HeadArgument", "find_head"]

HeadArgument = str | nn.Module | Callable[[Any], Any] | None
_MOST_LISTED = 12


def find_head(
    module: nn.Module,
    call: Callable[[], Any],
    head: HeadArgument = None,
    labels: Tensor | None = None,
    ignore_index: int | None = None,
    seen: Observation | None = None,
) -> tuple[Found, Observation]:
    """Find the head of a model, and where its features arise, by running it.

    Without ``head`` a layer is the head if the run shows it: its output is the output of the model, or a part of it at
    any depth; or the output follows from it by something that keeps the classes (log_softmax, softmax, sigmoid, a
    temperature, a squeeze, a cast, a mean over positions), also where the output of the layer is replaced. If several
    layers do so, those that feed others are left out, and those that have too few outputs for the labels.

    Args:
        module: The model.
        call: Runs it on a batch.
        head: Dotted name, module, or function ``(model) -> (weight, bias)``; None finds it.
        labels: Of the batch.
        ignore_index: Label that counts for nothing.
        seen: A run of the model on the batch; None runs it. Where that leaves a doubt the model runs again.

    Returns:
        The head, and what was seen.

    Raises:
        ValueError: If no layer was seen to be the head, or several were; the message lists those that ran.
        TypeError: If ``head`` is of another type.
    """
    return _Search(module, call, labels, ignore_index, seen).find(head)


class _Search:
    """Looks for the head of one model on one batch."""

    def __init__(
        self,
        module: nn.Module,
        call: Callable[[], Any],
        labels: Tensor | None,
        ignored: int | None,
        seen: Observation | None,
    ) -> None:
        self._module, self._call, self._labels = module, call, labels
        self._part: str | None = None
        self._names = {child: name for name, child in module.named_modules()}
        self._seen = observe(module, call) if seen is None else seen
        self._most = -1
        if labels is not None and labels.numel() and not labels.is_floating_point():
            counted = labels if ignored is None else labels[labels != ignored]
            self._most = int(counted.max()) if counted.numel() else -1

    def find(self, head: HeadArgument) -> tuple[Found, Observation]:
        if head is None:
            layer = self._detect()
        elif isinstance(head, str):
            named = dict(self._module.named_modules()).get(head) if head else None
            if named is None:
                raise UserError(f"no layer named head={head!r} in {self._title}. {self._layers()}")
            layer = named
        elif isinstance(head, nn.Module):
            if head is self._module or head not in self._names:
                raise UserError(f"head= is a {type(head).__name__} that is no part of {self._title}. {self._layers()}")
            layer = head
        elif callable(head):
            return self._found_by_values(head), self._seen
        else:
            raise UserTypeError(
                "head must be a dotted name, a module, a function (model) -> (weight, bias) or None, got "
                f"{type(head).__name__}."
            )
        return self._found(layer, named=head is not None), self._seen

    # A layer that is known to be the head.

    def _found(self, layer: nn.Module, named: bool) -> Found:
        name, runs = self._names[layer], self._seen.of(layer)
        if len(runs) != 1:
            what = "did not run" if not runs else f"ran {len(runs)} times"
            raise UserError(
                f"the head {name!r} of {self._title} {what} in one forward, expected once: features and logits would "
                f"not be one of the other. {self._layers()} Pass forward_fn=(module, inputs) -> output that runs the "
                "head once, or head= another layer."
            )
        run = runs[0]
        features, output = class_last(layer, run.inputs), class_last(layer, run.output)
        if output.shape[-1] < 2:
            raise UserError(
                f"the head {name!r} of {self._title} has one output, and neural collapse is about at least two "
                "classes: train with an output for each class. " + self._layers()
            )
        reader, margin = self._reader(layer, name, features, output, named)
        pooled = self._is_pooled(layer, features.shape[:-1], output, named, reader)
        shape = features.shape[:1] + features.shape[-1:] if pooled else features.shape
        return Found(reader, name, "input", pooled, shape, None if named else self._part, margin)

    def _reader(
        self, layer: nn.Module, name: str, features: Tensor, output: Tensor, named: bool
    ) -> tuple[HeadReader, bool]:
        readable, more = has_weight(layer), has_more_than_a_weight(layer)
        plain = [("weight", False), ("transposed", False)] if readable and not more else []
        if more or named:
            plain.append(("probed", False))
        cosine = [("weight", True), ("transposed", True)] if readable else []
        sizes = output.shape[-1], features.shape[-1]
        margins = self._labels if self._labels is not None and self._labels.shape == output.shape[:-1] else None
        for form, normalizes in plain + cosine:
            reader = HeadReader(layer, name, form, normalizes, *sizes)  # type: ignore[arg-type]
            try:
                with frozen(self._module):
                    head = reader.read()
            except (ValueError, TypeError, RuntimeError):
                continue
            with frozen(self._module):
                plain_fit = makes(layer, head, features, output)
            if not plain_fit and not (normalizes and margins is not None and fits(head, features, output, margins)):
                continue
            if normalizes and not named:
                raise UserError(
                    f"the layer {name!r}, whose output is the output of {self._title}, is a cosine head: it divides "
                    f"features and the rows of its weight by their norms. Pass head={name!r} to measure normalised "
                    "features and rows."
                )
            return reader, not plain_fit
        raise UserError(
            f"the layer {name!r} of {self._title} maps {tuple(features.shape)} to {tuple(output.shape)}, but neither "
            "as W h + b nor as a cosine of h with the rows of its weight, so that it has no weight that could be "
            f"measured. {self._layers()} {REPAIRS}"
        )

    def _is_pooled(self, layer: nn.Module, rows: torch.Size, output: Tensor, named: bool, reader: HeadReader) -> bool:
        """Whether features are to be averaged over positions, or are one row per label."""
        labels = self._labels
        shape = None if labels is None else labels.shape
        single = rows[:1].numel() == rows.numel()
        per_sample = labels is None or shape in (rows[:1], torch.Size([*rows[:1], 1]))
        if len(rows) == 1 or shape == rows:
            pooled = False
        elif single and per_sample:
            pooled = True
        elif per_sample and labels is not None and not reader.normalizes:
            seen = observe(self._module, self._call, {layer: pattern})
            output = class_last(layer, seen.of(layer)[-1].output)
            pooled = any(follows(leaf, output, mean=True) for leaf in seen.leaves.values())
            pooled = pooled or (named and class_last(layer, output.movedim(-1, 1)) is not output)
        else:
            pooled = False
        left = rows[:1] if pooled else rows
        if shape is not None and shape not in (left, torch.Size([*left, 1])):
            raise UserError(_unpaired(reader.name, (*left, reader.in_features), shape))
        return pooled

    # A head that is a function of the model.

    def _found_by_values(self, head: Callable[[Any], Any]) -> Found:
        def pair() -> Any:
            return head(self._module)

        name = getattr(head, "__name__", "head")
        with frozen(self._module):
            weight = read_head(pair_of(pair()))
        sizes = weight.out_features, weight.in_features
        for normalizes in (False, True):
            reader = HeadReader(pair, name, "weight", normalizes, *sizes)
            with frozen(self._module):
                own = reader.read()
            for run in reversed(self._seen.runs):
                for side, rows in (("output", run.output), ("input", class_last(run.layer, run.inputs))):
                    if rows.shape[-1] == own.in_features and follows_from(self._seen.leaves, rows, own):
                        positions = rows.shape[:-1]
                        if self._labels is not None and self._labels.shape not in (
                            positions,
                            torch.Size([*positions, 1]),
                        ):
                            raise UserError(_unpaired(name, tuple(rows.shape), self._labels.shape))
                        return Found(reader, self._names[run.layer], side, False, rows.shape)
        raise UserError(
            f"head= returned a weight of shape {sizes}, and no layer of {self._title} has features h in its input or "
            f"output from which the output of the model follows as W h + b. {self._layers()} Let the features go "
            "through a module of their own, such as nn.Identity(), right before the head is applied."
        )

    # A head that is to be found.

    def _detect(self) -> nn.Module:
        matches = self._matches()
        if len(matches) > 1:
            fed = {a for a in matches for b in matches if a is not b and self._feeds(a, b)}
            matches = {layer: names for layer, names in matches.items() if layer not in fed}
        if len(matches) > 1:
            fitting = {layer: names for layer, names in matches.items() if self._has_place_for_labels(layer)}
            matches = fitting or matches
        if len(matches) > 1:
            named = {get() for child in self._names if callable(get := getattr(child, "get_classifier", None))}
            matches = {layer: at for layer, at in matches.items() if layer in named} or matches
        if len(matches) == 1:
            layer = next(iter(matches))
            self._check_influence(layer, matches[layer])
            self._part = min(matches[layer])
            return layer
        if not matches:
            raise UserError(
                f"no layer of {self._title} was seen to be the head: none has an output that is the output of the "
                f"model, or from which that follows by log_softmax, softmax, sigmoid, a temperature, a squeeze or a "
                f"cast. {self._layers()} {REPAIRS}"
            )
        raise UserError(
            f"cannot tell which layer of {self._title} is the head: the outputs of "
            f"{' and '.join(repr(self._names[layer]) for layer in matches)} are all parts of the output of the model. "
            f"{self._layers()} {REPAIRS}"
        )

    def _matches(self) -> dict[nn.Module, set[str]]:
        """Layers that make a part of the output, with the names of these parts."""
        leaves = {name: leaf for name, leaf in self._seen.leaves.items() if leaf.ndim > 0}
        if "logits" in leaves:  # As output objects call what the loss is computed from.
            leaves = {"logits": leaves["logits"]}
        matches: dict[nn.Module, set[str]] = {}
        for name, leaf in leaves.items():
            same = [run.layer for run in self._seen.runs if run.output is leaf and self._is_linear(run)]
            if not same:
                same = self._outermost(
                    [
                        run.layer
                        for run in self._seen.runs
                        if self._may_make(run, leaf) and self._is_linear(run) and self._leads_to(run, name)
                    ]
                )
            else:
                same = self._innermost(same)
            for layer in same:
                matches.setdefault(layer, set()).add(name)
        return matches

    def _is_linear(self, run: Run) -> bool:
        """Whether a layer has a weight, or wraps one that has and takes the same input."""
        if has_weight(run.layer):
            return True
        inner = set(run.layer.modules()) - {run.layer}
        if not any(
            other.layer in inner
            and other.inputs is run.inputs
            and other.output.shape == run.output.shape
            and has_weight(other.layer)
            for other in self._seen.runs
        ):
            return False
        reader = HeadReader(run.layer, "", "probed", False, run.output.shape[-1], run.inputs.shape[-1])
        try:
            with frozen(self._module):
                return fits(reader.read(), run.inputs, run.output)
        except (ValueError, TypeError, RuntimeError):
            return False

    def _may_make(self, run: Run, leaf: Tensor) -> bool:
        output = class_last(run.layer, run.output)
        return output.shape[-1] > 1 and follows(leaf, output, either=True)

    def _leads_to(self, run: Run, name: str) -> bool:
        """Whether a part of the output also follows from what a layer's output is replaced by."""
        if any(
            other.inputs is run.output and any(True for _ in (*other.layer.parameters(), *other.layer.buffers()))
            for other in self._seen.runs
        ):
            return False  # A norm after the head, say, which need not change anything before training.
        seen = observe(self._module, self._call, {run.layer: pattern})
        own, leaf = seen.of(run.layer), seen.leaves.get(name)
        return bool(own) and leaf is not None and follows(leaf, class_last(run.layer, own[-1].output), either=True)

    def _outermost(self, layers: list[nn.Module]) -> list[nn.Module]:
        return [layer for layer in layers if not any(layer in set(o.modules()) for o in layers if o is not layer)]

    def _innermost(self, layers: list[nn.Module]) -> list[nn.Module]:
        return [layer for layer in layers if not any(o in set(layer.modules()) for o in layers if o is not layer)]

    def _feeds(self, layer: nn.Module, other: nn.Module) -> bool:
        seen = observe(self._module, self._call, {layer: pattern})
        before, after = self._seen.of(other), seen.of(other)
        return len(before) != len(after) or any(
            not torch.equal(a.inputs, b.inputs) for a, b in zip(before, after, strict=True)
        )

    def _has_place_for_labels(self, layer: nn.Module) -> bool:
        output = class_last(layer, self._seen.of(layer)[-1].output)
        rows, labels = output.shape[:-1], self._labels
        fits_shape = labels is None or labels.shape in (rows, rows[:1], torch.Size([*rows[:1], 1]))
        return fits_shape and output.shape[-1] > max(self._most, 1)

    def _check_influence(self, layer: nn.Module, explained: set[str]) -> None:
        """Refuse a layer that other parts of the output are made from in another way: the head comes after it."""
        others = {n: leaf for n, leaf in self._seen.leaves.items() if leaf.ndim > 1 and n not in explained}
        if not others:
            return
        seen = observe(self._module, self._call, {layer: pattern})
        output = class_last(layer, seen.of(layer)[-1].output)
        for name, leaf in others.items():
            new = seen.leaves.get(name)
            if new is not None and not torch.equal(new, leaf) and not follows(new, output, either=True):
                raise UserError(
                    f"cannot tell which layer of {self._title} is the head: the output of {self._names[layer]!r} is a "
                    f"part of the output of the model, and the part {name!r} is made from it in a further way. "
                    f"{self._layers()} {REPAIRS}"
                )

    # Words.

    @property
    def _title(self) -> str:
        return type(self._module).__name__

    def _layers(self) -> str:
        """Say which layers ran, and what the model returned."""
        ran: dict[str, str] = {}
        for run in self._seen.runs:
            if has_weight(run.layer):
                ran[self._names[run.layer]] = f"{self._names[run.layer]!r} with output {tuple(run.output.shape)}"
        idle = [repr(name) for child, name in self._names.items() if name not in ran and has_weight(child)]
        listed = list(ran.values())
        more = f" and {len(listed) - _MOST_LISTED} before" if len(listed) > _MOST_LISTED else ""
        outputs = ", ".join(f"{name or 'a tensor'} {tuple(t.shape)}" for name, t in self._seen.leaves.items())
        return (
            f"Layers with a weight that ran are: {', '.join(listed[-_MOST_LISTED:]) or 'none'}{more}"
            + (f"; that did not run: {', '.join(idle[-_MOST_LISTED:])}" if idle else "")
            + f". The model returned {outputs or 'no floating tensor'}."
        )


def _unpaired(name: str, features: tuple[int, ...], labels: torch.Size) -> str:
    return (
        f"there must be one label per feature row, got features of shape {features} at the head {name!r} and labels of "
        f"shape {tuple(labels)}: pass batch_fn=(batch) -> (inputs, labels) with labels of shape {features[:-1]}, "
        "ignore_index where a position has none."
    )
