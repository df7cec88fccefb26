"""Counts of the decisions of the network and of the nearest class centre classifier, class by class (NC4)."""

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
    """Counts of decisions, each ``(K,)`` by the class of the samples.

    Attributes:
        samples: Number of samples.
        num_invalid: Number of samples whose label is outside ``0..K-1``, scalar.
        ncc_right: Number of samples whose nearest class mean is that of their label.
        right: Number of samples that the network classifies rightly; None without a head.
        mismatched: Number of samples on which network and nearest class centre disagree; None without a head.
        margin: Sum of :func:`nclightning.functional.cosine_margin`; None without a head.
    """

    samples: Tensor
    num_invalid: Tensor
    ncc_right: Tensor
    right: Tensor | None = None
    mismatched: Tensor | None = None
    margin: Tensor | None = None

    def merge(self, other: Decisions) -> Decisions:
        """Add the counts of other samples. Both must be with a head, or both without one."""
        pairs = zip(self, other, strict=True)
        return Decisions(*(one if one is None or more is None else one + more for one, more in pairs))  # type: ignore[arg-type]


def count_decisions(
    features: Tensor, labels: Tensor, reference: ClassStatistics, head: HeadSource | None, ignore_index: int | None
) -> Decisions:
    """Count the decisions about a batch.

    Args:
        features: ``(B, d)``.
        labels: ``(B,)`` int64.
        reference: Statistics with the class means.
        head: The head with its bias, or None.
        ignore_index: Label of samples to leave out.
    """
    num_classes = len(reference.counts)
    known_head = None if head is None else read_head(head)
    valid = (labels >= 0) & (labels < num_classes)
    invalid = valid.logical_not()
    if ignore_index is not None:
        valid, invalid = valid & (labels != ignore_index), invalid & (labels != ignore_index)
    # Samples to leave out go to an additional bin K.
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
    """Return the totals by the names of the measures that they give when divided by the number of samples.

    Args:
        counted: Counts of all samples.

    Returns:
        Float64 ``(K,)`` by name; without a head only ``ncc_accuracy``.
    """
    totals = {
        "ncc_accuracy": counted.ncc_right,
        "ncc_mismatch": counted.mismatched,
        "accuracy": counted.right,
        "cosine_margin": counted.margin,
    }
    return {name: total.double() for name, total in totals.items() if total is not None}
