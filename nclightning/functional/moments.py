"""Moments of labelled samples, merged as Chan, Golub and LeVeque (1983) merge them, in square-root form."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nclightning.functional.linear import norm, root_sum_of_squares, triangular_factor

__all__ = ["Means", "Moments"]


class Means(NamedTuple):
    """Counts and class means of labelled samples.

    Attributes:
        counts: Samples per class ``(K,)``.
        means: Class means ``(K, d)``; zero for a class without samples.
        tails: Rounding errors of the class means ``(K, d)``: ``means + tails`` has twice the digits of ``means``.
        rounding: Machine epsilon detected from the values of the features, and that of their dtype, ``(2,)``. The
            first is ``inf`` while the values reveal none.
    """

    counts: Tensor
    means: Tensor
    tails: Tensor
    rounding: Tensor

    def shift_to(self, other: Means) -> Tensor:
        """Class means of the other minus those of this one. Every digit of the difference is right."""
        return (other.means - self.means) + (other.tails - self.tails)

    def moved_to(self, other: Means) -> Tensor:
        """Rows whose squared norms are the growth of each class's spread when it is taken around the other's means."""
        shift = torch.where((self.counts > 0).unsqueeze(1), self.shift_to(other), 0)
        return self.counts.sqrt().unsqueeze(1) * shift

    def merge(self, other: Means) -> tuple[Means, Tensor]:
        """Merge with the means of other samples.

        Returns:
            Means of both sets of samples, and rows ``(K, d)``. The squared norms of the rows are the spread of each
            class around the common means minus the spreads of both parts around their own. A row is the shift between
            the two means times the square root of n m / (n + m).
        """
        counts = self.counts + other.counts
        share = other.counts / counts.clamp(min=1)
        both = ((self.counts > 0) & (other.counts > 0)).unsqueeze(1)
        shift = torch.where(both, self.shift_to(other), 0)
        rows = shift * (self.counts * share).sqrt().unsqueeze(1)
        step = share.unsqueeze(1) * shift
        means = self.means + step
        # The rounding error of the sum is added to the tails (Knuth's two-sum).
        back = means - self.means
        tails = self.tails + ((self.means - (means - back)) + (step - back))
        known = (self.counts > 0).unsqueeze(1)
        means, tails = torch.where(known, means, other.means), torch.where(known, tails, other.tails)
        return Means(counts, means, tails, torch.minimum(self.rounding, other.rounding)), rows


class Moments(NamedTuple):
    """Moments of labelled samples. All but the counts have the unit of the features, so that no square overflows.

    Attributes:
        counts: As in :class:`Means`.
        means: As in :class:`Means`.
        tails: As in :class:`Means`.
        norms: Square root of the within-class spread of each class ``(K,)``.
        widths: Square root of the within-class spread of each coordinate ``(d,)``.
        root: Square root R of the within-class scatter R^T R: ``(d, d)``, ``(0, d)`` without samples, or None for light
            statistics. The spread along v is computed as ``|R v|^2``. In ``v^T (R^T R) v`` a small spread would be lost
            in the rounding of larger spreads in other directions.
        rounding: As in :class:`Means`.
    """

    counts: Tensor
    means: Tensor
    tails: Tensor
    norms: Tensor
    widths: Tensor
    root: Tensor | None
    rounding: Tensor

    @classmethod
    def empty(
        cls, num_classes: int, dim: int, dtype: torch.dtype, device: torch.device | str | None, *, scatter: bool
    ) -> Moments:
        """Moments of no samples."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            counts=zeros(num_classes),
            means=zeros(num_classes, dim),
            tails=zeros(num_classes, dim),
            norms=zeros(num_classes),
            widths=zeros(dim),
            root=zeros(0, dim) if scatter else None,
            rounding=torch.full((2,), torch.inf, dtype=dtype, device=device),
        )

    @property
    def first(self) -> Means:
        """Counts and class means, the moments of first order."""
        return Means(self.counts, self.means, self.tails, self.rounding)

    @property
    def is_empty(self) -> bool:
        """Whether there are no samples, as far as the shape of the root shows. It reads nothing from the device."""
        return self.root is not None and not len(self.root)

    def merge(self, other: Moments) -> Moments:
        """Compute the moments of both sets of samples together."""
        first, rows = self.first.merge(other.first)
        root = self.root
        if root is not None and other.root is not None:
            # A side without rows has no samples, so that there is no shift between the means either.
            parts = [part for part in (root, other.root) if len(part)]
            root = triangular_factor([*parts, rows]) if len(parts) > 1 else (parts or [root])[0]
        return Moments(
            **first._asdict(),
            norms=root_sum_of_squares(self.norms, other.norms, norm(rows, dim=1)),
            widths=root_sum_of_squares(self.widths, other.widths, norm(rows, dim=0)),
            root=root,
        )
