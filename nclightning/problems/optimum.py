r"""The optimum of the group problem, with its multipliers and its certificate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from nclightning.problems.groups import Factors, Groups
from nclightning.problems.no_answer import NoAnswer
from nclightning.problems.solving import solve

__all__ = ["Multipliers", "Optimum", "find_optimum", "multipliers_at_zero"]

# Zero is taken for optimal if the norm of the multipliers exceeds the strength by at most this number of roundings.
_ROUNDINGS = 16


class Multipliers(NamedTuple):
    """Singular value decomposition of the multipliers outside of the range of the optimal logits.

    Attributes:
        fractions: Singular values divided by the strength ``(p,)``, descending, at most 1.
        left: Left singular vectors ``(M, p)``.
        right: Right singular vectors ``(K, p)``.
    """

    fractions: Tensor
    left: Tensor
    right: Tensor


@dataclass(frozen=True, eq=False)
class Optimum:
    """The unique optimal logits of the groups, and their certificate.

    Attributes:
        groups: The group problem.
        factors: Singular value decomposition of the scaled optimal logits, and the optimal bias.
        method: ``"closed form"`` or ``"numerical"``.
        duality_gap: Value minus the lower bound that the multipliers certify: the value exceeds the minimum by at most
            this. Rounding may make it slightly negative. ``nan`` with fewer features than the rank, where the optimum
            is known from the Eckart-Young theorem instead.

    Example:
        >>> from nclightning.problems import unbalanced_ce
        >>> problem = unbalanced_ce([100, 100, 2, 2], feature_dim=3, lambda_w=0.01, lambda_h=0.01)
        >>> optimum = problem.optimum
        >>> optimum.method, optimum.rank, optimum.duality_gap < 1e-10
        ('numerical', 2, True)
        >>> optimum.logits.round(decimals=2)  # one row per class
        tensor([[ 2.0500, -1.2200, -0.4100, -0.4100],
                [-1.2200,  2.0500, -0.4100, -0.4100],
                [-0.6400, -0.6400,  0.6400,  0.6400],
                [-0.6400, -0.6400,  0.6400,  0.6400]], dtype=torch.float64)
    """

    groups: Groups
    factors: Factors
    method: Literal["closed form", "numerical"]
    duality_gap: float

    @property
    def rank(self) -> int:
        """Rank r of the scaled optimal logits; 0 where zero is optimal."""
        return len(self.factors.singular)

    @cached_property
    def value(self) -> float:
        """The minimum F*."""
        return self.groups.value(self.factors)

    @cached_property
    def logits(self) -> Tensor:
        """Optimal logits of the groups ``(M, K)``, bias included."""
        return self.groups.logits(self.factors.scaled_logits, self.factors.bias)

    @cached_property
    def inactive(self) -> Multipliers:
        """Multipliers of the directions that vanish at the optimum."""
        left, _, right, _ = self.factors
        rest = self.groups.multipliers(self.logits) / self.groups.strength
        # The second projection removes the rounding error of the first, which may be as large as the rest itself.
        for _ in range(2):
            rest = rest - left @ (left.T @ rest)
            rest = rest - (rest @ right) @ right.T
        u, fractions, vh = torch.linalg.svd(-rest, full_matrices=False)
        # Directions with a zero multiplier are dropped: they may lie in the range of the optimal logits.
        kept = fractions > 1e-12
        kept[max(0, len(fractions) - self.rank) :] = False
        fractions = torch.where(fractions > 1 - _ROUNDINGS * torch.finfo(fractions.dtype).eps, 1, fractions)
        return Multipliers(fractions[kept], u[:, kept], vh[kept].T)

    def cut(self, rank: int) -> Optimum:
        """Keep the largest singular values only. This is the optimum for few features if a theorem says so."""
        left, singular, right, bias = self.factors
        factors = Factors(left[:, :rank], singular[:rank], right[:, :rank], bias)
        if bias is not None and self.groups.lambda_b:
            bias = self.groups.best_bias(self.groups.logits(factors.scaled_logits, None), bias)
        return Optimum(self.groups, factors._replace(bias=bias), self.method, math.nan)

    @property
    def margin(self) -> float:
        """Relative distance of the largest multiplier of a vanishing direction from the strength; 0 at a threshold.

        At a threshold a class is about to appear, or two merged classes are about to separate. No error bound is valid
        there.
        """
        fractions = self.inactive.fractions
        return 1 - float(fractions[0]) if len(fractions) else 1.0


def multipliers_at_zero(groups: Groups) -> tuple[Tensor, Tensor | None]:
    """Return the multipliers ``(M, K)`` at logits zero with the best bias, and that bias."""
    _check_bias(groups)
    zero = torch.zeros_like(groups.targets)
    bias = None if groups.lambda_b is None else groups.best_bias(zero, torch.zeros_like(zero[0]))
    return groups.multipliers(zero if bias is None else zero + bias), bias


def find_optimum(groups: Groups, tolerance: float) -> Optimum:
    """Find the optimum and certify it.

    Args:
        groups: The group problem.
        tolerance: Largest duality gap, relative to the minimum, with which the result is accepted.

    Returns:
        The optimum.

    Raises:
        NoAnswer: If the duality gap is larger.
    """
    _check_bias(groups)
    factors, method = groups.loss.closed_form(groups), "closed form"
    if factors is None:
        merged, index = _merged(groups)
        factors, method = _expand(_solved(merged), groups, merged, index), "numerical"
    value = groups.value(factors)
    gap = value - float(groups.lower_bound_at(groups.logits(factors.scaled_logits, factors.bias)))
    # The minimum is at most the value at zero, and both have rounding errors of this size.
    zero = torch.zeros_like(groups.targets)
    rounding = 64 * torch.finfo(zero.dtype).eps * abs(float(groups.mean_loss(zero)))
    accepted = gap <= tolerance * abs(value) + rounding
    if accepted and rounding > tolerance * abs(value):  # Their difference is only rounding.
        excess, blur = groups.excess(factors)
        accepted, gap = excess <= tolerance * abs(value) + blur, max(gap, excess)
    if not accepted:
        raise NoAnswer(
            "optimum",
            f"the best point found has the value {value:.9g} with a certified gap of {gap:.3g}, above the tolerance of "
            f"{tolerance:.1g} times the value. Raise tolerance to accept it.",
        )
    return Optimum(groups, factors, method, gap)  # type: ignore[arg-type]


def _check_bias(groups: Groups) -> None:
    """Raise an error if a free bias would grow without bound."""
    reason = groups.loss.unattained(groups.targets) if groups.lambda_b == 0 else None
    if reason is not None:
        raise NoAnswer("optimum", f"F has no minimum with a free bias: {reason}. Penalize the bias, or take none.")


def _solved(groups: Groups) -> Factors:
    """Find the optimum numerically."""
    matrix, bias = multipliers_at_zero(groups)
    norm = float(torch.linalg.matrix_norm(matrix, 2))
    if norm <= groups.strength * (1 + _ROUNDINGS * torch.finfo(matrix.dtype).eps):
        return Factors(matrix[:, :0], matrix[0, :0], matrix.T[:, :0], bias)
    return solve(groups, bias)


def _merged(groups: Groups) -> tuple[Groups, Tensor]:
    """Merge groups with equal targets; return the merged problem and the index of the merged group of each group."""
    unique, index = torch.unique(groups.targets, dim=0, return_inverse=True)
    # The order of first occurrence keeps the own class on the diagonal, by which exchangeable classes are found.
    rows = torch.arange(len(index), device=index.device)
    first = rows.new_full((len(unique),), len(rows)).scatter_reduce(0, index, rows, "amin")
    order = first.argsort()
    targets, index = groups.targets[first[order]], order.argsort()[index]
    counts = groups.counts.new_zeros(len(targets)).index_add_(0, index, groups.counts)
    return Groups(groups.loss, targets, counts, groups.strength, groups.lambda_b), index


def _expand(factors: Factors, groups: Groups, merged: Groups, index: Tensor) -> Factors:
    """Convert factors of a merged problem to those of the original groups."""
    part = (groups.counts / merged.counts[index]).sqrt().unsqueeze(1)
    return factors._replace(left=part * factors.left[index])
