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
        tails: What rounding left of them ``(K, d)``: the class means in twice the digits are ``means + tails``.
        rounding: Machine epsilon that the features show, and that of their dtype, ``(2,)``; the first is ``inf`` while
            they do not tell.
    """

    counts: Tensor
    means: Tensor
    tails: Tensor
    rounding: Tensor

    def shift_to(self, other: Means) -> Tensor:
        """Class means of the other minus those of this one, right to the last digit of the difference."""
        return (other.means - self.means) + (other.tails - self.tails)

    def moved_to(self, other: Means) -> Tensor:
        """Rows whose squares are what the spread of these samples grows by around the class means of the other."""
        shift = torch.where((self.counts > 0).unsqueeze(1), self.shift_to(other), 0)
        return self.counts.sqrt().unsqueeze(1) * shift

    def merge(self, other: Means) -> tuple[Means, Tensor]:
        """Merge with those of other samples.

        Returns:
            Means of both sets of samples; and rows ``(K, d)`` whose squares are what the spread around them has more
            than the spreads of both around their own: those of the shift, times n m / (n + m).
        """
        counts = self.counts + other.counts
        share = other.counts / counts.clamp(min=1)
        both = ((self.counts > 0) & (other.counts > 0)).unsqueeze(1)
        shift = torch.where(both, self.shift_to(other), 0)
        rows = shift * (self.counts * share).sqrt().unsqueeze(1)
        step = share.unsqueeze(1) * shift
        means = self.means + step
        # What the sum rounds off goes to the tails (Knuth's two-sum).
        back = means - self.means
        tails = self.tails + ((self.means - (means - back)) + (step - back))
        known = (self.counts > 0).unsqueeze(1)
        means, tails = torch.where(known, means, other.means), torch.where(known, tails, other.tails)
        return Means(counts, means, tails, torch.minimum(self.rounding, other.rounding)), rows


class Moments(NamedTuple):
    """Moments of labelled samples. All but the counts have the unit of the features, so that no square overflows.

    Attributes:
        counts: As of :class:`Means`, and so are ``means``, ``tails`` and ``rounding``.
        means: The same.
        tails: The same.
        norms: Root of the within-class spread of each class ``(K,)``.
        widths: Root of the within-class spread of each coordinate ``(d,)``.
        root: Square root R of the within-class scatter R^T R, ``(d, d)``; ``(0, d)`` before there is one, None in the
            light form. A sum of squares along a direction v, ``|R v|^2``, stays right where ``v^T (R^T R) v`` would
            lose what is below the rounding of the spread in other directions.
        rounding: The same as the first three.
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
        """Those of first order."""
        return Means(self.counts, self.means, self.tails, self.rounding)

    @property
    def is_empty(self) -> bool:
        """Whether they are known to be of no samples, without asking the device for their counts."""
        return self.root is not None and not len(self.root)

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets of samples."""
        first, rows = self.first.merge(other.first)
        root = self.root
        if root is not None and other.root is not None:
            # Without rows one side has no samples, and there is no shift.
            parts = [part for part in (root, other.root) if len(part)]
            root = triangular_factor([*parts, rows]) if len(parts) > 1 else (parts or [root])[0]
        return Moments(
            **first._asdict(),
            norms=root_sum_of_squares(self.norms, other.norms, norm(rows, dim=1)),
            widths=root_sum_of_squares(self.widths, other.widths, norm(rows, dim=0)),
            root=root,
        )
