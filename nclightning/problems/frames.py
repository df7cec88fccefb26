"""Orthonormal directions of groups or classes, and rows that are selected by label, in compact forms."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Centred", "Columns", "Frame", "OwnAndOther", "Rows", "Table", "one_hot"]


@dataclass(frozen=True, eq=False)
class Columns:
    """Orthonormal directions, stored as a matrix.

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
        """Return the components of rows along the directions, up to a rotation, and the squared norm of the rest."""
        inside = self.coordinates(rows)
        # If the directions span everything, the rest is exactly zero; computing it would give rounding errors.
        spans_all = self.matrix.shape[1] == len(rows)
        return inside, rows.new_zeros(()) if spans_all else (rows - self.rows(inside)).square().sum()


@dataclass(frozen=True, eq=False)
class Centred:
    """The ``size - 1`` directions orthogonal to the vector of ones. They are never formed, so that all work is linear.

    A reflection maps the vector of ones to the first axis; the directions are the images of the other axes.

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
        """Return the components of rows along the directions, up to a rotation, and the squared norm of the rest."""
        mean = rows.mean(dim=0)
        return rows - mean, self.size * mean.square().sum()


Frame = Columns | Centred


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of a matrix, selected by label.

    Args:
        matrix: ``(M, K)``.
    """

    matrix: Tensor

    def of(self, labels: Tensor, like: Tensor) -> Tensor:
        """Return the rows of labels, ``(B, K)``, in the dtype and on the device of ``like (B, K)``."""
        return self.matrix.to(like).index_select(0, labels)


@dataclass(frozen=True, eq=False)
class OwnAndOther:
    """Rows with one number at the position of the label and another one everywhere else.

    Args:
        own: The number at the label.
        other: The number elsewhere.
    """

    own: float
    other: float

    def of(self, labels: Tensor, like: Tensor) -> Tensor:
        """Return the rows of labels, ``(B, K)``, in the dtype and on the device of ``like (B, K)``."""
        return torch.full_like(like, self.other).scatter_(1, labels.unsqueeze(1), self.own)


Rows = Table | OwnAndOther


def one_hot(num_classes: int) -> Tensor:
    """Return the targets of hard labels, float64 on the host whatever torch's default device is."""
    return torch.eye(num_classes, dtype=torch.float64, device="cpu")
