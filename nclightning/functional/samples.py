"""Samples as they came: kept in few pieces, gone through some rows at a time; to what precision they were rounded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

__all__ = ["append", "chunks", "rounding_of"]

# Rows are taken at a time: what is formed of them stays in the cache of a CPU.
_ELEMENTS_AT_A_TIME, _LEAST_ROWS = 2**16, 256
# Pieces with fewer numbers than this are put together.
_LARGE_PIECE = 2**20
# So many rows of so many pieces show in which dtype features were rounded.
_ROWS_SHOWN, _PIECES_SHOWN = 64, 8
_NARROWER = {
    torch.float64: (torch.float32, torch.float16, torch.bfloat16),
    torch.float32: (torch.float16, torch.bfloat16),
}


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


def chunks(features: Tensor, labels: Tensor, least: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows and their labels, as many at a time as is fastest, but at least so many."""
    size = max(_ELEMENTS_AT_A_TIME // max(features.shape[1], 1), _LEAST_ROWS, least)
    return zip(torch.split(features, size), torch.split(labels, size), strict=True)


def rounding_of(features: Sequence[Tensor], labels: Sequence[Tensor], num_classes: int) -> Tensor:
    """Tell to which precision features were rounded, by their dtype and by their values.

    Features that were computed in bfloat16, say, and then cast to float32 carry the rounding of bfloat16. They show it:
    all of them are numbers of bfloat16, small ones included. Numbers on a grid, such as integers, show nothing.

    Args:
        features: Pieces ``(N, d)``.
        labels: Of each piece, ``num_classes`` for rows that are left out.
        num_classes: K.

    Returns:
        Float64 ``(2,)``: least machine epsilon that a piece shows, ``inf`` if none shows any; and that of the dtypes.
    """
    of_dtype = min(torch.finfo(each.dtype).eps for each in features)
    shown = []
    for rows, index in islice(zip(features, labels, strict=True), _PIECES_SHOWN):
        few = min(len(rows), _ROWS_SHOWN)
        shown.append(_shown(rows.narrow(0, 0, few), index.narrow(0, 0, few), num_classes))
    least = torch.stack(shown).amin()
    return torch.stack([least, torch.full_like(least, of_dtype)])


def _shown(rows: Tensor, index: Tensor, num_classes: int) -> Tensor:
    rows = torch.where((index == num_classes).unsqueeze(1), 0, rows)
    largest = rows.abs().amax()
    epsilon = torch.full_like(largest, torch.finfo(rows.dtype).eps, dtype=torch.float64)
    for dtype in _NARROWER.get(rows.dtype, ()):
        representable = (rows.to(dtype).to(rows.dtype) == rows).all()
        # Numbers that are multiples of the spacing at the largest of them lie on a grid.
        spacing = torch.finfo(dtype).eps * torch.exp2(torch.frexp(largest).exponent.to(rows.dtype) - 1)
        on_a_grid = (torch.frac(rows / spacing) == 0).all()
        known = torch.where(on_a_grid, torch.inf, torch.finfo(dtype).eps).to(epsilon)
        epsilon = torch.where(representable, known, epsilon)
    return epsilon
