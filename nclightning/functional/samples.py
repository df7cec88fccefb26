"""Samples as they came: kept in few pieces, gone through some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nclightning.functional.linear import autocast_off, invertible_power_of_two, zero_where
from nclightning.functional.moments import Means
from nclightning.functional.rounding import rounding_of

__all__ = ["Samples"]

# Rows are taken at a time: what is formed of them stays in the cache of a CPU.
_ELEMENTS_AT_A_TIME, _LEAST_ROWS = 2**17, 256
# Pieces with fewer numbers than this are put together.
_LARGE_PIECE = 2**18

# Samples are kept while they are few bytes. Where reading along K - 1 directions costs so many times less than the
# root of the scatter they are kept up to so many times d of them, and more bytes.
_FEW_BYTES, _WORTH_KEEPING, _KEPT_PER_DIM, _KEPT_BYTES = 2**25, 4, 128, 2**28
# In the light form a pass over the samples costs the same sooner or later.
_LIGHT_BYTES = 2**22


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples that are kept as they came: a value, of which nothing is changed.

    Attributes:
        features: Pieces ``(N, d)``.
        labels: Of each piece, ``(N,)``; K for samples that are left out.
    """

    features: tuple[Tensor, ...] = ()
    labels: tuple[Tensor, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether there are none."""
        return not self.features

    def join(self, other: Samples) -> Samples:
        """Both, piece after piece."""
        return Samples(self.features + other.features, self.labels + other.labels)

    def append(self, features: Tensor, labels: Tensor) -> Samples:
        """Append a piece.

        A small piece is put together with the last ones while these are no larger, so that there are few pieces however
        small they come, and each number is copied few times: as often as twice its number of pieces has bits.

        Args:
            features: ``(N, d)``.
            labels: ``(N,)``.

        Returns:
            All.
        """
        before = len(self.features)
        while before and self.labels[before - 1].numel() <= labels.numel() and features.numel() < _LARGE_PIECE:
            before -= 1
            with autocast_off(features.device):
                features = torch.cat([self.features[before], features])
            labels = torch.cat([self.labels[before], labels])
        return Samples((*self.features[:before], features), (*self.labels[:before], labels))

    def are_few(self, num_classes: int, light: bool) -> bool:
        """Whether they are worth keeping."""
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
        """Yield features in a dtype, with their labels, as many at a time as is fastest, but at least so many."""
        for features, labels in zip(self.features, self.labels, strict=True):
            size = max(_ELEMENTS_AT_A_TIME // features.shape[1], _LEAST_ROWS, least)
            for rows, index in zip(torch.split(features, size), torch.split(labels, size), strict=True):
                yield rows.to(dtype), index

    def sums_are_exact(self, dtype: torch.dtype) -> bool:
        """Whether so few equal numbers, so many bits shorter than their sum in a dtype, add up without a rounding."""
        epsilons = {torch.finfo(each.dtype).eps for each in self.features}
        return len(epsilons) == 1 and sum(map(len, self.features)) <= min(epsilons) / torch.finfo(dtype).eps

    def means(self, like: Tensor) -> Means:
        """Counts, class means and rounding.

        Args:
            like: Class means ``(K, d)`` of other samples, for sizes, dtype and device.
        """
        num_classes, dim = like.shape
        counts, sums = like.new_zeros(num_classes + 1), like.new_zeros(num_classes + 1, dim)
        for rows, index in self.rows(like.dtype):
            counts.index_add_(0, index, torch.ones_like(index, dtype=counts.dtype))
            sums.index_add_(0, index, rows)
        divisors = counts.clamp(min=1).unsqueeze(1)
        means, tails = sums / divisors, torch.zeros_like(sums)
        if not self.sums_are_exact(like.dtype):
            # The mean of equal numbers may be off by a rounding; the mean of the residuals takes that away.
            for rows, index in self.rows(like.dtype):
                tails.index_add_(0, index, rows - means.index_select(0, index))
            tails = tails / divisors
            sums = means + tails
            means, tails = sums, tails - (sums - means)
        means = torch.where(means.isfinite(), means, torch.nan)
        counts, means, tails = (each.narrow(0, 0, num_classes) for each in (counts, means, tails))
        return Means(counts, means, tails, rounding_of(self.features, self.labels, num_classes).to(like))

    def spread(self, around: Means, exact: bool, *directions: Tensor) -> tuple[Tensor, ...]:
        """Spread around class means, in one pass.

        Args:
            around: The class means.
            exact: As for :meth:`deviations`.
            *directions: Vectors ``(r, d)``.

        Returns:
            Roots of the sums of squares of deviations: of each class ``(K,)``, of each coordinate ``(d,)``, and along
            directions ``(r,)`` for each of ``directions``.
        """
        num_classes, dim = around.means.shape
        unit = invertible_power_of_two(around.means)
        norms, widths = unit.new_zeros(num_classes + 1), unit.new_zeros(dim)
        along = [unit.new_zeros(len(each)) for each in directions]
        for away, index in self.deviations(around, unit, exact):
            for i, each in enumerate(directions):
                along[i] += (each @ away.T).square_().sum(dim=1)  # Twice as fast as the other way round.
            squares = away.square_()
            norms.index_add_(0, index, squares.sum(dim=1))
            widths += squares.sum(dim=0)
        return tuple(unit * squares.sqrt() for squares in (norms.narrow(0, 0, num_classes), widths, *along))

    def deviations(self, around: Means, unit: Tensor, exact: bool, least: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield deviations from class means, with their labels.

        Args:
            around: The class means.
            unit: Of the deviations, a power of two: division by it is exact.
            exact: Whether rounding left nothing of the class means, so that there are no tails to subtract.
            least: As for :meth:`rows`.

        Yields:
            ``(B, d)``, zero for samples that are left out, and labels ``(B,)``.
        """
        num_classes, dim = around.means.shape
        inverse, zero = 1 / unit, unit.new_zeros(1, dim)
        means = torch.cat([around.means / unit, zero])
        tails = None if exact else torch.cat([around.tails / unit, zero])
        for rows, index in self.rows(means.dtype, least):
            away = means.index_select(0, index).addcmul_(rows, inverse, value=-1)
            if tails is not None:
                away.add_(tails.index_select(0, index))
            yield zero_where(away, index == num_classes), index
