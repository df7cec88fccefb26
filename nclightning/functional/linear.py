"""Linear algebra shared by several measures. It is exact at degenerate points; pairs of classes are formed in tiles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "ELEMENTS_PER_STEP",
    "autocast_off",
    "cosines",
    "distances",
    "distinct_pairs",
    "invertible_power_of_two",
    "norm",
    "power_of_two",
    "product",
    "root_sum_of_squares",
    "singular_vectors",
    "triangular_factor",
    "unit_rows",
    "zero_where",
]

# Number of elements of features that stay in the cache of a CPU together with what is computed of them. Whatever takes
# features in steps takes about so many at once.
ELEMENTS_PER_STEP = 2**17
# Entries of a tile of the matrix of all pairs of classes: 64 MB in float64.
_TILE = 2**23


def autocast_off(device: torch.device) -> AbstractContextManager[Any]:
    """Switch autocast off, so that operations compute in the dtype of their tensors.

    Under autocast float32 is multiplied in half precision, and on a CPU ``torch.cat`` raises an error for float16.

    Args:
        device: Device of the tensors.
    """
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()  # The context manager below would take a quarter of the time of an update.
    return torch.autocast(device.type, enabled=False)


def power_of_two(values: Tensor) -> Tensor:
    """Largest power of two that is at most the largest absolute value; 1 if that value is zero or not finite.

    Division by it is exact, so that it serves as a unit.
    """
    if not values.numel():
        return values.new_ones(())
    largest = torch.linalg.vector_norm(values, ord=torch.inf)
    # Zero, inf and nan are their own mantissas, and their quotients nan.
    unit: Tensor = largest / (2 * torch.frexp(largest).mantissa)
    return unit.nan_to_num(nan=1.0)


def invertible_power_of_two(values: Tensor) -> Tensor:
    """Power of two as in :func:`power_of_two`, but so large that its inverse is finite."""
    return power_of_two(values).clamp(min=torch.finfo(values.dtype).tiny)


def product(rows: Tensor, others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Inner products :math:`A B^\top` that neither over- nor underflow.

    Args:
        rows: A ``(N, d)``.
        others: B ``(K, d)``.

    Returns:
        Scaled products P and two factors a and b, which are powers of two of at most 1. The sum of the inner products
        and any C is ``(a P + b C) / b``. In this form, only terms that are negligible in the sum can underflow.
    """
    unit = invertible_power_of_two(others)
    return rows @ (others / unit).T, unit.clamp(max=1), (1 / unit).clamp(max=1)


def norm(values: Tensor, dim: int) -> Tensor:
    """Euclidean norm over a dimension. The squares inside neither over- nor underflow."""
    unit = power_of_two(values)
    value: Tensor = torch.linalg.vector_norm(values / unit, dim=dim) * unit
    return value


def root_sum_of_squares(*values: Tensor) -> Tensor:
    r"""Elementwise :math:`\sqrt{\sum_i x_i^2}`. The squares inside neither over- nor underflow."""
    return reduce(torch.hypot, values) if len(values) > 1 else values[0].abs()


def triangular_factor(parts: Sequence[Tensor]) -> Tensor:
    r"""R of the QR decomposition of stacked rows: :math:`R^\top R` is the sum of their Gram matrices."""
    factor: Tensor = torch.linalg.qr(torch.cat(list(parts)), mode="r").R
    return factor


def zero_where(rows: Tensor, condition: Tensor) -> Tensor:
    """Set rows to zero, in place, where a condition ``(N,)`` holds."""
    # On a CPU the check takes a tenth of the time of filling. On another device it would wait for the device.
    if rows.is_cpu and not condition.any():
        return rows
    return rows.masked_fill_(condition.unsqueeze(1), 0)


def singular_vectors(rows: Tensor, full: bool = False) -> tuple[Tensor, Tensor]:
    """Singular values and right singular vectors, the latter as rows; ``nan`` for a matrix that is not finite.

    ``torch.linalg.svd`` raises an error for such a matrix. Values of the data must not stop a run.
    """
    finite = rows.isfinite().all()
    rows = torch.where(finite, rows, 0)
    left, singular, right = torch.linalg.svd(rows, full_matrices=full)
    if not full:
        # The vectors of the decomposition leave the span of the rows by many roundings. Linear combinations of the
        # rows leave it by one.
        unit, least = power_of_two(rows), torch.finfo(rows.dtype).eps * max(rows.shape) * singular.amax()
        sums = (left / torch.where(singular > least, singular / unit, 1)).T @ (rows / unit)
        right = torch.where((singular > least).unsqueeze(1), sums, right)
    return torch.where(finite, singular, torch.nan), right


def unit_rows(rows: Tensor) -> Tensor:
    """Rows divided by their norms; ``nan`` for a zero row."""
    # Division by the largest entry first keeps the squares within the range of the dtype.
    scaled = rows / rows.abs().amax(dim=1, keepdim=True)
    unit: Tensor = scaled / torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    return unit


def distances(rows: Tensor, tile: int | None = None) -> Iterator[tuple[range, Tensor]]:
    """Yield the Euclidean distances of a tile of rows to all rows, with the range of the tile.

    They are computed from differences: inner products would cancel where two rows are close.
    """
    for part in _tiles(len(rows), tile):
        some = rows.narrow(0, part.start, len(part))
        yield part, torch.cdist(some, rows, compute_mode="donot_use_mm_for_euclid_dist")


def cosines(rows: Tensor, tile: int | None = None) -> Iterator[tuple[range, Tensor]]:
    """Yield the cosines between a tile of rows and all rows, with the range of the tile."""
    unit = unit_rows(rows)
    for part in _tiles(len(rows), tile):
        yield part, unit.narrow(0, part.start, len(part)) @ unit.T


def distinct_pairs(part: range, present: Tensor) -> Tensor:
    """Bool tile that is True for pairs of two distinct classes that are both present."""
    index = torch.arange(len(present), device=present.device)
    some = index.narrow(0, part.start, len(part))
    return (some.unsqueeze(1) != index) & present & present.index_select(0, some).unsqueeze(1)


def _tiles(num_rows: int, size: int | None) -> Iterator[range]:
    """Yield ranges of rows, small enough that a tile against all rows fits in memory."""
    size = size or max(_TILE // max(num_rows, 1), 1)
    for start in range(0, num_rows, size):
        yield range(start, min(start + size, num_rows))
