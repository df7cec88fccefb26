"""Linear algebra that several measures share: exact at the degenerate points, tiled over pairs of classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "apart",
    "autocast_off",
    "cosines",
    "distances",
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

# Entries of a tile of the matrix of all pairs of classes: 64 MB in float64.
_TILE = 2**23


def autocast_off(device: torch.device) -> AbstractContextManager[Any]:
    """Compute in the dtype of the tensors.

    Autocast multiplies float32 in half precision, and on a CPU ``torch.cat`` raises for float16 under it.

    Args:
        device: Of the tensors.
    """
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()  # To switch off what is off takes a quarter of an update's time.
    return torch.autocast(device.type, enabled=False)


def power_of_two(values: Tensor) -> Tensor:
    """Power of two up to the largest of the values, 1 if that is zero or not finite: a unit that rounds nothing."""
    if not values.numel():
        return values.new_ones(())
    largest = torch.linalg.vector_norm(values, ord=torch.inf)
    # Zero, inf and nan are their own mantissas, and their quotients nan.
    unit: Tensor = largest / (2 * torch.frexp(largest).mantissa)
    return unit.nan_to_num(nan=1.0)


def invertible_power_of_two(values: Tensor) -> Tensor:
    """Power of two as :func:`power_of_two`, whose inverse is finite, too."""
    return power_of_two(values).clamp(min=torch.finfo(values.dtype).tiny)


def product(rows: Tensor, others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Inner products :math:`A B^\top` that neither over- nor underflow.

    Args:
        rows: A ``(N, d)``.
        others: B ``(K, d)``.

    Returns:
        Products P with B in a unit of its own, and factors a and b, powers of two of at most 1: the inner products plus
        C are ``(a P + b C) / b``. So what over- or underflows is only what does not matter in the sum.
    """
    unit = invertible_power_of_two(others)
    return rows @ (others / unit).T, unit.clamp(max=1), (1 / unit).clamp(max=1)


def norm(values: Tensor, dim: int) -> Tensor:
    """Euclidean norm over a dimension, whose squares neither over- nor underflow."""
    unit = power_of_two(values)
    value: Tensor = torch.linalg.vector_norm(values / unit, dim=dim) * unit
    return value


def root_sum_of_squares(*values: Tensor) -> Tensor:
    r"""Element by element :math:`\sqrt{\sum_i x_i^2}`, whose squares neither over- nor underflow."""
    return reduce(torch.hypot, values) if len(values) > 1 else values[0].abs()


def triangular_factor(parts: Sequence[Tensor]) -> Tensor:
    r"""R of the QR decomposition of stacked rows: :math:`R^\top R` is the sum of their Gram matrices."""
    factor: Tensor = torch.linalg.qr(torch.cat(list(parts)), mode="r").R
    return factor


def zero_where(rows: Tensor, condition: Tensor) -> Tensor:
    """Set rows to zero, in place, where a condition ``(N,)`` holds."""
    if rows.is_cpu and not condition.any():  # To fill takes ten times as long; on another device so does asking.
        return rows
    return rows.masked_fill_(condition.unsqueeze(1), 0)


def singular_vectors(rows: Tensor, full: bool = False) -> tuple[Tensor, Tensor]:
    """Singular values and right singular vectors, the latter as rows; ``nan`` for a matrix that is not finite.

    A decomposition of such a matrix would raise, and its values are data: they must not stop a run.
    """
    finite = rows.isfinite().all()
    rows = torch.where(finite, rows, 0)
    left, singular, right = torch.linalg.svd(rows, full_matrices=full)
    if not full:
        # Sums of rows are off the span of the rows by their own rounding only, the decomposition's by many.
        unit, least = power_of_two(rows), torch.finfo(rows.dtype).eps * max(rows.shape) * singular.amax()
        sums = (left / torch.where(singular > least, singular / unit, 1)).T @ (rows / unit)
        right = torch.where((singular > least).unsqueeze(1), sums, right)
    return torch.where(finite, singular, torch.nan), right


def unit_rows(rows: Tensor) -> Tensor:
    """Rows divided by their norms; ``nan`` for a zero row."""
    # A first division by the largest entry keeps squares in range.
    scaled = rows / rows.abs().amax(dim=1, keepdim=True)
    unit: Tensor = scaled / torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    return unit


def distances(rows: Tensor, tile: int | None = None) -> Iterator[tuple[range, Tensor]]:
    """Yield Euclidean distances of some rows to all rows, with the range of these rows.

    From differences, not from inner products, which cancel where rows are close.
    """
    for part in _tiles(len(rows), tile):
        some = rows.narrow(0, part.start, len(part))
        yield part, torch.cdist(some, rows, compute_mode="donot_use_mm_for_euclid_dist")


def cosines(rows: Tensor, tile: int | None = None) -> Iterator[tuple[range, Tensor]]:
    """Yield cosines between some rows and all rows, with the range of these rows."""
    unit = unit_rows(rows)
    for part in _tiles(len(rows), tile):
        yield part, unit.narrow(0, part.start, len(part)) @ unit.T


def apart(part: range, present: Tensor) -> Tensor:
    """Which entries of a tile belong to two distinct classes that are present."""
    index = torch.arange(len(present), device=present.device)
    some = index.narrow(0, part.start, len(part))
    return (some.unsqueeze(1) != index) & present & present.index_select(0, some).unsqueeze(1)


def _tiles(num_rows: int, size: int | None) -> Iterator[range]:
    size = size or max(_TILE // max(num_rows, 1), 1)
    for start in range(0, num_rows, size):
        yield range(start, min(start + size, num_rows))
