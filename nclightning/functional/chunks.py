"""Many rows, some at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["add_gram_", "chunks", "sums", "without"]

# Rows are taken in at a time: no more than what is formed of them stays in the cache of a CPU, but enough for one pass
# over the scatter; without one, the least is fewer by this factor.
_ELEMENTS_AT_A_TIME, _LEAST_ROWS, _FEWER_WITHOUT = 2**16, 1024, 4
# From this dimension on only blocks on and below the diagonal of the scatter are computed, this many to a side.
_LEAST_BLOCKED_DIM, _BLOCKS = 256, 4


def without(rows: Tensor, index: Tensor, num_classes: int) -> Tensor:
    """Set the rows of samples that are left out to zero, in place."""
    return rows.masked_fill_((index == num_classes).unsqueeze(1), 0)


def sums(values: Tensor, index: Tensor, num_groups: int) -> Tensor:
    """Sums of groups of rows."""
    return values.new_zeros(num_groups, *values.shape[1:]).index_add_(0, index, values)


def chunks(features: Tensor, labels: Tensor, for_scatter: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows and their labels, as many at a time as is fastest."""
    least = _LEAST_ROWS if for_scatter else _LEAST_ROWS // _FEWER_WITHOUT
    size = max(_ELEMENTS_AT_A_TIME // max(features.shape[1], 1), least)
    return zip(torch.split(features, size), torch.split(labels, size), strict=True)


def add_gram_(lower: Tensor, rows: Tensor, sign: int = 1) -> None:
    """Add ``rows.T @ rows`` in place, on and below the diagonal at least."""
    dim = len(lower)
    size = dim if dim < _LEAST_BLOCKED_DIM else -(-dim // _BLOCKS)
    for start in range(0, dim, size):
        width = min(size, dim - start)
        block = lower.narrow(0, start, width).narrow(1, 0, start + width)
        block.addmm_(rows.narrow(1, start, width).T, rows.narrow(1, 0, start + width), alpha=sign)
