"""Detection of the head: the layer whose output is seen to be the output of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nclightning.errors import UserError, UserTypeError, nearest
from nclightning.heads import HeadReader, fits, has_more_than_a_weight, has_weight, pair_of, read_head
from nclightning.probe.agreement import Agreement, Link, follows, links, logits_of, makes, pattern
from nclightning.probe.effects import check_effects, check_functions, describe_layers
from nclightning.probe.features import Pooling, class_last
from nclightning.probe.found_head import REPAIRS, FoundHead, linearity_reason, pairing_error, single_output_hint
from nclightning.probe.observation import Observation, Run, observe
from nclightning.probe.sweep import frozen

__all__ = ["HeadArgument", "find_head"]

HeadArgument = str | nn.Module | Callable[[Any], Any] | None


def find_head(
    module: nn.Module,
    call: Callable[[], Any],
    head: HeadArgument = None,
    labels: Tensor | None = None,
    ignore_index: int | None = None,
    agreement: Agreement = "factor",
) -> tuple[FoundHead, Observation]:
    """Find the head of a model, and the place of its features, by running the model.

    If ``head`` is None, a layer is the head if a run shows one of two things. Either its output is the output of the
    model, or an element of it at any depth. Or the output follows from it by an operation that keeps the classes:
    log_softmax, softmax, sigmoid, a temperature, a squeeze, a cast, a mean over positions, or the choice of one
    position per sample. This must also be so when the layer's output, and parameters without effect at initialisation,
    get other values. Layers that feed another one, or have too few outputs for the labels, are left out.

    Args:
        module: The model.
        call: Function that runs the model on a batch.
        head: Dotted name, module, or function ``(model) -> (weight, bias)``; None to detect it.
        labels: Labels of the batch.
        ignore_index: Label of samples to leave out.
        agreement: How closely the output of the model must agree with the logits. With ``"factor"``, the output need
            not follow at all from the logits of a head that is named.

    Returns:
        The head, and the observed run.

    Raises:
        ValueError: If no layer was seen to be the head, or several were. The message lists the layers that ran.
        TypeError: If ``head`` has another type.
    """
    return _Search(module, call, labels, ignore_index, agreement).find(head)


class _Search:
    """The search for the head of one model on one batch."""

    def __init__(
        self,
        module: nn.Module,
        call: Callable[[], Any],
        labels: Tensor | None,
        ignored: int | None,
        agreement: Agreement,
    ) -> None:
        self._module, self._call, self._labels, self._agreement = module, call, labels, agreement
        self._explained_parts = set[str]()  # Parts of the output that follow from the detected head; empty for all.
        self._allows_single = agreement == "values"  # Whether the head may have a single output.
        self._names = {child: name for name, child in module.named_modules()}
        self._seen = observe(module, call)
        self._largest_label = -1  # Stays -1 if labels are not known.
        if labels is not None and labels.numel() and not labels.is_floating_point():
            counted = labels if ignored is None else labels[labels != ignored]
            self._largest_label = int(counted.max()) if counted.numel() else -1

    def find(self, head: HeadArgument) -> tuple[FoundHead, Observation]:
        """Return the head and the observed run, for any form of the argument ``head``."""
        if head is None:
            layer = self._detect()
        elif isinstance(head, str):
            named = dict(self._module.named_modules(remove_duplicate=False))
            if not head or head not in named:
                asked = nearest(head, named)
                raise UserError(f"no layer named head={head!r} in {self._title}.{asked} {self._layers()}")
            layer = named[head]
        elif isinstance(head, nn.Module):
            if head is self._module or head not in self._names:
                raise UserError(
                    f"head= is a {type(head).__name__} that is not a part of {self._title}. {self._layers()}"
                )
            layer = head
        elif callable(head):
            return self._find_function(head), self._seen
        else:
            raise UserTypeError(
                "head must be a dotted name, a module, a function (model) -> (weight, bias) or None, got "
                f"{type(head).__name__}."
            )
        return self._check_layer(layer, named=head is not None), self._seen

    # A layer that is known to be the head.

    def _check_layer(self, layer: nn.Module, named: bool) -> FoundHead:
        """Return a layer as the head, after all checks."""
        name, runs = self._names[layer], self._seen.of(layer)
        if len(runs) != 1:
            what = "did not run" if not runs else f"ran {len(runs)} times"
            raise UserError(
                f"the head {name!r} of {self._title} {what} in one forward, expected once: features and logits would "
                f"not belong together. {self._layers()} Pass forward_fn=(module, inputs) -> output that runs the "
                "head once, or head= another layer."
            )
        run = runs[0]
        features, output = class_last(layer, run.inputs), class_last(layer, run.output)
        if output.shape[-1] < 2 and not self._allows_single:
            raise UserError(
                f"the head {name!r} of {self._title} has one output, and neural collapse compares at least two "
                f"classes: train with an output for each class. {single_output_hint(self._agreement)}{self._layers()}"
            )
        reader, margin = self._make_reader(layer, name, features, output, named)
        pooling, link = self._pair(layer, features.shape[:-1], reader, named, margin)
        identical = link is not None and self._seen.leaves[link.part] is run.raw_output and not pooling
        if link is not None and not margin:
            identical = identical and torch.equal(run.raw_output, run.output)
            if not named or self._agreement != "factor":
                check_effects(self._module, self._call, layer, name, link, identical)
        shape = features.shape[:1] + features.shape[-1:] if pooling else features.shape
        return FoundHead(reader, name, "input", pooling, shape, link, identical, self._name_exit(layer, link), margin)

    def _make_reader(
        self, layer: nn.Module, name: str, features: Tensor, output: Tensor, named: bool
    ) -> tuple[HeadReader, bool]:
        """Return a reader of the layer's weight that reproduces its output, and whether it has a margin."""
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
            "as W h + b nor as the cosines of h with the rows of its weight, so that it has no weight that could be "
            f"measured. {self._layers()} {REPAIRS}"
        )

    def _pair(
        self, layer: nn.Module, rows: torch.Size, reader: HeadReader, named: bool, margin: bool
    ) -> tuple[Pooling, Link | None]:
        """Return how positions are reduced to samples, and how the output follows if later batches must confirm it."""
        shape = None if self._labels is None else self._labels.shape
        per_sample = len(rows) > 1 and shape != rows and self._are_per_sample(rows)
        link = None if margin else self._find_link(layer, per_sample, named and not per_sample)
        pooled: Pooling = ""
        if per_sample and link is not None and not (reader.normalizes and link.rows == "mean" and rows[1:].numel() > 1):
            pooled = "one" if link.rows == "one" else "mean"
        elif per_sample and rows[1:].numel() == 1:  # A single position: there is nothing to choose from.
            pooled, link = "mean", None
        elif shape is not None and shape not in (rows, torch.Size([*rows, 1])):
            raise UserError(pairing_error(reader.name, (*rows, reader.in_features), shape, per_sample, self._agreement))
        if self._agreement != "factor" and not margin:
            if link is None or link.agreement not in ("equal", self._agreement):
                raise UserError(
                    f"the output of {self._title} is not W h + b of the head {reader.name!r}, "
                    f"{linearity_reason(self._agreement)}"
                )
        elif named and not pooled:
            link = None
        return pooled, None if link is None else link._replace(agreement=self._agreement)

    def _are_per_sample(self, rows: torch.Size) -> bool:
        """Return whether there is one label per sample, although rows have positions."""
        return self._labels is None or self._labels.shape in (rows[:1], torch.Size([*rows[:1], 1]))

    def _find_link(self, layer: nn.Module, per_sample: bool, only_actual: bool) -> Link | None:
        """Return how the output of the model follows from that of a layer, or None.

        With ``only_actual``, only the actual run counts. Otherwise a run is tried first in which the output of the
        layer is replaced by a pattern, because no two logits are then equal by chance.
        """
        for seen in [self._seen] if only_actual else [observe(self._module, self._call, {layer: pattern}), self._seen]:
            leaves = {
                n: leaf for n, leaf in seen.leaves.items() if not self._explained_parts or n in self._explained_parts
            }
            own = seen.of(layer)
            if own and (found := self._closest(leaves, class_last(layer, own[-1].output), per_sample)) is not None:
                return found
            if per_sample:  # Actual logits may be the same at several positions.
                return None
        return None

    def _closest(self, leaves: Mapping[str, Tensor], logits: Tensor, per_sample: bool) -> Link | None:
        """Return the link from logits to a part of the output with the closest agreement; None if there is none."""
        found = links(leaves, logits, per_sample, single=self._allows_single)
        return min(found, key=lambda link: ("equal", "shift", "factor").index(link.agreement), default=None)

    def _name_exit(self, layer: nn.Module, link: Link | None) -> str | None:
        """Return the name of the innermost module around a layer that returns the same part of the output."""
        if link is None:
            return None
        leaf = self._seen.leaves[link.part]
        around = [
            r.layer for r in self._seen.runs if r.raw_output is leaf and layer in set(r.layer.modules()) - {r.layer}
        ]
        return self._names[around[0]] if around else "" if self._seen.whole else None

    # A head that is a function of the model.

    def _find_function(self, head: Callable[[Any], Any]) -> FoundHead:
        """Return the head of a function that returns weight and bias, with the place of its features."""

        def pair() -> Any:
            return head(self._module)

        name = getattr(head, "__name__", "head")
        with frozen(self._module):
            weight = read_head(pair_of(pair()))
        sizes = weight.out_features, weight.in_features
        shape, unpaired = None if self._labels is None else self._labels.shape, None
        for normalizes in (False, True):
            reader = HeadReader(pair, name, "weight", normalizes, *sizes)
            with frozen(self._module):
                own = reader.read()
            for run in reversed(self._seen.runs):
                for side, rows in (("output", run.output), ("input", class_last(run.layer, run.inputs))):
                    if rows.shape[-1] != own.in_features:
                        continue
                    places = rows.shape[:-1]
                    per_sample = len(places) > 1 and shape != places and self._are_per_sample(places)
                    found = self._closest(self._seen.leaves, logits_of(own, rows), per_sample)
                    if found is None or (normalizes and found.rows == "mean"):
                        if per_sample and any(links(self._seen.leaves, logits_of(own, rows))):
                            unpaired = places
                        continue
                    if shape is not None and not per_sample and shape not in (places, torch.Size([*places, 1])):
                        unpaired = places
                        continue
                    if self._agreement != "factor" and found.agreement not in ("equal", self._agreement):
                        continue
                    pooling = found.rows if found.rows != "same" else ""
                    size = torch.Size([*(places[:1] if pooling else places), sizes[1]])
                    link, exit_ = found._replace(agreement=self._agreement), "" if self._seen.whole else None
                    return FoundHead(reader, self._names[run.layer], side, pooling, size, link, exit=exit_)
        if unpaired is not None:
            assert shape is not None
            per_sample = len(unpaired) > 1 and self._are_per_sample(unpaired)
            raise UserError(pairing_error(name, (*unpaired, sizes[1]), shape, per_sample, self._agreement))
        raise UserError(
            f"head= returned a weight of shape {sizes}, and no layer of {self._title} has an input or output h for "
            f"which the output of the model is W h + b. {self._layers()} Let the features go through a module of their "
            "own, such as nn.Identity(), right before the head is applied."
        )

    # Detection.

    def _detect(self) -> nn.Module:
        """Return the layer that is seen to be the head."""
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
            self._explained_parts = matches[layer]
            check_functions(self._module, self._seen, layer, self._explained_parts, self._largest_label)
            return layer
        if not matches:
            hint = single_output_hint(self._agreement) if self._may_have_one_output() else ""
            raise UserError(
                f"no layer of {self._title} was seen to be the head: none returns the output of the model, or "
                f"logits from which it follows by log_softmax, softmax, sigmoid, a temperature, a squeeze or a cast. "
                f"{hint}{self._layers()} {REPAIRS}"
            )
        raise UserError(
            f"cannot tell which layer of {self._title} is the head: the outputs of "
            f"{' and '.join(repr(self._names[layer]) for layer in matches)} are all parts of the output of the model. "
            f"{self._layers()} {REPAIRS}"
        )

    def _matches(self) -> dict[nn.Module, set[str]]:
        """Return the layers that make a part of the output, with the names of these parts."""
        leaves = {name: leaf for name, leaf in self._seen.leaves.items() if leaf.ndim > 0}
        matches: dict[nn.Module, set[str]] = {}
        for name, leaf in leaves.items():
            same = [run.layer for run in self._seen.runs if self._is_part(run, leaf) and self._is_linear(run)]
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

    def _is_part(self, run: Run, leaf: Tensor) -> bool:
        """Return whether a part of the output is the very tensor that a layer returned, with the same values."""
        return run.raw_output is leaf and (run.output is leaf or torch.equal(run.output, leaf))

    def _is_linear(self, run: Run) -> bool:
        """Return whether a layer has a weight, or wraps a layer with a weight that gets the same input."""
        if has_weight(run.layer):
            return True
        inner = set(run.layer.modules()) - {run.layer}
        if not any(
            other.layer in inner
            and other.raw_input is run.raw_input
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
        """Return whether a part of the output follows from the output of a layer in a run."""
        output = class_last(run.layer, run.output)
        return follows(leaf, output, either=True, single=self._allows_single)

    def _leads_to(self, run: Run, name: str) -> bool:
        """Return whether a part of the output still follows from a layer whose output is replaced by a pattern."""
        if any(
            other.raw_input is run.raw_output and any(True for _ in (*other.layer.parameters(), *other.layer.buffers()))
            for other in self._seen.runs
        ):
            return False  # For example a norm layer after the head, which may change nothing before training.
        seen = observe(self._module, self._call, {run.layer: pattern})
        own, leaf = seen.of(run.layer), seen.leaves.get(name)
        return bool(own) and leaf is not None and self._may_make(own[-1], leaf)

    def _outermost(self, layers: list[nn.Module]) -> list[nn.Module]:
        """Return the layers that are not inside another one of them."""
        return [layer for layer in layers if not any(layer in set(o.modules()) for o in layers if o is not layer)]

    def _innermost(self, layers: list[nn.Module]) -> list[nn.Module]:
        """Return the layers that do not contain another one of them."""
        return [layer for layer in layers if not any(o in set(layer.modules()) for o in layers if o is not layer)]

    def _feeds(self, layer: nn.Module, other: nn.Module) -> bool:
        """Return whether the output of a layer changes the input of another one."""
        seen = observe(self._module, self._call, {layer: pattern})
        before, after = self._seen.of(other), seen.of(other)
        return len(before) != len(after) or any(
            not torch.equal(a.inputs, b.inputs) for a, b in zip(before, after, strict=True)
        )

    def _has_place_for_labels(self, layer: nn.Module) -> bool:
        """Return whether the output of a layer has the rows and classes of the labels."""
        output = class_last(layer, self._seen.of(layer)[-1].output)
        rows, labels = output.shape[:-1], self._labels
        fits_shape = labels is None or labels.shape in (rows, rows[:1], torch.Size([*rows[:1], 1]))
        return fits_shape and output.shape[-1] > max(self._largest_label, 0 if self._allows_single else 1)

    def _check_influence(self, layer: nn.Module, explained: set[str]) -> None:
        """Raise if another part of the output depends on the layer in a different way: the head may come after it."""
        others = {n: leaf for n, leaf in self._seen.leaves.items() if leaf.ndim > 1 and n not in explained}
        if not others:
            return
        seen = observe(self._module, self._call, {layer: pattern})
        run = seen.of(layer)[-1]
        for name, leaf in others.items():
            new = seen.leaves.get(name)
            if new is not None and not torch.equal(new, leaf) and not self._may_make(run, new):
                raise UserError(
                    f"cannot tell which layer of {self._title} is the head: the output of {self._names[layer]!r} is a "
                    f"part of the output of the model, and the part {name!r} is computed from it in another way. "
                    f"{self._layers()} {REPAIRS}"
                )

    # Messages.

    @property
    def _title(self) -> str:
        return type(self._module).__name__

    def _may_have_one_output(self) -> bool:
        return not self._allows_single and all(
            leaf.ndim < 2 or leaf.shape[-1] == 1 for leaf in self._seen.leaves.values()
        )

    def _layers(self) -> str:
        return describe_layers(self._module, self._seen)
