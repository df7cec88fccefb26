"""Decisions of network and nearest class centre as one streaming metric."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nclightning.errors import UserError
from nclightning.functional import ClassStatistics
from nclightning.heads import HeadSource, weight_shape
from nclightning.metrics.base import StreamingMetric, without_autocast
from nclightning.metrics.borrowed import Borrowed
from nclightning.metrics.decided import Decisions, count_decisions, totals_of
from nclightning.metrics.groups import stand_apart

__all__ = ["NearestClassCentre"]

_COUNTS = ("samples", "ncc_right", "right", "mismatched", "num_invalid")


class NearestClassCentre(StreamingMetric):
    """How a network and the nearest class centre decide (NC4), by streaming counts.

    ``update`` accepts ``features (B, d)`` and ``labels (B,)`` int64; ``compute`` returns float64 scalars:

    | name | value |
    |---|---|
    | ``ncc_accuracy`` | share of samples whose nearest centre is the label |
    | ``ncc_mismatch`` | share of samples whose nearest centre is not the network's class |
    | ``accuracy`` | share of samples whose label is the network's class |
    | ``cosine_margin`` | mean of :func:`nclightning.functional.cosine_margin` around the reference's mean |

    all ``nan`` before the first sample; only the first without a head. Counts add up over processes. A sample whose
    features are not finite counts as decided wrongly by both, and as mismatched.

    Args:
        reference: Statistics whose means are the centres, usually those of the training set.
        head: The head with its bias, as for :class:`nclightning.metrics.NeuralCollapse`; None leaves out what needs it.
        ignore_index: Label of samples to leave out.
        **kwargs: Passed to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If the head does not fit; at ``compute``, if a label was outside ``0..K-1``.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    samples: Tensor
    ncc_right: Tensor
    right: Tensor
    mismatched: Tensor
    margin: Tensor
    num_invalid: Tensor

    def __init__(
        self,
        reference: ClassStatistics,
        head: HeadSource | None = None,
        ignore_index: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if head is not None and (shape := weight_shape(head)) != tuple(reference.means.shape):
            raise UserError(
                f"head must have a weight of shape {tuple(reference.means.shape)} like the reference, got {shape}."
            )
        self.reference = reference
        self.ignore_index = ignore_index
        self._head = Borrowed(head)
        for name in _COUNTS:
            shape = () if name == "num_invalid" else (len(reference.counts),)
            self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("margin", torch.zeros(len(reference.counts), dtype=torch.float64), dist_reduce_fx="sum")
        stand_apart(self)

    @without_autocast
    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            features: ``(B, d)``.
            labels: ``(B,)`` int64.
        """
        counted = count_decisions(features, labels, self.reference, self._head.get(), self.ignore_index)
        for name, value in counted._asdict().items():
            if value is not None:
                setattr(self, name, getattr(self, name) + value)

    def compute(self) -> dict[str, Tensor]:
        """Read the shares over all samples.

        Returns:
            Float64 scalars by name.
        """
        self._check()
        samples = self.samples.sum()
        return {name: (total.sum() / samples).double() for name, total in self._totals().items()}

    def per_class(self) -> dict[str, Tensor]:
        """Read the shares class by class.

        Returns:
            Float64 vectors ``(K,)`` by name; ``nan`` for a class without samples.
        """
        self._check()
        return {name: (total / self.samples).double() for name, total in self._totals().items()}

    def merge_states(self, earlier: dict[str, Any]) -> None:
        """Add what was counted."""
        for name in (*_COUNTS, "margin"):
            setattr(self, name, getattr(self, name) + earlier[name])

    def _totals(self) -> dict[str, Tensor]:
        counted = Decisions(self.samples, self.num_invalid, self.ncc_right)
        if self._head.get() is not None:
            counted = counted._replace(right=self.right, mismatched=self.mismatched, margin=self.margin)
        return totals_of(counted)

    def _check(self) -> None:
        if int(self.num_invalid) > 0:
            raise UserError(
                f"{int(self.num_invalid)} labels were outside 0..{len(self.reference.counts) - 1}. "
                "Set ignore_index, or drop these samples before update."
            )
