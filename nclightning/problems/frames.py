"""Orthonormal directions of groups or classes, by what is done with them, and values that go with a label."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Centred", "Columns", "Frame", "OwnAndOther", "Rows", "Table", "one_hot"]


@dataclass(frozen=True, eq=False)
class Columns:
    """Any orthonormal directions.

    Args:
        matrix: ``(size, r)``, a direction in each column.
    """

    matrix: Tensor

    def coordinates(self, rows: Tensor) -> Tensor:
        """Components ``(r, d)`` of ``rows (size, d)`` along the directions."""
        return self.matrix.T @ rows

    def rows(self, coordinates: Tensor) -> Tensor:
        """Rows ``(size, d)`` with these components ``(r, d)``."""
        return self.matrix @ coordinates

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Components of rows, up to a rotation, as a tensor of their own, and the squared norm of the rest."""
        inside = self.coordinates(rows)
        # Directions that span everything would leave rounding.
        spans_all = self.matrix.shape[1] == len(rows)
        return inside, rows.new_zeros(()) if spans_all else (rows - self.rows(inside)).square().sum()


@dataclass(frozen=True, eq=False)
class Centred:
    """The ``size - 1`` directions orthogonal to the vector of ones, never written out: all work goes with ``size``.

    A reflection makes the ones vector the first axis; the directions are the other axes.

    Args:
        size: Number of rows, at least 2.
    """

    size: int

    def coordinates(self, rows: Tensor) -> Tensor:
        """Components ``(size - 1, d)`` of ``rows (size, d)`` along the directions."""
        root = math.sqrt(self.size)
        first, others = rows.narrow(0, 0, 1), rows.narrow(0, 1, self.size - 1)
        inside: Tensor = others - (rows.sum(dim=0) + root * first) / (self.size + root)
        return inside

    def rows(self, coordinates: Tensor) -> Tensor:
        """Rows ``(size, d)`` with these components ``(size - 1, d)``; their sum is zero."""
        root, total = math.sqrt(self.size), coordinates.sum(dim=0, keepdim=True)
        return torch.cat([total / -root, coordinates - total / (self.size + root)])

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Components of rows, up to a rotation, as a tensor of their own, and the squared norm of the rest."""
        mean = rows.mean(dim=0)
        return rows - mean, self.size * mean.square().sum()


Frame = Columns | Centred


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of a matrix by label.

    Args:
        matrix: ``(M, K)``.
    """

    matrix: Tensor

    def of(self, labels: Tensor, like: Tensor) -> Tensor:
        """Rows ``(B, K)`` of the dtype of ``like (B, K)`` on its device."""
        return self.matrix.to(like).index_select(0, labels)


@dataclass(frozen=True, eq=False)
class OwnAndOther:
    """Rows with one number in the place of the label, and another one everywhere else.

    Args:
        own: At the label.
        other: Elsewhere.
    """

    own: float
    other: float

    def of(self, labels: Tensor, like: Tensor) -> Tensor:
        """Rows ``(B, K)`` of the dtype of ``like (B, K)`` on its device."""
        return torch.full_like(like, self.other).scatter_(1, labels.unsqueeze(1), self.own)


Rows = Table | OwnAndOther


def one_hot(num_classes: int) -> Tensor:
    """Targets of hard labels, float64 on the host, whatever torch's default device is."""
    return torch.eye(num_classes, dtype=torch.float64, device="cpu")
