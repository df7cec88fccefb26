"""A head that was found, and where its features arise."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nclightning.errors import UserError
from nclightning.features import FeatureSource, class_last
from nclightning.heads import HeadReader
from nclightning.likeness import follows, follows_from, makes
from nclightning.observation import Run, float_leaves, recording

__all__ = ["REPAIRS", "Found"]

REPAIRS = (
    "Pass head= the dotted name of the head, the module itself, or a function (model) -> (weight, bias); or pass "
    "forward_fn=(module, inputs) -> output if the logits are made in another way than by forward."
)


@dataclass(frozen=True)
class Found:
    """The head, and where its features arise.

    Attributes:
        reader: Reads weight and bias.
        path: Name of the layer at which features are seen.
        side: Whether they are its ``"input"`` or ``"output"``.
        pooled: Whether they are averaged over positions.
        shape: Of the features of the first batch, one row per label.
        part: Where in the output of the model the logits were seen; None if the user named the head.
        margin: Whether the layer changes the logit of the label.
    """

    reader: HeadReader
    path: str
    side: str
    pooled: bool
    shape: torch.Size
    part: str | None = None
    margin: bool = False

    def source(self, module: nn.Module) -> FeatureSource:
        """Where features of a module arise."""
        layer = module.get_submodule(self.path)
        return FeatureSource(layer, self.side == "output", self.pooled, self.reader.normalizes)

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
        layer, runs = module.get_submodule(self.path), list[Run]()
        with ExitStack() as stack:
            stack.callback(layer.register_forward_hook(recording(runs), with_kwargs=True).remove)
            output = call()
        if len(runs) != 1 or self.margin:
            return output  # The hooks at the features say so.
        head, leaves = self.reader.read(), dict(float_leaves(output))
        if self.reader.layer is None:
            rows = runs[0].output if self.side == "output" else class_last(layer, runs[0].inputs)
            if not bool(rows.isfinite().all(dim=-1).any()):
                return output
            holds = follows_from(leaves, rows, head)
        else:
            rows, made = class_last(layer, runs[0].inputs), class_last(layer, runs[0].output)
            if not bool(made.isfinite().all(dim=-1).any()):
                return output  # Nothing is seen of logits that are not finite.
            holds = makes(layer, head, rows, made)
            if self.part is not None and (leaf := leaves.get(self.part)) is not runs[0].output:
                holds = holds and leaf is not None and follows(leaf, made, either=True)
        if not holds:
            raise UserError(
                f"the output of {type(module).__name__} followed from the head {self.reader.name!r} on the first batch "
                "and does not any more: something that starts without effect, such as an adapter of zeros, comes "
                f"between. {REPAIRS}"
            )
        return output
