"""NC2 beyond simplex ETFs: how evenly rows cover the sphere when ``K > d + 1``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from nclightning.errors import UserError
from nclightning.functional.geometry import check_rows
from nclightning.functional.linear import distances, distinct_pairs, unit_rows

__all__ = ["PairEnergy", "hyperspherical_energy", "one_vs_rest_distance"]


class PairEnergy(NamedTuple):
    """Mean and variance of a kernel over pairs of directions.

    Attributes:
        mean: Mean over all ordered pairs of distinct rows; with ``log=True`` its natural logarithm.
        variance: Population variance over the same pairs; with ``log=True`` its natural logarithm.
    """

    mean: Tensor
    variance: Tensor


def hyperspherical_energy(
    rows: Tensor,
    kernel: Literal["log", "riesz"] = "log",
    exponent: float = 1.0,
    log: bool = False,
    present: Tensor | None = None,
    tile: int | None = None,
) -> PairEnergy:
    r"""Measure how evenly directions cover the sphere by the energy of their pairs (GNC2).

    .. math:: \text{log: } \ln \frac1{\|u_i - u_j\|}, \qquad \text{Riesz: } \|u_i - u_j\|^{-s}, \qquad
        u_k = m_k / \|m_k\|

    Liu et al. (2023), generalised neural collapse. A small mean says that the directions are far from each other, a
    small variance that their distances are equal. A simplex ETF has variance 0. Pairs are formed in tiles, so that
    memory grows with K, not with K^2.

    Args:
        rows: ``(K, d)``: the head, or ``stats.centred_means`` with ``stats.present``.
        kernel: ``"log"`` or ``"riesz"``.
        exponent: Riesz exponent s, positive. The Newtonian choice d - 2 over- or underflows for large d unless ``log``
            is set.
        log: For the Riesz kernel, return the logarithms of mean and variance, which are finite for every exponent.
        present: Rows to compare, bool ``(K,)``; None takes all.
        tile: Rows per tile; None chooses a number.

    Returns:
        Mean and variance in the dtype of ``rows``, dimensionless. For two equal directions the mean is ``inf`` and the
        variance ``nan``. Both are ``nan`` if a row is zero or fewer than two are present.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import torch
        >>> from nclightning.functional import hyperspherical_energy
        >>> energy = hyperspherical_energy(torch.tensor([[2.0, 0.0], [-1.0, 0.0]]), kernel="riesz")
        >>> energy.mean, energy.variance  # one pair, at distance 2
        (tensor(0.5000), tensor(0.))
    """
    present = check_rows("rows", rows, present)
    if kernel not in ("log", "riesz") or (log and kernel == "log"):
        raise UserError(f"kernel must be 'log' or 'riesz', and log=True needs 'riesz', got {kernel!r} and {log}.")
    if not exponent > 0:
        raise UserError(f"exponent must be positive, got {exponent}.")
    unit, count = unit_rows(rows), present.sum()
    num_pairs = count * (count - 1)
    # Kernels are divided by that of the closest pair, which keeps them in range; it is multiplied back at the end.
    nearest = _reduce(unit, present, tile, lambda distance: -distance.log(), "max")
    power = 1.0 if kernel == "log" else exponent

    def value(distance: Tensor) -> Tensor:
        height = power * (-distance.log() - nearest)
        return height if kernel == "log" else height.exp()

    mean = _reduce(unit, present, tile, value, "sum") / num_pairs
    variance = _reduce(unit, present, tile, lambda distance: (value(distance) - mean).square(), "sum") / num_pairs
    if kernel == "log":
        mean = mean + nearest
        return PairEnergy(torch.where(nearest.isposinf(), nearest, mean), variance)
    shift = exponent * nearest
    mean, variance = torch.where(nearest.isposinf(), nearest, mean.log() + shift), variance.log() + 2 * shift
    return PairEnergy(mean, variance) if log else PairEnergy(mean.exp(), variance.exp())


def one_vs_rest_distance(
    rows: Tensor,
    reduction: Literal["min", "none"] = "min",
    rtol: float = 1e-6,
    max_iterations: int = 20_000,
    tile: int | None = None,
) -> Tensor:
    r"""Measure the distance of each direction from the convex hull of all others (GNC2).

    .. math:: \min_k \operatorname{dist}\bigl(u_k, \operatorname{conv}\{u_j : j \ne k\}\bigr), \qquad
        u_k = m_k / \|m_k\|

    Jiang et al. (2024): softmax codes maximise the least of these distances. A simplex ETF has :math:`K/(K-1)`.

    There is one quadratic program per row. A tile of rows is solved at once by accelerated projected gradient steps in
    float64, until the duality gap proves the accuracy. The function waits for the device every hundred steps. It suits
    the end of an evaluation pass, but not every batch.

    Args:
        rows: ``(K, d)``: the head or the centred class means, without absent classes.
        reduction: ``"min"`` is the least distance, ``"none"`` gives the distance of each row ``(K,)``.
        rtol: Relative accuracy of each distance. For distances below ``rtol`` it is an absolute accuracy.
        max_iterations: Largest number of steps.
        tile: Rows per tile; None chooses a number.

    Returns:
        Non-negative value in float64, dimensionless; ``nan`` if a row is zero.

    Raises:
        ValueError: If an argument is out of range, or ``max_iterations`` steps do not reach ``rtol``.

    Example:
        >>> import torch
        >>> from nclightning.functional import one_vs_rest_distance
        >>> float(one_vs_rest_distance(torch.tensor([[1.0, 0.0], [-3.0, 0.0]])))  # an ETF of two classes: 2 / (2 - 1)
        2.0
    """
    check_rows("rows", rows)
    if reduction not in ("min", "none") or not rtol > 0:
        raise UserError(f"reduction must be 'min' or 'none' and rtol positive, got {reduction!r} and {rtol}.")
    unit = unit_rows(rows.detach().double())
    if not bool(unit.isfinite().all()):
        return unit.new_full((len(unit),) if reduction == "none" else (), math.nan)
    size = tile or max(2**22 // len(unit), 1)
    parts = torch.split(torch.arange(len(unit), device=unit.device), size)
    margins = torch.cat([_hull_distances(unit, part, rtol, max_iterations) for part in parts])
    return margins.amin() if reduction == "min" else margins


def _hull_distances(unit: Tensor, part: Tensor, rtol: float, max_iterations: int) -> Tensor:
    """Compute the distance of each row in ``part`` from the convex hull of all other rows."""
    target = unit.index_select(0, part)
    excluded = part.unsqueeze(1) == torch.arange(len(unit), device=unit.device)
    step = 1 / torch.linalg.matrix_norm(unit, 2).square()
    # A point of the hull is stored as its convex coefficients. Momentum restarts where it points uphill.
    here = torch.where(excluded, 0, 1 / (len(unit) - 1)).to(unit)
    ahead, momentum = here, here.new_ones(len(part), 1)
    for iteration in range(1, max_iterations + 1):
        gradient = (ahead @ unit - target) @ unit.T
        following = _project_on_simplex((ahead - step * gradient).masked_fill(excluded, -math.inf))
        uphill = ((ahead - following) * (following - here)).sum(dim=1, keepdim=True) > 0
        larger = torch.where(uphill, 1.0, (1 + (1 + 4 * momentum.square()).sqrt()) / 2)
        ahead = following + torch.where(uphill, 0.0, (momentum - 1) / larger) * (following - here)
        here, momentum = following, larger
        if iteration % 100 == 0:
            residual = here @ unit - target
            gradient = (residual @ unit.T).masked_fill(excluded, math.inf)
            squared = residual.square().sum(dim=1)
            # The supporting hyperplane at the current point bounds the distance of the hull from below.
            least = squared - ((residual * (here @ unit)).sum(dim=1) - gradient.amin(dim=1)).clamp(min=0)
            certified = (squared - least) <= rtol * torch.maximum(squared, torch.full_like(squared, rtol))
            if bool(certified.all()):
                return squared.sqrt()
    raise UserError(f"the hull distances did not reach rtol={rtol} in {max_iterations} steps: raise one of the two.")


def _project_on_simplex(rows: Tensor) -> Tensor:
    """Euclidean projection of each row on the probability simplex (Held, Wolfe and Crowder, 1974)."""
    ordered = rows.sort(dim=1, descending=True).values
    index = torch.arange(1, rows.shape[1] + 1, device=rows.device, dtype=rows.dtype)
    excess = (ordered.cumsum(dim=1) - 1) / index
    support = (ordered > excess).sum(dim=1, keepdim=True)
    return (rows - excess.gather(1, support - 1)).clamp(min=0)


def _reduce(unit: Tensor, present: Tensor, tile: int | None, value: Callable[[Tensor], Tensor], how: str) -> Tensor:
    """Compute the sum or maximum of a function of the distance over all pairs of present rows."""
    parts = []
    outside = 0.0 if how == "sum" else -math.inf
    for part, distance in distances(unit, tile):
        pair = distinct_pairs(part, present)
        values = torch.where(pair, value(torch.where(pair, distance, 1)), outside)
        parts.append(values.sum() if how == "sum" else values.amax())
    return torch.stack(parts).sum() if how == "sum" else torch.stack(parts).amax()
