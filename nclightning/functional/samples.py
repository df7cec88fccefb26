"""Samples as they came: kept in few pieces, gone through some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nclightning.functional.moments import Moments
from nclightning.functional.rounding import rounding_of

__all__ = ["Samples", "append"]

# Rows are taken at a time: what is formed of them stays in the cache of a CPU.
_ELEMENTS_AT_A_TIME, _LEAST_ROWS = 2**16, 256
# Pieces with fewer numbers than this are put together.
_LARGE_PIECE = 2**18

# Samples are kept while they are few bytes. Where reading along K - 1 directions costs so many times less than the
# root of the scatter they are kept up to so many times d of them, and more bytes.
_FEW_BYTES, _WORTH_KEEPING, _KEPT_PER_DIM, _KEPT_BYTES = 2**25, 4, 128, 2**28
# In the light form a pass over the samples costs the same sooner or later.
_LIGHT_BYTES = 2**22


def append(kept: Sequence[Tensor], features: Tensor, labels: Tensor) -> list[Tensor]:
    """Append a piece to features and labels in turn.

    A small piece is put together with the last ones while these are no larger, so that there are few pieces however
    small they come, and each number is copied few times: as often as twice its number of pieces has bits.

    Args:
        kept: Features and labels in turn.
        features: ``(N, d)``.
        labels: ``(N,)``.

    Returns:
        A new list.
    """
    pieces, last = list(kept), [features, labels]
    while pieces and len(pieces[-1]) <= len(last[0]) and last[0].numel() < _LARGE_PIECE:
        last = [torch.cat([pieces[-2], last[0]]), torch.cat([pieces[-1], last[1]])]
        del pieces[-2:]
    return [*pieces, *last]


class Samples:
    """Samples that are kept as they came.

    Args:
        kept: Features ``(N, d)`` and labels ``(N,)`` in turn, K for the label of samples that are left out.
    """

    def __init__(self, kept: Sequence[Tensor]) -> None:
        self._features, self._labels = kept[::2], kept[1::2]

    def rows(self, dtype: torch.dtype, least: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield features in a dtype, with their labels, as many at a time as is fastest, but at least so many."""
        for features, labels in zip(self._features, self._labels, strict=True):
            size = max(_ELEMENTS_AT_A_TIME // features.shape[1], _LEAST_ROWS, least)
            for rows, index in zip(torch.split(features, size), torch.split(labels, size), strict=True):
                yield rows.to(dtype), index

    def sums_are_exact(self, dtype: torch.dtype) -> bool:
        """Whether so few equal numbers, so many bits shorter than their sum in a dtype, add up without a rounding."""
        epsilons = {torch.finfo(each.dtype).eps for each in self._features}
        return len(epsilons) == 1 and sum(map(len, self._features)) <= min(epsilons) / torch.finfo(dtype).eps

    def are_few(self, num_classes: int, light: bool) -> bool:
        """Whether they are worth keeping."""
        rows, dim = sum(map(len, self._features)), self._features[0].shape[1]
        bytes_ = sum(each.numel() * each.element_size() for each in self._features)
        if light:
            return bytes_ <= _LIGHT_BYTES
        many = dim >= _WORTH_KEEPING * num_classes and bytes_ <= _KEPT_BYTES
        return bytes_ <= _FEW_BYTES or (many and rows <= _KEPT_PER_DIM * dim)

    def moments(self, like: Tensor) -> Moments:
        """Counts, class means and rounding; without second moments.

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
        rounding = rounding_of(self._features, self._labels, num_classes).to(like)
        return Moments(counts, means, tails, torch.zeros_like(counts), like.new_zeros(dim), None, rounding)

    def deviations(
        self, means: Tensor, tails: Tensor | None, inverse: Tensor, least: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield deviations from class means, in a unit, with their labels.

        Args:
            means: Class means ``(K, d)`` in that unit.
            tails: What rounding left of them, None for nothing.
            inverse: Of the unit, a power of two: as exact as the difference itself.
            least: As for :meth:`rows`.

        Yields:
            ``(B, d)``, zero for samples that are left out, and labels ``(B,)``.
        """
        num_classes, zero = len(means), means.new_zeros(1, means.shape[1])
        means, tails = torch.cat([means, zero]), None if tails is None else torch.cat([tails, zero])
        for rows, index in self.rows(means.dtype, least):
            away = means.index_select(0, index).addcmul_(rows, inverse, value=-1)
            if tails is not None:
                away.add_(tails.index_select(0, index))
            yield away.masked_fill_((index == num_classes).unsqueeze(1), 0), index
