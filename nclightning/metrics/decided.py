"""Decisions of network and nearest class centre, counted class by class (NC4)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nclightning.functional import ClassStatistics, cosine_margin, nearest_class_centre
from nclightning.functional.decisions import decide
from nclightning.functional.linear import product
from nclightning.heads import HeadSource, read_head

__all__ = ["Decisions", "count_decisions", "totals_of"]


class Decisions(NamedTuple):
    """What was decided about samples, each ``(K,)`` by their class.

    Attributes:
        samples: How many.
        num_invalid: Samples whose label was outside ``0..K-1``, scalar.
        ncc_right: Those whose nearest centre is the label.
        right: Those whose label is the network's class; None without a head, as are the next two.
        mismatched: Those whose nearest centre is not the network's class.
        margin: Sum of :func:`nclightning.functional.cosine_margin`.
    """

    samples: Tensor
    num_invalid: Tensor
    ncc_right: Tensor
    right: Tensor | None = None
    mismatched: Tensor | None = None
    margin: Tensor | None = None

    def merge(self, other: Decisions) -> Decisions:
        """Add what was counted of other samples, with a head or without one like here."""
        pairs = zip(self, other, strict=True)
        return Decisions(*(one if one is None or more is None else one + more for one, more in pairs))  # type: ignore[arg-type]


def count_decisions(
    features: Tensor, labels: Tensor, reference: ClassStatistics, head: HeadSource | None, ignore_index: int | None
) -> Decisions:
    """Count the decisions about a batch.

    Args:
        features: ``(B, d)``.
        labels: ``(B,)`` int64.
        reference: Statistics whose means are the centres.
        head: The head with its bias, or None.
        ignore_index: Label of samples to leave out.
    """
    num_classes = len(reference.counts)
    known_head = None if head is None else read_head(head)
    valid = (labels >= 0) & (labels < num_classes)
    invalid = valid.logical_not()
    if ignore_index is not None:
        valid, invalid = valid & (labels != ignore_index), invalid & (labels != ignore_index)
    # One bin more than classes takes the samples left out.
    index = torch.where(valid, labels, num_classes)

    def per_class(values: Tensor) -> Tensor:
        return values.new_zeros(num_classes + 1).index_add_(0, index, values).narrow(0, 0, num_classes)

    nearest = nearest_class_centre(features, reference)
    counted = Decisions(per_class(valid.long()), invalid.sum(), per_class((nearest == labels).long()))
    if known_head is None:
        return counted
    rows, known = features.detach().double(), torch.where(valid, labels, 0)
    logits, own, other = product(rows, known_head.weight.double())
    decided = decide(logits if known_head.bias is None else own * logits + other * known_head.bias.double())
    return counted._replace(
        right=per_class((decided == labels).long()),
        mismatched=per_class(((decided != nearest) | (nearest < 0)).long()),
        margin=per_class(cosine_margin(rows, known, known_head.weight, reference.global_mean())),
    )


def totals_of(counted: Decisions) -> dict[str, Tensor]:
    """Name what was counted as it is reported, once it is divided by the samples.

    Args:
        counted: Of all samples.

    Returns:
        Float64 ``(K,)`` by name; only the first without a head.
    """
    totals = {
        "ncc_accuracy": counted.ncc_right,
        "ncc_mismatch": counted.mismatched,
        "accuracy": counted.right,
        "cosine_margin": counted.margin,
    }
    return {name: total.double() for name, total in totals.items() if total is not None}
