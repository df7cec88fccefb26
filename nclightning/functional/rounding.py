"""What rounding of the features explains: below it a difference of class means is none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nclightning.functional.linear import autocast_off, norm, root_sum_of_squares, zero_where

if TYPE_CHECKING:
    from nclightning.functional.statistics import ClassStatistics

__all__ = [
    "FINE",
    "averaged",
    "beyond_rounding",
    "least_spread",
    "mean_rounding",
    "noise_of",
    "rounding_along",
    "rounding_of",
]

# Roundings that operations before the last one may add up to, in dtypes that are finer than this.
_ROUNDINGS, FINE = 64, 2**-20
# Where samples of a class spread by more roundings than this, their roundings are independent of each other.
_INDEPENDENT = 4
# So many rows show in which dtype features were rounded, of at least and about at most so many numbers.
_ROWS_SHOWN, _LEAST_ROWS, _NUMBERS_SHOWN, _MOST_NUMBERS = 512, 64, 2048, 2**17
# If so many of them are not zero: in data that are made by hand there are numbers of few bits, but not of many.
_LEAST_NUMBERS = {torch.float32: 16, torch.float16: 256, torch.bfloat16: 256}
# So many bits must be zero that rounding alone would not make zero, for numbers to be taken for multiples of a step.
_BITS_OF_A_GRID = 32
# Of numbers that were rounded to a dtype half use its last bit; at least this share must.
_LEAST_SHARE = 1 / 8
_NARROWER = {
    torch.float64: (torch.float32, torch.float16, torch.bfloat16),
    torch.float32: (torch.float16, torch.bfloat16),
}
_HALF = torch.finfo(torch.float16)


def mean_rounding(stats: ClassStatistics) -> Tensor:
    r"""What rounding of the features explains of the mean of each class.

    .. math:: \epsilon\,(\|\mu_k\|^2 + v_k)^{1/2}

    One rounding of a sample; where the samples of a class spread by more than that, roundings are independent of each
    other, and it is :math:`1/\sqrt{n_k}` of it.

    Args:
        stats: Statistics of the features, whose ``epsilon`` it is; :math:`v_k` is the mean squared distance of a class
            from its mean.

    Returns:
        ``(K,)``.
    """
    spread = stats.norms / stats.counts.clamp(min=1).sqrt()
    size = root_sum_of_squares(norm(stats.means, dim=1), spread)
    least = _smallest_normal(stats.epsilon) * stats.means.shape[1] ** 0.5
    return averaged(stats.epsilon * torch.maximum(size, least), spread, stats.counts)


def rounding_along(stats: ClassStatistics, directions: Tensor) -> Tensor:
    r"""What rounding of the features explains of their spread along directions.

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
    return stats.epsilon * norm(directions * torch.maximum(sizes, _smallest_normal(stats.epsilon)), dim=1)


def beyond_rounding(stats: ClassStatistics, each: bool) -> Tensor:
    """Centred class means that exceed rounding of the features.

    Args:
        stats: Statistics of the features.
        each: Whether each is judged by itself, or all together.

    Returns:
        ``(K, d)``; zero where they do not, and for absent classes.
    """
    centred, rounding = stats.centre_means(), stats.mean_rounding * stats.present
    sizes, total = norm(centred, dim=1), norm(rounding, dim=0)
    if each:
        of_centre = total / stats.present.sum().clamp(min=1)
        away = sizes > root_sum_of_squares(rounding, of_centre.expand_as(rounding))
    else:
        away = (norm(sizes, dim=0) > total).expand_as(sizes)
    return torch.where((away | centred.isnan().any(dim=1)).unsqueeze(1), centred, 0)


def averaged(rounding: Tensor, spread: Tensor, counts: Tensor) -> Tensor:
    """Rounding of a mean of so many samples with such a root mean square spread and such a rounding of each."""
    return torch.where(spread > _INDEPENDENT * rounding, rounding / counts.clamp(min=1).sqrt(), rounding)


def noise_of(stats: ClassStatistics, rounding: Tensor) -> Tensor:
    """What rounding before the last operation may leave, too: 64 times one rounding.

    So much does, say, a LayerNorm that subtracts a mean of 20 times the spread. In half precision so many roundings
    would be features themselves: there it is one.

    Args:
        stats: Statistics of the features.
        rounding: Of them, :func:`rounding_along` some directions.

    Returns:
        In the shape of ``rounding``.
    """
    return torch.where(stats.epsilon <= FINE, _ROUNDINGS, 1) * rounding


def least_spread(stats: ClassStatistics, rounding: Tensor, largest: Tensor) -> Tensor:
    """Spread within classes up to which features do not spread along a direction but for rounding.

    One rounding; up to :func:`noise_of` where they spread a hundred times further in another direction: noise of some
    roundings is noise, as long as it is nowhere larger.

    Args:
        stats: Statistics of the features.
        rounding: Of them, :func:`rounding_along` some directions.
        largest: Spread in the direction of the largest, in the same unit.

    Returns:
        In the shape of ``rounding``.
    """
    return torch.maximum(rounding, torch.minimum(noise_of(stats, rounding), largest / 100))


def _smallest_normal(epsilon: Tensor) -> Tensor:
    """Smallest normal number of the dtype with this machine epsilon: smaller ones are rounded no finer than it."""
    # bfloat16 has the range of float32.
    least = torch.where(epsilon == _HALF.eps, epsilon.new_full((), _HALF.tiny), torch.finfo(torch.float32).tiny)
    return torch.where(epsilon < FINE / 2**20, torch.finfo(torch.float64).tiny, least)


def rounding_of(features: Sequence[Tensor], labels: Sequence[Tensor], num_classes: int) -> Tensor:
    """Tell to which precision features were rounded, by their dtype and by their values.

    Features that were computed in bfloat16, say, and then cast to float32 carry the rounding of bfloat16. They show it:
    all of them are numbers of bfloat16, and many use its last bit. A few numbers show nothing, nor do numbers that are
    multiples of a step, such as integers.

    Args:
        features: Pieces ``(N, d)``.
        labels: Of each piece, ``num_classes`` for rows that are left out.
        num_classes: K.

    Returns:
        Float64 ``(2,)``: machine epsilon that they show, ``inf`` if they show none; and that of the dtypes.
    """
    dim = features[0].shape[1]
    most = max(min(_ROWS_SHOWN, _MOST_NUMBERS // dim), _LEAST_ROWS, _NUMBERS_SHOWN // dim)
    most = -(-most // len(features))  # Of each piece.
    rows = []
    for each, index in zip(features, labels, strict=True):
        if len(each) > most:
            # Spread over the whole piece without a period that a data set may have, too.
            some = torch.arange(most, device=each.device) * 2_654_435_761 % len(each)
            each, index = each.index_select(0, some), index.index_select(0, some)  # noqa: PLW2901
        rows.append((each, index == num_classes))
    with autocast_off(features[0].device):
        shown = _shown(zero_where(*map(torch.cat, zip(*rows, strict=True))))
    return torch.stack([shown, torch.full_like(shown, min(torch.finfo(each.dtype).eps for each in features))])


def _shown(rows: Tensor) -> Tensor:
    """Machine epsilon that numbers show; ``inf`` if they may have been rounded to several dtypes, or to none."""
    own = torch.full((), torch.finfo(rows.dtype).eps, dtype=torch.float64, device=rows.device)
    shown, fit = torch.full_like(own, torch.inf), torch.zeros_like(own, dtype=torch.bool)
    for dtype in _NARROWER.get(rows.dtype, ()):
        # The rest takes ten times as long; on another device so does asking. Of most features a few rows tell.
        if rows.is_cpu and not (_are_of(dtype, rows[:8]) and _are_of(dtype, rows)):
            if dtype == torch.float32:
                break  # No half precision has numbers that it has not.
            continue
        representable = _are_of(dtype, rows)
        shown = torch.where(representable & _was_rounded(rows.double(), dtype), torch.finfo(dtype).eps, shown)
        fit = fit | representable
    return torch.where(fit, shown, own)


def _are_of(dtype: torch.dtype, rows: Tensor) -> Tensor:
    """Whether all numbers are numbers of a dtype."""
    return (rows.to(dtype).to(rows.dtype) == rows).all()


def _was_rounded(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether numbers of a dtype are what rounding to it makes of numbers, rather than short ones by themselves."""
    info, used = torch.finfo(dtype), rows != 0
    least = rows.new_full((), info.smallest_normal)

    def spacing(numbers: Tensor) -> Tensor:
        return info.eps * torch.exp2(torch.frexp(torch.maximum(numbers, least)).exponent.to(rows) - 1)

    size = rows.abs()
    fine, coarse = spacing(size), spacing(size.amax())
    odd = (torch.remainder(size / fine, 2) == 1) & used
    # Smaller numbers have a finer spacing. Each of its bits that is zero in all of them speaks for a common step.
    bits = torch.where(used, torch.frexp(coarse / fine).exponent - 1, 0).sum()
    have_a_step = (torch.remainder(size, coarse) == 0).all() & (bits >= _BITS_OF_A_GRID)
    return (used.sum() >= _LEAST_NUMBERS[dtype]) & (odd.sum() >= _LEAST_SHARE * used.sum()) & have_a_step.logical_not()
