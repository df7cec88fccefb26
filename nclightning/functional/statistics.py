"""Counts, class means and within-class scatter: the sufficient statistic of the features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ClassStatistics", "class_statistics"]


@dataclass(frozen=True)
class ClassStatistics:
    r"""First and second moments of labelled features.

    Attributes:
        counts: Samples per class ``(K,)``, in the dtype of the means.
        means: Class means ``(K, d)``; zero for a class without samples.
        scatter: Within-class scatter :math:`\sum_i (h_i - \mu_{y_i})(h_i - \mu_{y_i})^\top`, ``(d, d)``, a sum.
        num_ignored: Samples whose label was outside ``0..K-1``, int64 scalar. They entered nothing else.
    """

    counts: Tensor
    means: Tensor
    scatter: Tensor
    num_ignored: Tensor

    @classmethod
    def empty(
        cls,
        num_classes: int,
        feature_dim: int,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
    ) -> ClassStatistics:
        """Statistics of no samples, the neutral element of :meth:`merge`."""
        return cls(
            counts=torch.zeros(num_classes, dtype=dtype, device=device),
            means=torch.zeros(num_classes, feature_dim, dtype=dtype, device=device),
            scatter=torch.zeros(feature_dim, feature_dim, dtype=dtype, device=device),
            num_ignored=torch.zeros((), dtype=torch.int64, device=device),
        )

    @property
    def present(self) -> Tensor:
        """Which classes have samples, bool ``(K,)``."""
        return self.counts > 0

    @property
    def centred_means(self) -> Tensor:
        """Class means minus their unweighted mean over the classes present; zero rows for absent classes."""
        present = self.present.unsqueeze(1).to(self.means)
        centre = (self.means * present).sum(dim=0) / present.sum().clamp(min=1)
        return (self.means - centre) * present

    def merge(self, other: ClassStatistics) -> ClassStatistics:
        """Statistics of the union of two disjoint sets of samples.

        Centred update of Chan, Golub and LeVeque (1983): moments are shifted by the difference of the means, never
        formed around the origin, so that nothing cancels near collapse. Order and split matter only to round-off.

        Args:
            other: Statistics over the same classes and feature dimension.

        Returns:
            New statistics; the two operands are left as they are.

        Raises:
            ValueError: If the shapes differ.
        """
        if self.means.shape != other.means.shape:
            raise ValueError(
                "both statistics must have the same classes and feature dimension, "
                f"got {tuple(self.means.shape)} and {tuple(other.means.shape)}."
            )
        counts = self.counts + other.counts
        share = other.counts / counts.clamp(min=1)
        shift = other.means - self.means
        between = shift * (self.counts * share).sqrt().unsqueeze(1)
        return ClassStatistics(
            counts=counts,
            means=self.means + share.unsqueeze(1) * shift,
            scatter=self.scatter + other.scatter + between.T @ between,
            num_ignored=self.num_ignored + other.num_ignored,
        )


def class_statistics(
    features: Tensor, labels: Tensor, num_classes: int, dtype: torch.dtype = torch.float64
) -> ClassStatistics:
    """Compute the statistics of one batch in two passes, on its device, without a host transfer.

    Args:
        features: ``(N, d)`` of any floating dtype.
        labels: ``(N,)`` int64. A label outside ``0..K-1`` is counted in ``num_ignored`` and enters nothing else.
        num_classes: K, at least 1.
        dtype: Dtype of accumulation and result, float64 or float32.

    Returns:
        Statistics in ``dtype``. Zero scatter where the features of each class are equal to the last bit.

    Raises:
        ValueError: If a shape does not fit.
        TypeError: If features are not floating or labels not int64.
    """
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            "features must be (N, d) and labels (N,) with the same N, "
            f"got {tuple(features.shape)} and {tuple(labels.shape)}."
        )
    if not features.is_floating_point() or labels.dtype != torch.int64:
        raise TypeError(f"features must be floating and labels int64, got {features.dtype} and {labels.dtype}.")
    features = features.detach().to(dtype)
    valid = (labels >= 0) & (labels < num_classes)
    # One bin more than classes takes the ignored samples, so that no value is branched on.
    index = torch.where(valid, labels, num_classes)
    counts = features.new_zeros(num_classes + 1).index_add_(0, index, torch.ones_like(labels, dtype=dtype))
    divisor = counts.clamp(min=1).unsqueeze(1)
    means = features.new_zeros(num_classes + 1, features.shape[1]).index_add_(0, index, features) / divisor
    # The mean of equal numbers may be off by a rounding; the mean of the residuals takes that away.
    means = means + torch.zeros_like(means).index_add_(0, index, features - means.index_select(0, index)) / divisor
    deviations = torch.where(valid.unsqueeze(1), features - means.index_select(0, index), 0)
    return ClassStatistics(
        counts=counts.narrow(0, 0, num_classes),
        means=means.narrow(0, 0, num_classes),
        scatter=deviations.T @ deviations,
        num_ignored=valid.logical_not().sum(),
    )
