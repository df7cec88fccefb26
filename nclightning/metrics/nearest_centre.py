"""NC4 as a torchmetrics class: the decisions of the network and of the nearest class centre classifier."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nclightning.errors import UserError
from nclightning.functional import ClassStatistics
from nclightning.heads import HeadSource, weight_shape
from nclightning.metrics.base import StreamingMetric, without_autocast
from nclightning.metrics.borrowed import Borrowed
from nclightning.metrics.compute_groups import separate_compute_group
from nclightning.metrics.decided import Decisions, count_decisions, totals_of

__all__ = ["NearestClassCentre"]

_COUNTS = ("samples", "ncc_right", "right", "mismatched", "num_invalid")


class NearestClassCentre(StreamingMetric):
    """Accuracy of the network and of the nearest class centre classifier (NC4).

    ``update`` takes ``features (B, d)`` and ``labels (B,)`` int64. ``compute`` returns float64 scalars:

    * ``ncc_accuracy``: the share of samples whose nearest class mean is that of their label.
    * ``ncc_mismatch``: the share of samples on which the network and the nearest class centre disagree.
    * ``accuracy``: the share of samples that the network classifies rightly.
    * ``cosine_margin``: the mean of :func:`nclightning.functional.cosine_margin`, with the reference's global mean.

    Without a head only the first is returned. All are ``nan`` before the first sample. At collapse the first and third
    are 1 and the second is 0. Counts are summed over processes. A sample whose features are not finite counts as wrong
    for both classifiers, and as a disagreement.

    Args:
        reference: Statistics with the class means, usually those of the training set.
        head: The head with its bias, as for :class:`nclightning.metrics.NeuralCollapse`; None for no head.
        ignore_index: Label of samples to leave out.
        **kwargs: Passed to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If the head does not fit the reference. Also raised by ``compute``, if a label is outside
            ``0..K-1``.

    Example:
        >>> import torch
        >>> from nclightning.functional import class_statistics
        >>> from nclightning.metrics import NearestClassCentre
        >>> reference = class_statistics(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]), num_classes=2)
        >>> metric = NearestClassCentre(reference, head=torch.tensor([[1.0, 0.0], [0.5, 0.0]]))
        >>> metric.update(torch.tensor([[2.0, 1.0], [1.0, 3.0]]), torch.tensor([0, 1]))
        >>> {name: float(value) for name, value in metric.compute().items() if name != "cosine_margin"}
        {'ncc_accuracy': 1.0, 'ncc_mismatch': 0.5, 'accuracy': 0.5}
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
        separate_compute_group(self)

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
        """Compute the shares over all samples.

        Returns:
            Float64 scalars by name.
        """
        self._check()
        samples = self.samples.sum()
        return {name: (total.sum() / samples).double() for name, total in self._totals().items()}

    def per_class(self) -> dict[str, Tensor]:
        """Compute the shares for each class.

        Returns:
            Float64 vectors ``(K,)`` by name; ``nan`` for a class without samples.
        """
        self._check()
        return {name: (total / self.samples).double() for name, total in self._totals().items()}

    def merge_states(self, earlier: dict[str, Any]) -> None:
        """Add the counts of earlier states."""
        for name in (*_COUNTS, "margin"):
            setattr(self, name, getattr(self, name) + earlier[name])

    def _totals(self) -> dict[str, Tensor]:
        """Return the counts that are divided by the number of samples, by name."""
        counted = Decisions(self.samples, self.num_invalid, self.ncc_right)
        if self._head.get() is not None:
            counted = counted._replace(right=self.right, mismatched=self.mismatched, margin=self.margin)
        return totals_of(counted)

    def _check(self) -> None:
        """Raise an error if there were invalid labels."""
        if int(self.num_invalid) > 0:
            raise UserError(
                f"{int(self.num_invalid)} labels were outside 0..{len(self.reference.counts) - 1}. "
                "Set ignore_index, or drop these samples before update."
            )
