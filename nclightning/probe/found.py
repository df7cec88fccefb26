"""A head that was found, and where its features arise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nclightning.errors import UserError
from nclightning.heads import HeadReader
from nclightning.probe.features import FeatureSource, Pooling, class_last
from nclightning.probe.likeness import Like, Link, logits_of, makes
from nclightning.probe.observation import float_leaves, record

__all__ = ["POSITIONS", "REPAIRS", "Found", "one_output", "unpaired_words", "why_linear"]

REPAIRS = (
    "Pass head= the dotted name of the head, the module itself, or a function (model) -> (weight, bias); or pass "
    "forward_fn=(module, inputs) -> output if the logits are made in another way than by forward."
)
POSITIONS = (
    "Pass forward_fn=(module, inputs) -> output that gives the head one feature row per sample, such as "
    "lambda m, x: m.head(m.features(x)[:, -1])."
)


@dataclass(frozen=True)
class Found:
    """The head, and where its features arise.

    Attributes:
        reader: Reads weight and bias.
        path: Name of the layer at which features are seen.
        side: Whether they are its ``"input"`` or ``"output"``.
        pooling: What becomes of their positions.
        shape: Of the features of the first batch, one row per label.
        link: How the output of the model follows from the logits, where that must hold.
        identical: Whether the output of the layer is that of the model itself.
        exit: Name of the module whose output it is; empty of the whole model, None if no module returns it.
        margin: Whether the layer changes the logit of the label.
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
        """Where features of a module arise."""
        layer = module.get_submodule(self.path)
        position = self.link.position if self.link is not None else None
        return FeatureSource(layer, self.side == "output", self.pooling, position, self.reader.normalizes)

    @property
    def varies(self) -> bool:
        """Whether features are of a position that is another for each sample."""
        return self.pooling == "one" and self.link is not None and self.link.position is None

    @property
    def is_checked(self) -> bool:
        """Whether each batch is to be compared with the output of the model."""
        return self.link is not None and not self.identical and not self.margin

    def logits(self, module: nn.Module, rows: Tensor, went: Tensor | None) -> Tensor | None:
        """What the head made, ``(..., K)``: of a layer what came out of it, of a function what it makes of rows."""
        if self.reader.layer is None:
            return logits_of(self.reader.read(), rows)
        return None if went is None else class_last(module.get_submodule(self.path), went)

    def part_of(self, output: Any, exit_only: bool = False) -> Tensor | None:
        """Return the part of an output that follows from the logits.

        Args:
            output: Of the model; or of the module :attr:`exit`.
            exit_only: Whether it is the latter.
        """
        assert self.link is not None
        leaves = dict(float_leaves(output))
        return next(iter(leaves.values()), None) if exit_only and self.exit else leaves.get(self.link.part)

    def link_of(self, rows: Tensor) -> Link:
        """How the output follows from :meth:`logits` of rows: of a function's, which are pooled already, plainly."""
        assert self.link is not None
        pooled = self.reader.layer is None and self.pooling and rows.ndim == 2
        return self.link._replace(rows="same") if pooled else self.link

    def call_again(self, module: nn.Module, call: Callable[[], Any]) -> Any:
        """Run the model, and see whether the head is what it was found to be: before training much looks alike.

        Args:
            module: The model, frozen.
            call: Runs it.

        Returns:
            What the model returned.

        Raises:
            ValueError: If the layer does not make its output by weight and bias any more, or the output of the model
                does not follow from it.
        """
        layer = module.get_submodule(self.path)
        seen = record(module, [layer], call, once=True)
        if len(seen.runs) != 1 or self.margin:
            return seen.output  # The hooks at the features say so.
        run, head = seen.runs[0], self.reader.read()
        rows = run.output if self.side == "output" else class_last(layer, run.inputs)
        made = logits_of(head, rows) if self.reader.layer is None else class_last(layer, run.output)
        if not bool(made.isfinite().all(dim=-1).any()):
            return seen.output  # Nothing is seen of logits that are not finite.
        holds = self.reader.layer is None or makes(layer, head, rows, made)
        if holds and self.link is not None:
            part = self.part_of(seen.output)
            holds = part is not None and (torch.equal(part, made) or not bool(self.link.misses(part, made)))
        if not holds:
            raise self.refusal(module)
        return seen.output

    def refusal(self, module: nn.Module) -> UserError:
        """Say that what was found does not hold any more."""
        name = self.reader.name
        if self.link is not None and self.link.rows == "mean":
            return UserError(
                f"the output of {type(module).__name__} was the mean over positions of what the head {name!r} makes on "
                "the first batch, and is not on a later one, as where positions are masked or one is chosen. "
                f"{POSITIONS}"
            )
        if self.link is not None and self.link.rows == "one":
            return UserError(
                f"the output of {type(module).__name__} is made of the logits of the head {name!r} at one position per "
                f"sample on the first batch, and on a later one that cannot be told. {POSITIONS}"
            )
        repairs = REPAIRS
        if self.reader.layer is not None:
            repairs = (
                f"Pass head={name!r} to measure the layer as it is, or a function (model) -> (weight, bias) of the "
                "logits as the loss sees them."
            )
        return UserError(
            f"the output of {type(module).__name__} followed from the head {name!r} on the first batch "
            "and does not any more: something that starts without effect, such as an adapter of zeros, comes "
            f"between. {repairs}"
        )


def unpaired_words(name: str, features: tuple[int, ...], labels: torch.Size, per_sample: bool, like: Like) -> str:
    """Say that labels do not pair with the features at a head, and what to do."""
    more = (
        " The output of the model is neither the mean of its logits over positions nor those of one position per "
        f"sample. {POSITIONS}"
        if per_sample
        else ""
    )
    return (
        f"there must be one label per feature row, got features of shape {features} at the head {name!r} and labels of "
        f"shape {tuple(labels)}: pass batch_fn=(batch) -> (inputs, labels) with labels of shape {features[:-1]}"
        f"{', ignore_index where a position has none' if like == 'factor' else ''}.{more}"
    )


def why_linear(like: Like) -> str:
    """Say why the output of a model must be that of its head, and what to do where it is not."""
    if like == "values":
        return (
            "and regression collapse is about a head that predicts targets by that alone: a bound such as tanh, a "
            "scale or another term comes after it. Make a scale a part of the head, as with head= a function (model) "
            "-> (weight, bias) of what is compared with the targets; take a bound back on both sides, by "
            "forward_fn=(module, inputs) -> W h + b and batch_fn=(batch) -> (inputs, targets) before the bound."
        )
    return (
        "and the optimum is known of a loss of that alone: a temperature, a bias or another term comes after it. Make "
        "it a part of the head, as with head= a function (model) -> (weight, bias) of the logits as the loss sees them."
    )


def one_output(like: Like) -> str:
    """Say what reads a head with one output where its optimum is asked for."""
    if like == "factor":
        return ""
    return (
        "Of a head with one output nclightning.metrics.Optimality('bce', head).update(features, labels) reads labels 0 "
        "and 1. "
    )
