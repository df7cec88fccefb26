r"""The optimum of the problem of the groups where no formula is known, to round-off.

The problem is solved in factors :math:`\hat Z = \hat H \hat W^\top` with the penalty
:math:`\frac\rho2 (\|\hat W\|^2 + \|\hat H\|^2)`: L-BFGS from a random start with factors as wide as they can be, then
Newton steps by conjugate gradients with factors as wide as the rank found. Started at zero, conjugate gradients stay
orthogonal to the null space of the Hessian, the rotations of the factors, and so take the step of the pseudo-inverse.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from nclightning.problems.groups import Factors

if TYPE_CHECKING:
    from collections.abc import Callable

    from nclightning.problems.groups import Groups

__all__ = ["solve"]

# Singular values of the logits below this part of the largest one are those of directions that vanish: a factor that
# vanishes is small on both sides.
_RANK = 1e-10
# Multipliers may exceed the strength by this part before the rank is raised.
_EXCESS = 1e-9
_HISTORY, _LBFGS_STEPS, _NEWTON_STEPS, _CG_STEPS = 20, 3000, 60, 3000
# Change of the value, relative to it, at which descent ends; gradient, relative to the point, that tells a solution.
_LEAST_CHANGE, _GRADIENT = 1e-10, 1e-9
# Newton steps without a gradient below half of the least.
_PATIENCE = 10


class _Point(NamedTuple):
    weight: Tensor
    features: Tensor
    bias: Tensor | None

    def flat(self) -> Tensor:
        return torch.cat([t.reshape(-1) for t in self if t is not None])


class _State(NamedTuple):
    """Value, gradient and what the products with the Hessian need at a point. The unit is the strength."""

    point: _Point
    logits: Tensor
    multipliers: Tensor
    value: float
    gradient: Tensor


class _Factored:
    """The objective in factors, divided by the strength."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        self.roots = groups.counts.sqrt().unsqueeze(1)
        self.num_groups, self.num_classes = groups.targets.shape

    def split(self, flat: Tensor) -> _Point:
        K, M = self.num_classes, self.num_groups
        outputs = 0 if self.groups.lambda_b is None else K
        width = (len(flat) - outputs) // (K + M)
        weight, features, bias = torch.split(flat, [K * width, M * width, outputs])
        return _Point(weight.view(K, width), features.view(M, width), bias if outputs else None)

    def at(self, flat: Tensor) -> _State:
        groups, point = self.groups, self.split(flat)
        weight, features, bias = point
        logits = groups.logits(features @ weight.T, bias)
        residual = groups.loss.residual(logits, groups.targets)
        multipliers = groups.scaled(residual) / groups.strength
        value = float(groups.mean_loss(logits)) / groups.strength
        value += float(weight.square().sum() + features.square().sum()) / 2
        parts = [multipliers.T @ features + weight, multipliers @ weight + features]
        if bias is not None:
            pull = groups.shares @ residual
            if groups.lambda_b:
                pull = pull + groups.lambda_b * bias
                value += groups.lambda_b / groups.strength / 2 * float(bias.square().sum())
            parts.append(pull / groups.strength)
        gradient = torch.cat([part.reshape(-1) for part in parts])
        return _State(point, logits, multipliers, value, gradient)

    def across(self, state: _State) -> Tensor:
        """Gradient without what rounding leaves of it along rotations of the factors, and shifts of a free bias."""
        weight, features, bias = self.split(state.gradient.clone())
        w, h, _ = state.point
        values, axes = torch.linalg.eigh(w.T @ w + h.T @ h)
        along = axes.T @ (w.T @ weight + h.T @ features) @ axes
        sums = values.unsqueeze(1) + values
        # Directions that have vanished in both factors cannot be told from their rotations.
        there = sums > torch.finfo(sums.dtype).eps * values.max()
        turn = axes @ torch.where(there, (along - along.T) / sums, 0) @ axes.T
        if bias is not None and self.groups.shift_is_free:
            bias = bias - bias.mean()
        return _Point(weight - w @ turn, features - h @ turn, bias).flat()

    def product(self, state: _State, flat: Tensor) -> Tensor:
        """Hessian times a vector."""
        groups, move = self.groups, self.split(flat)
        change = move.features @ state.point.weight.T + state.point.features @ move.weight.T
        change = change / self.roots if move.bias is None else change / self.roots + move.bias
        bent = groups.loss.curvature(state.logits, groups.targets, change)
        scaled = groups.scaled(bent) / groups.strength
        parts = [
            scaled.T @ state.point.features + state.multipliers.T @ move.features + move.weight,
            scaled @ state.point.weight + state.multipliers @ move.weight + move.features,
        ]
        if move.bias is not None:
            assert groups.lambda_b is not None
            parts.append((groups.shares @ bent + groups.lambda_b * move.bias) / groups.strength)
        return torch.cat([part.reshape(-1) for part in parts])


def solve(groups: Groups, bias_at_zero: Tensor | None, seed: int = 0) -> Factors:
    """Find the optimum.

    Args:
        groups: The problem, whose optimum is not zero.
        bias_at_zero: Best bias for logits zero, None without a bias.
        seed: Of the start.

    Returns:
        Its factors, balanced and sorted by singular value.
    """
    objective = _Factored(groups)
    start = _start(groups, bias_at_zero, torch.Generator().manual_seed(seed))
    flat = _descend(objective, start.flat(), _LEAST_CHANGE)
    for attempt in range(1, 5):
        narrow, least = _newton(objective, _balanced(_decompose(objective.split(flat))).flat())
        factors = _decompose(objective.split(narrow))
        if least > _GRADIENT * float(narrow.norm()):  # The start was too far away.
            flat = _descend(objective, flat, _LEAST_CHANGE * 1e-2**attempt)
            continue
        missing = _missing_direction(groups, factors)
        if missing is None:
            break
        flat = _descend(objective, _widened(factors, missing).flat(), _LEAST_CHANGE)
    return factors


def _start(groups: Groups, bias: Tensor | None, generator: torch.Generator) -> _Point:
    """Small factors along the multipliers at zero, and noise, so that no direction is left out."""
    zero = torch.zeros_like(groups.targets)
    multipliers = groups.multipliers(zero if bias is None else zero + bias) / groups.strength
    left, singular, right = torch.linalg.svd(-multipliers, full_matrices=False)
    # Where the loss is locally a multiple of the squared error this is the optimum, up to a factor.
    size = (groups.num_samples * groups.strength * (singular - 1).clamp(min=0)).sqrt()
    noise = 0.01 * float(size.max()) / math.sqrt(len(size))
    draw = [noise * torch.randn(s.shape, dtype=s.dtype, device="cpu", generator=generator) for s in (right.T, left)]
    return _Point(right.T * size + draw[0], left * size + draw[1], bias)


def _descend(objective: _Factored, start: Tensor, least_change: float) -> Tensor:
    """L-BFGS, begun again until that gains nothing.

    When the value hardly changes, torch's optimizer, which takes no curvature from products of step and change below
    1e-10, has become steepest descent: it ends at changes of ``least_change`` times the value, and the Newton steps
    take over.
    """
    x, value = start, objective.at(start).value
    for _ in range(20):
        before, x = value, _lbfgs(objective, x, least_change * abs(value))
        value = objective.at(x).value
        if before - value <= 1e4 * least_change * abs(value):
            break
    return x


def _lbfgs(objective: _Factored, start: Tensor, least_change: float) -> Tensor:
    x = start.clone().requires_grad_()
    scale = float(start.norm()) / math.sqrt(len(start))
    optimizer = torch.optim.LBFGS(
        [x],
        max_iter=_LBFGS_STEPS,
        max_eval=2 * _LBFGS_STEPS,
        tolerance_grad=1e-6 * scale,
        tolerance_change=least_change,
        history_size=_HISTORY,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        state = objective.at(x.detach())
        x.grad = state.gradient
        return state.value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return x.detach()


def _newton(objective: _Factored, start: Tensor) -> tuple[Tensor, float]:
    """Newton steps; the point with the least gradient, and its norm.

    Close to a threshold a factor w that vanishes has a gradient like w^3, and a step of its own size moves the gradient
    of the others like w^2, which the next step corrects. So the gradient may grow for a while.
    """
    state = objective.at(start)
    x, size = start, float(state.gradient.norm())
    best, least, waiting = x, size, 0
    for _ in range(_NEWTON_STEPS):
        norm = float(x.norm())
        rounding = 1e-16 * norm
        if least <= rounding or waiting > (2 if least < 1e-13 * norm else _PATIENCE):
            break
        goal = max(min(0.1, math.sqrt(size / norm)) * size, 2 * rounding)
        step = _conjugate_gradients(partial(objective.product, state), -objective.across(state), goal)
        # Of a step that is out of all proportion only a part is taken.
        longest = max(size, math.sqrt(size * norm))
        for halving in range(20):
            trial = x + 0.5**halving * step
            after = objective.at(trial)
            if float(after.gradient.norm()) <= longest:
                break
        else:
            break
        x, state, size = trial, after, float(after.gradient.norm())
        best, least, waiting = (x, size, 0) if size < 0.5 * least else (best, least, waiting + 1)
    return best, least


def _conjugate_gradients(product: Callable[[Tensor], Tensor], right: Tensor, goal: float) -> Tensor:
    """Solve until the residual has the norm ``goal``; at negative curvature the step so far is returned."""
    x, residual = torch.zeros_like(right), right.clone()
    direction, square = residual.clone(), float(residual.square().sum())
    for _ in range(min(_CG_STEPS, 20 * len(right))):
        image = product(direction)
        curvature = float(direction @ image)
        if curvature <= 0:
            return x if bool(x.any()) else right
        step = square / curvature
        x = x + step * direction
        residual = residual - step * image
        before, square = square, float(residual.square().sum())
        if math.sqrt(square) <= goal:
            break
        direction = residual + (square / before) * direction
    return x


def _decompose(point: _Point) -> Factors:
    """Singular values of the product of the factors, from those of their triangles."""
    q_h, r_h = torch.linalg.qr(point.features)
    q_w, r_w = torch.linalg.qr(point.weight)
    left, singular, right = torch.linalg.svd(r_h @ r_w.T)
    kept = singular > _RANK * singular.max() if len(singular) else singular > 0
    return Factors((q_h @ left)[:, kept], singular[kept], (q_w @ right.T)[:, kept], point.bias)


def _balanced(factors: Factors) -> _Point:
    root = factors.singular.sqrt()
    return _Point(factors.right * root, factors.left * root, factors.bias)


def _missing_direction(groups: Groups, factors: Factors) -> tuple[Tensor, Tensor] | None:
    """A direction outside of the factors whose multiplier is above the strength."""
    multipliers = groups.multipliers(groups.logits(factors.scaled_logits, factors.bias)) / groups.strength
    rest = multipliers - factors.left @ (factors.left.T @ multipliers)
    rest = rest - (rest @ factors.right) @ factors.right.T
    left, singular, right = torch.linalg.svd(-rest, full_matrices=False)
    if float(singular[0]) <= 1 + _EXCESS:
        return None
    over = singular > 1 + _EXCESS
    return left[:, over], right[over].T


def _widened(factors: Factors, missing: tuple[Tensor, Tensor]) -> _Point:
    point, (left, right) = _balanced(factors), missing
    size = 1e-3 * float(factors.singular.max()) ** 0.5 if len(factors.singular) else 1e-3
    return _Point(
        torch.cat([point.weight, size * right], dim=1),
        torch.cat([point.features, size * left], dim=1),
        point.bias,
    )
