"""Stored samples: features and labels in a few tensors, processed block of rows by block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nclightning.functional.linear import ELEMENTS_PER_STEP, autocast_off, invertible_power_of_two, zero_where
from nclightning.functional.moments import Means
from nclightning.functional.rounding import detected_epsilons

__all__ = ["Samples"]

# The least number of rows of a block, which has ELEMENTS_PER_STEP elements otherwise.
_LEAST_ROWS = 256
# Tensors with fewer elements than this are concatenated.
_LARGE_TENSOR = 2**18

# Samples are stored while they take at most _FEW_BYTES. If d is at least _WORTH_KEEPING times K, the spread along the
# K - 1 directions of the class means costs much less than the root of the scatter. Then they are stored up to
# _KEPT_BYTES and up to _KEPT_PER_DIM times d samples.
_FEW_BYTES, _WORTH_KEEPING, _KEPT_PER_DIM, _KEPT_BYTES = 2**25, 4, 128, 2**28
# Light statistics need one pass over the samples in any case, so that storing them saves no time.
_LIGHT_BYTES = 2**22


@dataclass(frozen=True, eq=False)
class Samples:
    """Stored samples. The object is immutable.

    Attributes:
        features: Tensors ``(N, d)``, each of any N.
        labels: Labels of each tensor, ``(N,)``; K for samples that are left out.
    """

    features: tuple[Tensor, ...] = ()
    labels: tuple[Tensor, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether no samples are stored."""
        return not self.features

    def join(self, other: Samples) -> Samples:
        """Return these samples followed by others."""
        return Samples(self.features + other.features, self.labels + other.labels)

    def append(self, features: Tensor, labels: Tensor) -> Samples:
        """Return these samples followed by a batch.

        A small batch is concatenated with the last tensors as long as these are no larger than it. So the number of
        tensors stays small even for many small batches, and each sample is copied only O(log(number of batches)) times.

        Args:
            features: ``(N, d)``.
            labels: ``(N,)``.

        Returns:
            All samples.
        """
        before = len(self.features)
        while before and self.labels[before - 1].numel() <= labels.numel() and features.numel() < _LARGE_TENSOR:
            before -= 1
            with autocast_off(features.device):
                features = torch.cat([self.features[before], features])
            labels = torch.cat([self.labels[before], labels])
        return Samples((*self.features[:before], features), (*self.labels[:before], labels))

    def are_worth_keeping(self, num_classes: int, light: bool) -> bool:
        """Whether storing them saves time and takes little memory; otherwise they should be folded into totals."""
        if self.is_empty:
            return True
        bytes_ = sum(each.nbytes for each in self.features)
        if light:
            return bytes_ <= _LIGHT_BYTES
        if bytes_ <= _FEW_BYTES:
            return True
        rows, dim = sum(each.numel() for each in self.labels), self.features[0].shape[1]
        return dim >= _WORTH_KEEPING * num_classes and bytes_ <= _KEPT_BYTES and rows <= _KEPT_PER_DIM * dim

    def rows(self, dtype: torch.dtype, least: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield blocks of features in a dtype, with their labels. A block has at least ``least`` rows, if there are."""
        for features, labels in zip(self.features, self.labels, strict=True):
            size = max(ELEMENTS_PER_STEP // features.shape[1], _LEAST_ROWS, least)
            for rows, index in zip(torch.split(features, size), torch.split(labels, size), strict=True):
                yield rows.to(dtype), index

    def sums_are_exact(self, dtype: torch.dtype) -> bool:
        """Whether sums of equal features in a dtype have no rounding error.

        The dtype has more bits than the features. The sum of N equal numbers is exact if log2(N) is at most this
        difference.
        """
        epsilons = {torch.finfo(each.dtype).eps for each in self.features}
        return len(epsilons) == 1 and sum(map(len, self.features)) <= min(epsilons) / torch.finfo(dtype).eps

    def means(self, like: Tensor) -> Means:
        """Compute counts, class means and the detected rounding.

        Args:
            like: Class means ``(K, d)`` of other samples, which set sizes, dtype and device.
        """
        num_classes, dim = like.shape
        counts, sums = like.new_zeros(num_classes + 1), like.new_zeros(num_classes + 1, dim)
        for rows, index in self.rows(like.dtype):
            counts.index_add_(0, index, torch.ones_like(index, dtype=counts.dtype))
            sums.index_add_(0, index, rows)
        divisors = counts.clamp(min=1).unsqueeze(1)
        means, tails = sums / divisors, torch.zeros_like(sums)
        if not self.sums_are_exact(like.dtype):
            # The computed mean of equal numbers may differ from them by a rounding. Adding the mean of the residuals
            # corrects it.
            for rows, index in self.rows(like.dtype):
                tails.index_add_(0, index, rows - means.index_select(0, index))
            tails = tails / divisors
            sums = means + tails
            means, tails = sums, tails - (sums - means)
        means = torch.where(means.isfinite(), means, torch.nan)
        counts, means, tails = (each.narrow(0, 0, num_classes) for each in (counts, means, tails))
        return Means(counts, means, tails, detected_epsilons(self.features, self.labels, num_classes).to(like))

    def spread(self, around: Means, exact: bool, *directions: Tensor) -> tuple[Tensor, ...]:
        """Compute the spread around class means in one pass.

        Args:
            around: The class means.
            exact: As for :meth:`deviations`.
            *directions: Vectors ``(r, d)``.

        Returns:
            Square roots of the sums of squared deviations: for each class ``(K,)``, for each coordinate ``(d,)``, and
            for each of ``directions`` along its vectors ``(r,)``.
        """
        num_classes, dim = around.means.shape
        unit = invertible_power_of_two(around.means)
        norms, widths = unit.new_zeros(num_classes + 1), unit.new_zeros(dim)
        along = [unit.new_zeros(len(each)) for each in directions]
        for deviations, index in self.deviations(around, unit, exact):
            for i, each in enumerate(directions):
                along[i] += (each @ deviations.T).square_().sum(dim=1)  # Twice as fast as the other way round.
            squares = deviations.square_()
            norms.index_add_(0, index, squares.sum(dim=1))
            widths += squares.sum(dim=0)
        return tuple(unit * squares.sqrt() for squares in (norms.narrow(0, 0, num_classes), widths, *along))

    def deviations(self, around: Means, unit: Tensor, exact: bool, least: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield deviations from class means, with their labels.

        Args:
            around: The class means.
            unit: Deviations are divided by it. It is a power of two, so that the division is exact.
            exact: Whether the class means have no rounding error. Otherwise their tails are subtracted, too.
            least: As for :meth:`rows`.

        Yields:
            Deviations ``(B, d)``, zero for samples that are left out, and labels ``(B,)``.
        """
        num_classes, dim = around.means.shape
        inverse, zero = 1 / unit, unit.new_zeros(1, dim)
        means = torch.cat([around.means / unit, zero])
        tails = None if exact else torch.cat([around.tails / unit, zero])
        for rows, index in self.rows(means.dtype, least):
            deviations = means.index_select(0, index).addcmul_(rows, inverse, value=-1)
            if tails is not None:
                deviations.add_(tails.index_select(0, index))
            yield zero_where(deviations, index == num_classes), index
