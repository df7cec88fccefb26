"""How large the rounding errors of the features are. A difference of class means below them is taken for zero."""

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
    "accumulated_rounding",
    "beyond_rounding",
    "detected_epsilons",
    "mean_rounding",
    "rounding_along",
    "rounding_of_mean",
    "spread_of_rounding",
]

# The operations before the last one may accumulate up to 64 roundings. This is assumed for a machine epsilon of at most
# FINE, that is, not for half precision.
_ROUNDINGS, FINE = 64, 2**-20
# Where the samples of a class spread by more than this number of roundings, their rounding errors are independent.
_INDEPENDENT = 4
# The number of rows that are inspected to detect the dtype in which features were rounded, and its lower bound; the
# number of values that these rows should at least have, and the number that they should not much exceed.
_ROWS_INSPECTED, _LEAST_ROWS, _VALUES_INSPECTED, _MOST_VALUES = 512, 64, 2048, 2**17
# The number of nonzero values that the detection needs. Handmade data have values of few bits, but only a few values.
_LEAST_VALUES = {torch.float32: 16, torch.float16: 256, torch.bfloat16: 256}
# Values are taken for multiples of a common step, such as integers, if at least this number of their bits is zero that
# rounding alone would not make zero.
_ZERO_BITS_OF_A_GRID = 32
# Half of the values that were rounded to a dtype use its last bit; at least this share must do so.
_LEAST_SHARE = 1 / 8
_NARROWER = {
    torch.float64: (torch.float32, torch.float16, torch.bfloat16),
    torch.float32: (torch.float16, torch.bfloat16),
}
_HALF = torch.finfo(torch.float16)


def mean_rounding(stats: ClassStatistics) -> Tensor:
    r"""Bound the error in the mean of each class that rounding of the features causes.

    .. math:: \epsilon\,(\|\mu_k\|^2 + v_k)^{1/2}

    with :math:`v_k` the mean squared distance of the samples of a class from its mean. This is the rounding error of
    one sample. Where the samples of a class spread by more than that, their rounding errors are independent, and the
    bound is divided by :math:`\sqrt{n_k}`.

    Args:
        stats: Statistics of the features; their ``epsilon`` is :math:`\epsilon`.

    Returns:
        ``(K,)``, in the unit of the features.
    """
    spread = stats.norms / stats.counts.clamp(min=1).sqrt()
    size = root_sum_of_squares(norm(stats.means, dim=1), spread)
    least = _smallest_normal(stats.epsilon) * stats.means.shape[1] ** 0.5
    return rounding_of_mean(stats.epsilon * torch.maximum(size, least), spread, stats.counts)


def rounding_along(stats: ClassStatistics, directions: Tensor) -> Tensor:
    r"""Bound the root mean square spread along directions that rounding of the features causes.

    .. math:: \epsilon \Bigl(\sum_j v_j^2 \tfrac1N \sum_i h_{ij}^2\Bigr)^{1/2}

    Each coordinate contributes the rounding error of its own size. With one error for all coordinates, a few large
    coordinates would hide real spread in the others.

    Args:
        stats: Statistics of the features.
        directions: Vectors v ``(r, d)``.

    Returns:
        ``(r,)``, in the unit of the features.
    """
    total = stats.counts.sum().clamp(min=1)
    shares = (stats.counts / total).sqrt().unsqueeze(1)
    sizes = root_sum_of_squares(norm(shares * stats.means, dim=0), stats.widths / total.sqrt())
    return stats.epsilon * norm(directions * torch.maximum(sizes, _smallest_normal(stats.epsilon)), dim=1)


def beyond_rounding(stats: ClassStatistics, each: bool) -> Tensor:
    """Set centred class means to zero that do not exceed rounding of the features.

    Args:
        stats: Statistics of the features.
        each: True decides for each class mean by itself, False for all of them together.

    Returns:
        Centred class means ``(K, d)``; zero also for absent classes.
    """
    centred, rounding = stats.centre_means(), stats.mean_rounding * stats.present
    sizes, total = norm(centred, dim=1), norm(rounding, dim=0)
    if each:
        of_global_mean = total / stats.present.sum().clamp(min=1)
        exceeds = sizes > root_sum_of_squares(rounding, of_global_mean.expand_as(rounding))
    else:
        exceeds = (norm(sizes, dim=0) > total).expand_as(sizes)
    return torch.where((exceeds | centred.isnan().any(dim=1)).unsqueeze(1), centred, 0)


def rounding_of_mean(rounding: Tensor, spread: Tensor, counts: Tensor) -> Tensor:
    """Bound the rounding error of a mean.

    Args:
        rounding: Rounding error of one sample.
        spread: Root mean square distance of the samples from their mean.
        counts: Number of samples.

    Returns:
        In the shape of ``rounding``.
    """
    return torch.where(spread > _INDEPENDENT * rounding, rounding / counts.clamp(min=1).sqrt(), rounding)


def accumulated_rounding(stats: ClassStatistics, rounding: Tensor) -> Tensor:
    """Bound the error that all operations of the network accumulate: 64 roundings.

    For example, a LayerNorm that subtracts a mean of 20 times the spread accumulates about this number. In half
    precision 64 roundings are as large as features themselves, so that only one is assumed there.

    Args:
        stats: Statistics of the features.
        rounding: Result of :func:`rounding_along` for some directions.

    Returns:
        In the shape of ``rounding``.
    """
    return torch.where(stats.epsilon <= FINE, _ROUNDINGS, 1) * rounding


def spread_of_rounding(stats: ClassStatistics, rounding: Tensor, largest: Tensor) -> Tensor:
    """Bound the within-class spread along a direction that is nothing but rounding.

    The bound is one rounding. Where the features spread a hundred times further in another direction, it is up to
    :func:`accumulated_rounding`.

    Args:
        stats: Statistics of the features.
        rounding: Result of :func:`rounding_along` for some directions.
        largest: Largest spread in any direction, in the same unit.

    Returns:
        In the shape of ``rounding``.
    """
    return torch.maximum(rounding, torch.minimum(accumulated_rounding(stats, rounding), largest / 100))


def _smallest_normal(epsilon: Tensor) -> Tensor:
    """Smallest normal number of the dtype with this machine epsilon: numbers below it have its absolute rounding."""
    # bfloat16 has the exponent range of float32.
    least = torch.where(epsilon == _HALF.eps, epsilon.new_full((), _HALF.tiny), torch.finfo(torch.float32).tiny)
    return torch.where(epsilon < FINE / 2**20, torch.finfo(torch.float64).tiny, least)


def detected_epsilons(features: Sequence[Tensor], labels: Sequence[Tensor], num_classes: int) -> Tensor:
    """Detect the precision to which features were rounded, from their values and from their dtype.

    Features that were computed in bfloat16, say, and then cast to float32 have the rounding errors of bfloat16. Their
    values reveal it: all of them are representable in bfloat16, and many use its last bit. A few values are not enough
    for this conclusion, nor are multiples of a common step, such as integers.

    Args:
        features: Tensors ``(N, d)``.
        labels: Labels of each tensor, ``num_classes`` for rows that are left out.
        num_classes: K.

    Returns:
        Float64 ``(2,)``: the machine epsilon detected from the values, ``inf`` if there is none; and the machine
        epsilon of the dtypes.
    """
    dim = features[0].shape[1]
    most = max(min(_ROWS_INSPECTED, _MOST_VALUES // dim), _LEAST_ROWS, _VALUES_INSPECTED // dim)
    most = -(-most // len(features))  # Of each tensor.
    rows = []
    for each, index in zip(features, labels, strict=True):
        if len(each) > most:
            # Rows from all over the tensor, at no regular interval: the data set may repeat at a regular interval.
            some = torch.arange(most, device=each.device) * 2_654_435_761 % len(each)
            each, index = each.index_select(0, some), index.index_select(0, some)  # noqa: PLW2901
        rows.append((each, index == num_classes))
    with autocast_off(features[0].device):
        shown = _epsilon_of_values(zero_where(*map(torch.cat, zip(*rows, strict=True))))
    return torch.stack([shown, torch.full_like(shown, min(torch.finfo(each.dtype).eps for each in features))])


def _epsilon_of_values(rows: Tensor) -> Tensor:
    """Machine epsilon detected from values; ``inf`` if they fit several dtypes, or a dtype they were not rounded to."""
    own = torch.full((), torch.finfo(rows.dtype).eps, dtype=torch.float64, device=rows.device)
    shown, fit = torch.full_like(own, torch.inf), torch.zeros_like(own, dtype=torch.bool)
    for dtype in _NARROWER.get(rows.dtype, ()):
        # The steps below take ten times as long as this check. On another device than the CPU the check itself would,
        # since it waits for the device. A few rows are tried first: for most features they decide.
        if rows.is_cpu and not (_are_representable(dtype, rows[:8]) and _are_representable(dtype, rows)):
            if dtype == torch.float32:
                break  # Half-precision numbers are float32 numbers, so that none of those dtypes fits either.
            continue
        representable = _are_representable(dtype, rows)
        shown = torch.where(representable & _was_rounded(rows.double(), dtype), torch.finfo(dtype).eps, shown)
        fit = fit | representable
    return torch.where(fit, shown, own)


def _are_representable(dtype: torch.dtype, rows: Tensor) -> Tensor:
    """Whether all values are representable in a dtype."""
    return (rows.to(dtype).to(rows.dtype) == rows).all()


def _was_rounded(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether values look rounded to a dtype, rather than being numbers of few bits to begin with."""
    info, used = torch.finfo(dtype), rows != 0
    least = rows.new_full((), info.smallest_normal)

    def spacing(numbers: Tensor) -> Tensor:
        return info.eps * torch.exp2(torch.frexp(torch.maximum(numbers, least)).exponent.to(rows) - 1)

    size = rows.abs()
    fine, coarse = spacing(size), spacing(size.amax())
    odd = (torch.remainder(size / fine, 2) == 1) & used
    # Smaller values have a finer spacing. Where they do not use it, they are probably multiples of a common step.
    bits = torch.where(used, torch.frexp(coarse / fine).exponent - 1, 0).sum()
    have_a_step = (torch.remainder(size, coarse) == 0).all() & (bits >= _ZERO_BITS_OF_A_GRID)
    return (used.sum() >= _LEAST_VALUES[dtype]) & (odd.sum() >= _LEAST_SHARE * used.sum()) & have_a_step.logical_not()
