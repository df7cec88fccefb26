"""What rounding of the features explains: below it a difference of class means is none."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nclightning.functional.linear import norm, root_sum_of_squares

if TYPE_CHECKING:
    from nclightning.functional.statistics import ClassStatistics

__all__ = ["mean_rounding", "noise_of", "rounding_along", "rounding_of"]

# Roundings that operations before the last one may add up to, in dtypes that are finer than this.
_ROUNDINGS, _FINE = 64, 2**-20
# So many rows of so many pieces show in which dtype features were rounded.
_ROWS_SHOWN, _PIECES_SHOWN = 64, 8
_NARROWER = {
    torch.float64: (torch.float32, torch.float16, torch.bfloat16),
    torch.float32: (torch.float16, torch.bfloat16),
}


def mean_rounding(stats: ClassStatistics) -> Tensor:
    r"""What rounding of the features explains of the mean of each class: one rounding of a sample.

    .. math:: \epsilon\,(\|\mu_k\|^2 + v_k)^{1/2}

    Args:
        stats: Statistics of the features, whose ``epsilon`` it is; :math:`v_k` is the mean squared distance of a class
            from its mean.

    Returns:
        ``(K,)``.
    """
    size = stats.norms / stats.counts.clamp(min=1).sqrt()
    return stats.epsilon * root_sum_of_squares(norm(stats.means, dim=1), size)


def rounding_along(stats: ClassStatistics, directions: Tensor) -> Tensor:
    r"""What rounding of the features explains of the spread of class means along directions.

    .. math:: \epsilon \Bigl(\sum_j v_j^2 \tfrac1N \sum_i h_{ij}^2\Bigr)^{1/2}

    One rounding of each coordinate, in proportion to its size, so that a few large coordinates hide nothing in the
    others.

    Args:
        stats: Statistics of the features.
        directions: Vectors v ``(r, d)``.

    Returns:
        ``(r,)``.
    """
    total = stats.counts.sum().clamp(min=1)
    shares = (stats.counts / total).sqrt().unsqueeze(1)
    sizes = root_sum_of_squares(norm(shares * stats.means, dim=0), stats.widths / total.sqrt())
    return stats.epsilon * norm(directions * sizes, dim=1)


def noise_of(stats: ClassStatistics, rounding: Tensor) -> Tensor:
    """What rounding before the last operation may leave, too: 64 times one rounding.

    So much does, say, a LayerNorm that subtracts a mean of 64 times the spread. In half precision so many roundings
    would be features themselves: there it is one.

    Args:
        stats: Statistics of the features.
        rounding: Of them, :func:`rounding_along` some directions.

    Returns:
        In the shape of ``rounding``.
    """
    return torch.where(stats.epsilon <= _FINE, _ROUNDINGS, 1) * rounding


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
