"""NC2 beyond simplex ETFs: how evenly rows cover the sphere when ``K > d + 1``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from nclightning.errors import UserError
from nclightning.functional.geometry import check_rows
from nclightning.functional.linear import apart, distances, unit_rows

__all__ = ["PairEnergy", "hyperspherical_energy", "one_vs_rest_distance"]


class PairEnergy(NamedTuple):
    """Mean and variance of a kernel over pairs of directions.

    Attributes:
        mean: Mean over all ordered pairs of distinct rows; its natural logarithm with ``log=True``.
        variance: Population variance over the same pairs; its natural logarithm with ``log=True``.
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

    Liu et al. (2023), generalised neural collapse. A small mean says that directions are spread out, a small variance
    that they are so evenly; a simplex ETF has variance 0. Pairs are formed tile by tile: memory grows with K.

    Args:
        rows: ``(K, d)``: the head, or ``stats.centred_means`` with ``stats.present``. Computed in their dtype.
        kernel: ``"log"`` or ``"riesz"``.
        exponent: Riesz exponent s, positive. The Newtonian choice d - 2 over- or underflows for large d without
            ``log``.
        log: For the Riesz kernel, return logarithms of mean and variance, finite for every exponent.
        present: Rows to compare, bool ``(K,)``; None takes all.
        tile: Rows of a tile; None chooses.

    Returns:
        Mean and variance. Mean ``inf`` and variance ``nan`` for two equal directions; ``nan`` with a zero row or
        fewer than two rows.

    Raises:
        ValueError: If an argument is out of range.
    """
    present = check_rows("rows", rows, present)
    if kernel not in ("log", "riesz") or (log and kernel == "log"):
        raise UserError(f"kernel must be 'log' or 'riesz', and log=True needs 'riesz', got {kernel!r} and {log}.")
    if not exponent > 0:
        raise UserError(f"exponent must be positive, got {exponent}.")
    unit, count = unit_rows(rows), present.sum()
    num_pairs = count * (count - 1)
    # Kernels are taken relative to the closest pair, whose logarithm is added back at the end.
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
    r"""Measure the margin of directions: the distance of each from the convex hull of all others (GNC2).

    .. math:: \min_k \operatorname{dist}\bigl(u_k, \operatorname{conv}\{u_j : j \ne k\}\bigr), \qquad
        u_k = m_k / \|m_k\|

    Jiang et al. (2024): softmax codes maximise it; a simplex ETF has :math:`K/(K-1)`. One quadratic program per row,
    solved by accelerated projected gradient steps for a tile of rows at once, until the duality gap proves the
    accuracy. It reads one flag per hundred steps on the host; meant for the end of a reading, not for a batch.

    Args:
        rows: ``(K, d)``: the head or the centred class means, without absent classes. Computed in float64.
        reduction: ``"min"``, or ``"none"`` for each row ``(K,)``.
        rtol: Relative accuracy of each distance; below ``rtol`` of the unit sphere's radius an absolute one.
        max_iterations: Bound on the steps.
        tile: Rows solved at once; None chooses.

    Returns:
        Non-negative float64; ``nan`` with a zero row.

    Raises:
        ValueError: If an argument is out of range.
        ValueError: If ``max_iterations`` steps did not reach ``rtol``.
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
    """Distances of the rows ``part`` from the hulls of the others."""
    target = unit.index_select(0, part)
    excluded = part.unsqueeze(1) == torch.arange(len(unit), device=unit.device)
    step = 1 / torch.linalg.matrix_norm(unit, 2).square()
    # Convex coefficients of each point of a hull; momentum restarts where it points uphill.
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
            # No point of the hull is closer than the supporting plane at this one.
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
    """Sum or maximum of a function of the distance over all pairs of rows that are present."""
    parts = []
    outside = 0.0 if how == "sum" else -math.inf
    for part, distance in distances(unit, tile):
        pair = apart(part, present)
        values = torch.where(pair, value(torch.where(pair, distance, 1)), outside)
        parts.append(values.sum() if how == "sum" else values.amax())
    return torch.stack(parts).sum() if how == "sum" else torch.stack(parts).amax()
