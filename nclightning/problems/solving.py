r"""The optimum of the group problem where no formula is known, to round-off.

Divided by the strength :math:`\rho`, the problem is :math:`\min f(Z) + \|Z\|_*`, where f is the mean loss plus the
penalty on a bias. A point is optimal if and only if it is the soft threshold of :math:`Y = Z - t \nabla f(Z)`. There
are two phases:

1. Newton's method on the augmented Lagrangian, which is smooth and convex. It comes close to the optimum from anywhere.
2. Newton's method on the optimality condition, as an equation for Y. It converges to round-off.

Both need f to be strictly convex up to a shift that the loss ignores. Unlike the Hessian in factors
:math:`Z = H W^\top`, the systems are regular even at thresholds, where a direction is about to vanish.

The systems are solved by conjugate gradients in the axes of the singular vectors of Y, where the derivative of the soft
threshold is diagonal. :mod:`nclightning.problems.preconditioning` has the preconditioners.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from nclightning.problems.invariant_points import Coordinates, Parts
from nclightning.problems.preconditioning import DiagonalInverse, LowRankInverse, NormHessian, Pieces
from nclightning.problems.row_hessians import Flanks, Peaks, RowHessians
from nclightning.problems.thresholding import InAxes, Threshold, apply

if TYPE_CHECKING:
    from nclightning.problems.groups import Factors, Groups

__all__ = ["solve"]

# Largest numbers of values of t; of Newton steps for each of them (a step may divide the probabilities of wrong classes
# by little more than e, so that many are needed); and of conjugate-gradient steps.
_OUTER, _INNER, _CG_STEPS = 20, 150, 1000
# The constants below compare the norm of a gradient with the norm of the multipliers.
# Phase 1 minimises each augmented Lagrangian to this relative gradient.
_CLOSE = 1e-2
# Relative gradient of a solution, and the one that is rounding only.
_SOLVED, _ROUNDING = 1e-10, 1e-15
# A gradient that comes from this number of roundings of the residuals is accepted, since it cannot be reduced.
_ROUNDINGS = 16
# Phase 2 starts from this relative gradient on.
_NEAR = 0.3
# Phase 2 stops after this number of steps without halving the gradient, or if it grows by this factor.
_PATIENCE, _DIVERGED = 3, 100
# Along a step, each row of the loss must keep this fraction of its curvature.
_KEPT_CURVATURE = 0.1
_TINY = torch.finfo(torch.float64).tiny


def solve(groups: Groups, bias_at_zero: Tensor | None) -> Factors:
    """Find the optimum.

    Args:
        groups: The problem. Its optimum must not be zero.
        bias_at_zero: Best bias for logits zero; None without a bias.

    Returns:
        Factors of the optimum, sorted by singular value. If the method does not converge, those of the best point.
    """
    smooth = _SmoothPart(groups)
    x = smooth.coordinates.zero(bias_at_zero)
    _, gradient = smooth.gradient(x)
    multipliers = gradient.map(torch.neg)
    thresholded = _SoftThreshold(smooth.coordinates.weights, multipliers, 1.0)
    # For the squared error this is the largest singular value of the optimum.
    t = groups.num_samples * groups.strength * (thresholded.largest() - 1)
    along, multipliers = thresholded.kept(), thresholded.subgradient()
    along = along.map(lambda part: groups.num_samples * groups.strength * part)._replace(bias=torch.zeros_like(x.bias))
    best, least = thresholded, math.inf
    for count in range(_OUTER):
        x, thresholded = _augmented(smooth, x, multipliers, t, None if count else along)
        kept, multipliers = thresholded.kept(), thresholded.subgradient()
        found, size = _newton(smooth, _SoftThreshold(smooth.coordinates.weights, kept.plus(multipliers, t), t))
        if size < least:
            best, least = found, size
        if least <= max(_SOLVED, smooth.noise / multipliers.norm()):
            break
        t /= 3
    return best.factors(smooth.coordinates)


class _SmoothPart:
    """f, the smooth part of the objective."""

    def __init__(self, groups: Groups) -> None:
        self.groups, self.coordinates = groups, Coordinates(groups)
        self.loss, self.targets, self.strength = groups.loss, self.coordinates.targets, groups.strength
        self.pull = (groups.lambda_b or 0.0) / groups.strength
        # Norm of the gradient that rounding of the targets can cause. Targets of 0 and 1 have no rounding.
        rounding = self.coordinates.gradient(self.targets * (1 - self.targets)).norm()
        self.noise = _ROUNDINGS * torch.finfo(self.targets.dtype).eps * rounding
        self.noise /= self.strength

    def gradient(self, parts: Parts) -> tuple[Tensor, Parts]:
        """Compute the logits of a point, and the gradient there."""
        logits = self.coordinates.logits(parts)
        return logits, self._back(self.loss.residual(logits, self.targets), parts.bias)

    def hessians(self, logits: Tensor, row_factors: Tensor) -> RowHessians:
        """Return the Hessians of the loss of each row."""
        return RowHessians(self.loss, logits, self.targets, row_factors)

    def product(self, hessians: RowHessians, move: Parts) -> Parts:
        """Multiply the Hessian with a direction."""
        return self._back(hessians.product(self.coordinates.logits(move)), move.bias)

    def row_factors(self, logits: Tensor, subgradient: Parts) -> Tensor:
        """Return factors, at least 1, by which the Hessians of rows on flat parts of the loss are multiplied.

        Without them the step of such a row would be much longer than its logits and would dominate the whole step.
        """
        pull = self.groups.num_samples * self.strength * self.coordinates.logits(subgradient)
        rows = self.loss.residual(logits, self.targets) + pull
        square = rows.square().sum(dim=1)
        product = (rows * self.loss.curvature(logits, self.targets, rows)).sum(dim=1)
        longest = 3 + logits.max(dim=1).values - logits.min(dim=1).values
        row_factors = square * square.sqrt() / (longest * product).clamp(min=_TINY)
        return row_factors.clamp(1, 1e8).unsqueeze(1)

    def _back(self, rows: Tensor, bias: Tensor) -> Parts:
        """Map gradients in the logits, and a change of the bias, to a gradient in coordinates."""
        found = self.coordinates.gradient(rows / self.strength)
        return found._replace(bias=found.bias + self.pull * bias)

    def longest(self, logits: Tensor, move: Parts, length: float = 1.0) -> float:
        """Shorten a step until every row keeps its curvature. Newton's method would not return from a flat part."""
        change = self.coordinates.logits(move)
        share = self.coordinates.row_sizes * self.coordinates.counts

        def product(at: Tensor) -> Tensor:
            return share * (change * self.loss.curvature(at, self.targets, change)).sum(dim=1)

        before = product(logits)
        counted = before > 1e-6 * before.sum()
        for _ in range(40):
            if bool((product(logits + length * change) >= _KEPT_CURVATURE * before)[counted].all()):
                break
            length *= 0.5
        return length


class _SoftThreshold:
    """The soft threshold of all singular values of a point Y."""

    def __init__(self, weights: Tensor, parts: Parts, t: float) -> None:
        self.core, self.t = Threshold(parts.core, t), t
        self.weights, self.differences, self.bias = weights, parts.differences, parts.bias
        self.is_kept = parts.differences.abs() > t * weights

    def largest(self) -> float:
        """Largest singular value."""
        values: list[float] = [*self.core.values[:1].tolist(), *(self.differences.abs() / self.weights).tolist()]
        return max(values)

    def kept(self) -> Parts:
        """The soft threshold."""
        differences = torch.where(self.is_kept, self.differences - self.t * self.weights * self.differences.sign(), 0)
        return Parts(self.core.kept, differences, self.bias)

    def subgradient(self) -> Parts:
        """A subgradient of the nuclear norm at the soft threshold."""
        differences = torch.where(self.is_kept, self.weights * self.differences.sign(), self.differences / self.t)
        return Parts(self.core.subgradient, differences, torch.zeros_like(self.bias))

    def factors(self, coordinates: Coordinates) -> Factors:
        """Compute the singular value decomposition of the soft threshold."""
        rank = int((self.core.kept_values > 0).sum())
        left, right = (axes[:, :rank] for axes in (self.core.left, self.core.right))
        return coordinates.factors(left, self.core.kept_values[:rank], right, self.kept())


class _State(NamedTuple):
    """A point of a Newton iteration: the gradient that shall become zero, and what a step needs."""

    point: Parts
    thresholded: _SoftThreshold
    logits: Tensor
    gradient: Parts
    row_factors: Tensor

    @property
    def size(self) -> float:
        """Norm of the gradient divided by that of the multipliers."""
        return self.gradient.norm() / self.thresholded.subgradient().norm()


def _augmented(
    smooth: _SmoothPart, x: Parts, multipliers: Parts, t: float, along: Parts | None
) -> tuple[Parts, _SoftThreshold]:
    """Minimize the augmented Lagrangian roughly: f plus the nuclear norm, smoothed by t around the multipliers.

    The first step goes along a given direction. At logits zero, a Newton step would be so long that some rows would end
    far on the wrong side.
    """

    def at(x: Parts) -> _State:
        thresholded = _SoftThreshold(smooth.coordinates.weights, x.plus(multipliers, t), t)
        logits, gradient = smooth.gradient(x)
        subgradient = thresholded.subgradient()
        return _State(x, thresholded, logits, gradient.plus(subgradient), smooth.row_factors(logits, subgradient))

    state = at(x)
    for count in range(_INNER):
        if count and state.size <= _CLOSE:
            break
        step = along if along is not None and not count else _System(smooth, state, smoothed=True).solve(0.1)
        slope = state.gradient.dot(step)
        if not slope < 0:  # The gradient is only rounding.
            break
        # The length is found from slopes, which increase along the step. Values of the objective are of no use: their
        # rounding may exceed the strength.
        low, low_slope, high, high_slope = 0.0, slope, math.inf, math.inf
        length = smooth.longest(state.logits, step)
        for trial in range(30):
            after = at(state.point.plus(step, length))
            now = after.gradient.dot(step)
            if abs(now) <= (0.5 if count else 0.05) * abs(slope):
                break
            if now < 0:
                low, low_slope = length, now
            else:
                high, high_slope = length, now
            if high < math.inf:
                root = low_slope / (low_slope - high_slope) if high_slope > low_slope else 0.5
                length = low + (high - low) * min(max(root, 0.1), 0.9)
            elif (count and trial >= 3) or smooth.longest(state.logits, step, 2 * length) < 2 * length:
                break
            else:
                length *= 2
        state = after
    return state.point, state.thresholded


def _newton(smooth: _SmoothPart, start: _SoftThreshold) -> tuple[_SoftThreshold, float]:
    """Solve the optimality condition; return the best point and its relative gradient."""
    t, weights = start.t, start.weights

    def at(thresholded: _SoftThreshold) -> _State:
        kept = thresholded.kept()
        logits, gradient = smooth.gradient(kept)
        return _State(
            kept, thresholded, logits, gradient.plus(thresholded.subgradient()), torch.ones_like(logits[:, :1])
        )

    state = at(start)
    best, least, waiting = state, state.size, 0
    if least > _NEAR:
        return start, least
    while least > _ROUNDING and waiting <= (0 if least <= 1e-2 * _SOLVED else _PATIENCE):
        size = state.size
        system = _System(smooth, state, smoothed=False)
        step = system.solve(min(1e-3, max(math.sqrt(size), 1e-16 / size)))
        # The system gives the step of the soft threshold. The step of Y follows from it.
        rest = smooth.product(system.hessians, step).plus(state.gradient)
        move = step.plus(rest._replace(bias=torch.zeros_like(rest.bias)), -t)
        y = state.point.plus(state.thresholded.subgradient(), t).plus(move)
        if not math.isfinite(y.norm()):
            break
        state = at(_SoftThreshold(weights, y, t))
        if not state.size <= _DIVERGED * least:
            break
        waiting = 0 if state.size <= 0.5 * least else waiting + 1
        if state.size < least:
            best, least = state, state.size
    return best.thresholded, least


class _System:
    """The symmetric linear system of a Newton step, with its preconditioners.

    The unknown is the step of the soft threshold in the axes of the singular vectors, as one vector. The matrix is the
    Hessian of f plus that of the nuclear norm, smoothed (phase 1) or not (phase 2). The latter is infinite across
    directions that the threshold removes; there the step is zero.
    """

    def __init__(self, smooth: _SmoothPart, state: _State, smoothed: bool) -> None:
        self.smooth, self.state = smooth, state
        self.hessians = smooth.hessians(state.logits, state.row_factors)
        thresholded, core = state.thresholded, state.thresholded.core
        self.core = core
        kept = thresholded.is_kept.to(thresholded.differences)
        differences = (1 - kept) / thresholded.t if smoothed else torch.zeros_like(kept)
        self.norm_hessian = NormHessian(
            *core.hessian_of_norm(smoothed), differences, torch.ones_like(kept) if smoothed else kept, smooth.pull
        )
        columns = 0 if not core.has_rest else smooth.coordinates.shape[0]
        self.shapes = (
            (core.left.shape[1], core.right.shape[1]),
            (columns, core.size),
            thresholded.differences.shape,
            thresholded.bias.shape,
        )

    def solve(self, part: float) -> Parts:
        """Run conjugate gradients until the preconditioned residual has fallen by the factor ``part``."""
        residual = -self._to_axes(self.state.gradient)
        precondition, direction = self._preconditioned(residual)
        x, square = torch.zeros_like(residual), float(residual @ direction)
        first = square
        for _ in range(_CG_STEPS):
            image = self._product(direction)
            curvature = float(direction @ image)
            if not curvature > 0:
                break
            x = x + square / curvature * direction
            residual = residual - square / curvature * image
            image = self._applied(precondition, residual)
            before, square = square, float(residual @ image)
            if not square > part**2 * first:
                break
            direction = image + square / before * direction
        return self._from_axes(x)

    def _preconditioned(self, residual: Tensor) -> tuple[DiagonalInverse | LowRankInverse, Tensor]:
        """Return the best available preconditioner, and its product with the residual."""
        peaks = None if self.core.has_rest else self.hessians.peaks()
        if peaks is not None:
            left, right = self.core.left, self.core.right
            roots = Peaks(peaks.heights / self.smooth.strength, *peaks[1:])
            low_rank = self.smooth.coordinates.low_rank(roots, left, right)
            has_low_rank = LowRankInverse(self.norm_hessian, self._curvatures(peaks.flanks), low_rank)
            if has_low_rank.is_valid:
                image = self._applied(has_low_rank, residual)
                if float(residual @ image) > 0:
                    return has_low_rank, image
        diagonal = DiagonalInverse(self.norm_hessian, self._curvatures(self.hessians))
        return diagonal, self._applied(diagonal, residual)

    def _curvatures(self, hessians: RowHessians | Flanks) -> Pieces:
        """Compute the second derivatives of the mean loss along the axes; for the bias its full Hessian."""
        coordinates, core = self.smooth.coordinates, self.core
        inner = coordinates.curvatures(hessians, core.left, core.right)
        rest = inner[:0, : core.size]
        if core.has_rest:
            axes = torch.eye(coordinates.shape[0], dtype=inner.dtype, device=inner.device)
            rest = coordinates.curvatures(hessians, axes, core.right)
        found = inner, rest, coordinates.curvatures_of_differences(hessians), coordinates.hessian_of_bias(hessians)
        return Pieces(*(part / self.smooth.strength for part in found))

    def _product(self, flat: Tensor) -> Tensor:
        """Multiply the matrix of the system with a vector."""
        inner, rest, differences, bias = self._split(flat)
        image = self._to_axes(self.smooth.product(self.hessians, self._from_axes(flat)))
        core = apply(self.norm_hessian.core, InAxes(inner, rest))
        return image + Pieces(*core, self.norm_hessian.differences * differences, torch.zeros_like(bias)).flat()

    def _applied(self, precondition: DiagonalInverse | LowRankInverse, flat: Tensor) -> Tensor:
        """Multiply a preconditioner with a vector."""
        image = precondition(self._split(flat))
        return image._replace(rest=self.core.without_left(image.rest)).flat()

    def _to_axes(self, parts: Parts) -> Tensor:
        """Transform coordinates into the axes of the singular vectors, as one vector."""
        return Pieces(*self.core.to_axes(parts.core), parts.differences, parts.bias).flat()

    def _from_axes(self, flat: Tensor) -> Parts:
        """Transform a vector in the axes of the singular vectors back into coordinates."""
        inner, rest, differences, bias = self._split(flat)
        return Parts(self.core.from_axes(InAxes(inner, rest)), differences, bias)

    def _split(self, flat: Tensor) -> Pieces:
        """Split a vector into its parts."""
        pieces = torch.split(flat, [math.prod(shape) for shape in self.shapes])
        return Pieces(*(piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)))
