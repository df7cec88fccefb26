"""A buffer that computes class statistics batch by batch: recent samples are stored, earlier ones are in totals."""

from __future__ import annotations

import torch
from torch import Tensor

from nclightning.errors import UserError, UserTypeError
from nclightning.functional.samples import Samples
from nclightning.functional.statistics import ClassStatistics

__all__ = ["StatisticsBuffer", "class_statistics"]


class StatisticsBuffer:
    """Accumulates labelled features batch by batch, on their device and without a transfer to the host.

    Samples are stored until there are many of them; then they are folded into running totals. So the cost of a batch
    does not grow with the number of batches. Tensors are replaced and never modified in place: statistics that were
    taken from the buffer do not change when more samples are added.

    Args:
        statistics: Statistics to start from, such as ``ClassStatistics.empty(num_classes, feature_dim)``.

    Attributes:
        totals: Moments of the samples that are no longer stored.
        kept: The stored samples.
        num_invalid: Number of samples whose label is outside ``0..K-1``, int64 scalar. No other statistic includes
            them.

    Example:
        >>> import torch
        >>> from nclightning.functional import ClassStatistics, StatisticsBuffer
        >>> buffer = StatisticsBuffer(ClassStatistics.empty(num_classes=2, feature_dim=3))
        >>> buffer.add(torch.ones(4, 3), torch.tensor([0, 0, 1, 0]))
        >>> buffer.statistics.counts
        tensor([3., 1.], dtype=torch.float64)
    """

    def __init__(self, statistics: ClassStatistics) -> None:
        self.totals, self.kept, self.num_invalid = statistics.totals, statistics.kept, statistics.num_invalid

    @property
    def statistics(self) -> ClassStatistics:
        """Statistics of all samples so far."""
        return ClassStatistics(self.totals, self.num_invalid, self.kept)

    def add(self, features: Tensor, labels: Tensor, ignore_index: int | None = None, *, copy: bool = True) -> None:
        """Add samples.

        Args:
            features: ``(N, d)`` of any floating dtype.
            labels: ``(N,)`` int64. A sample with a label outside ``0..K-1`` is counted in ``num_invalid`` and left out.
            ignore_index: Label of samples to leave out without counting them as invalid.
            copy: False stores the tensor itself. It must then stay unchanged as long as the statistics are used.

        Raises:
            ValueError: If a shape does not fit.
            TypeError: If features are not floating or labels not int64.
        """
        num_classes, dim = self.totals.means.shape
        _check(features, labels)
        if features.shape[1] != dim:
            raise UserError(f"features must have shape (N, {dim}), got {tuple(features.shape)}.")
        if not labels.numel():
            return  # An empty batch would be stored as one more tensor.
        invalid = labels.clamp(0, num_classes - 1) != labels
        left_out = invalid
        if ignore_index is not None:
            ignored = labels == ignore_index
            left_out, invalid = invalid | ignored, invalid & ~ignored
        self.num_invalid = self.num_invalid + invalid.sum()
        # Samples to leave out go to an additional bin K: selecting them would need a transfer to the host.
        index, features = labels.masked_fill(left_out, num_classes), features.detach()
        if not self._can_keep(self.kept.join(Samples((features,), (index,)))):
            self.fold()
        self.kept = self.kept.append(features.clone() if copy else features, index)
        if not self._can_keep(self.kept):
            self.fold()

    def fold(self) -> None:
        """Move all stored samples into the running totals."""
        self.totals, self.kept = self.statistics.folded.totals, Samples()

    def _can_keep(self, samples: Samples) -> bool:
        """Whether samples may stay stored instead of being folded."""
        return samples.are_worth_keeping(len(self.totals.counts), light=self.totals.root is None)


def class_statistics(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    dtype: torch.dtype = torch.float64,
    *,
    scatter: bool = True,
    ignore_index: int | None = None,
    copy: bool = True,
) -> ClassStatistics:
    """Compute the statistics of a set of samples, on its device, without a host transfer.

    Args:
        features: ``(N, d)`` of any floating dtype.
        labels: ``(N,)`` int64. A sample with a label outside ``0..K-1`` is counted in ``num_invalid`` and left out.
        num_classes: K, at least 1.
        dtype: Dtype of accumulation and result, float64 or float32.
        scatter: False makes light statistics, without the ``(d, d)`` scatter.
        ignore_index: Label of samples to leave out without counting them as invalid.
        copy: As for :meth:`StatisticsBuffer.add`.

    Returns:
        Statistics in ``dtype``. The scatter is exactly zero where the features of each class are equal to the last bit.
        Features that are not finite make the moments of their class ``nan``.

    Raises:
        ValueError: If a shape does not fit.
        TypeError: If features are not floating or labels not int64.

    Example:
        >>> import torch
        >>> from nclightning.functional import class_statistics
        >>> features = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [9.0, 9.0]])
        >>> stats = class_statistics(features, torch.tensor([0, 0, 1, 7]), num_classes=2)
        >>> stats.counts, int(stats.num_invalid)
        (tensor([2., 1.], dtype=torch.float64), 1)
        >>> stats.scatter.round(decimals=6)
        tensor([[2., 0.],
                [0., 0.]], dtype=torch.float64)
    """
    _check(features, labels)
    empty = ClassStatistics.empty(num_classes, features.shape[1], dtype, features.device, scatter=scatter)
    buffer = StatisticsBuffer(empty)
    buffer.add(features, labels, ignore_index, copy=copy)
    return buffer.statistics


def _check(features: Tensor, labels: Tensor) -> None:
    """Raise an error unless features and labels have valid shapes and dtypes."""
    if features.ndim != 2 or not features.shape[1] or labels.shape != features.shape[:1]:
        raise UserError(
            "features must be (N, d) with d at least 1 and labels (N,) with the same N, "
            f"got {tuple(features.shape)} and {tuple(labels.shape)}."
        )
    if not features.is_floating_point() or labels.dtype != torch.int64:
        raise UserTypeError(f"features must be floating and labels int64, got {features.dtype} and {labels.dtype}.")
