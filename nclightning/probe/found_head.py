"""A head that was found, and the place of its features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nclightning.errors import UserError
from nclightning.heads import HeadReader
from nclightning.probe.agreement import Agreement, Link, logits_of, makes
from nclightning.probe.features import FeatureSource, Pooling, class_last
from nclightning.probe.observation import float_leaves, record

__all__ = ["POSITIONS", "REPAIRS", "FoundHead", "linearity_reason", "pairing_error", "single_output_hint"]

REPAIRS = (
    "Pass head= the dotted name of the head, the module itself, or a function (model) -> (weight, bias); or pass "
    "forward_fn=(module, inputs) -> output if the logits are not computed by forward."
)
POSITIONS = (
    "Pass forward_fn=(module, inputs) -> output that gives the head one feature row per sample, such as "
    "lambda m, x: m.head(m.features(x)[:, -1])."
)


@dataclass(frozen=True)
class FoundHead:
    """The head, and the place of its features.

    Attributes:
        reader: Reader of weight and bias.
        path: Name of the layer at which features are read.
        side: Whether features are the ``"input"`` or the ``"output"`` of this layer.
        pooling: How positions are reduced to samples.
        shape: Shape of the features of the first batch, one row per label.
        link: How the output of the model follows from the logits, if later batches must confirm it.
        identical: Whether the model returns the very tensor that the layer returned.
        exit: Name of the module that returns the linked part of the output; empty for the whole model, None if no
            module returns it.
        margin: Whether the layer changes the logit of the label, as losses with a margin do.
    """

    reader: HeadReader
    path: str
    side: str
    pooling: Pooling
    shape: torch.Size
    link: Link | None = None
    identical: bool = False
    exit: str | None = None
    margin: bool = False

    def source(self, module: nn.Module) -> FeatureSource:
        """Return the place of the features in a module."""
        layer = module.get_submodule(self.path)
        position = self.link.position if self.link is not None else None
        return FeatureSource(layer, self.side == "output", self.pooling, position, self.reader.normalizes)

    @property
    def varies(self) -> bool:
        """Whether the position of the features differs from sample to sample."""
        return self.pooling == "one" and self.link is not None and self.link.position is None

    @property
    def is_checked(self) -> bool:
        """Whether the output of the model is compared with the logits on each batch."""
        return self.link is not None and not self.identical and not self.margin

    def logits(self, module: nn.Module, rows: Tensor, raw_output: Tensor | None) -> Tensor | None:
        """Return the logits ``(..., K)``: the output of a layer, or what a head function makes of the features."""
        if self.reader.layer is None:
            return logits_of(self.reader.read(), rows)
        return None if raw_output is None else class_last(module.get_submodule(self.path), raw_output)

    def part_of(self, output: Any, exit_only: bool = False) -> Tensor | None:
        """Return the part of an output that follows from the logits.

        Args:
            output: Output of the model, or of the module :attr:`exit`.
            exit_only: Whether it is that of :attr:`exit`.
        """
        assert self.link is not None
        leaves = dict(float_leaves(output))
        return next(iter(leaves.values()), None) if exit_only and self.exit else leaves.get(self.link.part)

    def link_of(self, rows: Tensor) -> Link:
        """Return how the output follows from :meth:`logits`. Features of a head function may already be pooled."""
        assert self.link is not None
        pooled = self.reader.layer is None and self.pooling and rows.ndim == 2
        return self.link._replace(rows="same") if pooled else self.link

    def call_and_verify(self, module: nn.Module, call: Callable[[], Any]) -> Any:
        """Run the model, and check that the head is still what it was found to be.

        Before training, operations with no effect yet can hide that the output does not follow from the head.

        Args:
            module: The model, frozen.
            call: Function that runs the model.

        Returns:
            The output of the model.

        Raises:
            ValueError: If weight and bias no longer give the output of the layer, or the output of the model no longer
                follows from it.
        """
        layer = module.get_submodule(self.path)
        seen = record(module, [layer], call, once=True)
        if len(seen.runs) != 1 or self.margin:
            return seen.output  # The hooks at the features raise the error.
        run, head = seen.runs[0], self.reader.read()
        rows = run.output if self.side == "output" else class_last(layer, run.inputs)
        made = logits_of(head, rows) if self.reader.layer is None else class_last(layer, run.output)
        if not bool(made.isfinite().all(dim=-1).any()):
            return seen.output  # Logits that are not finite show nothing.
        agrees = self.reader.layer is None or makes(layer, head, rows, made)
        if agrees and self.link is not None:
            part = self.part_of(seen.output)
            agrees = part is not None and (torch.equal(part, made) or not bool(self.link.misses(part, made)))
        if not agrees:
            raise self.refusal(module)
        return seen.output

    def refusal(self, module: nn.Module) -> UserError:
        """Return the error for an output that no longer follows from the head."""
        name = self.reader.name
        if self.link is not None and self.link.rows == "mean":
            return UserError(
                f"the output of {type(module).__name__} was the mean over positions of the logits of the head {name!r} "
                "on the first batch but not on a later one, for example because positions are masked or one is chosen. "
                f"{POSITIONS}"
            )
        if self.link is not None and self.link.rows == "one":
            return UserError(
                f"the output of {type(module).__name__} was that of the logits of the head {name!r} at one position "
                f"per sample on the first batch, and on a later one the position cannot be determined. {POSITIONS}"
            )
        repairs = REPAIRS
        if self.reader.layer is not None:
            repairs = (
                f"Pass head={name!r} to measure the layer as it is, or a function (model) -> (weight, bias) of the "
                "logits as the loss sees them."
            )
        return UserError(
            f"the output of {type(module).__name__} followed from the head {name!r} on the first batch and no longer "
            "does: an operation after the head, such as an adapter of zeros, had no effect at first. "
            f"{repairs}"
        )


def pairing_error(
    name: str, features: tuple[int, ...], labels: torch.Size, per_sample: bool, agreement: Agreement
) -> str:
    """Return the message for labels that do not pair with the features at a head."""
    more = (
        " The output of the model is neither the mean of its logits over positions nor those of one position per "
        f"sample. {POSITIONS}"
        if per_sample
        else ""
    )
    return (
        f"there must be one label per feature row, got features of shape {features} at the head {name!r} and labels of "
        f"shape {tuple(labels)}: pass batch_fn=(batch) -> (inputs, labels) with labels of shape {features[:-1]}"
        f"{', ignore_index where a position has none' if agreement == 'factor' else ''}.{more}"
    )


def linearity_reason(agreement: Agreement) -> str:
    """Return the end of a sentence: why the output of a model must be that of its head, and what to do if not."""
    if agreement == "values":
        return (
            "and regression collapse is defined for predictions W h + b: a bound such as tanh, a scale or another term "
            "comes after it. Make a scale a part of the head, by head= a function (model) -> (weight, bias) whose "
            "W h + b is compared with the targets; undo a bound on both sides, by forward_fn=(module, inputs) -> "
            "W h + b and batch_fn=(batch) -> (inputs, targets) before the bound."
        )
    return (
        "and the optimum is known for a loss of W h + b: a temperature, a bias or another term comes after it. Make "
        "it a part of the head, by head= a function (model) -> (weight, bias) of the logits as the loss sees them."
    )


def single_output_hint(agreement: Agreement) -> str:
    """Return advice for a head with one output when its optimum is needed; else an empty text."""
    if agreement == "factor":
        return ""
    return (
        "For a head with one output and labels 0 and 1 use nclightning.metrics.Optimality('bce', head).update(features,"
        " labels). "
    )
