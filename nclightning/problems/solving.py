r"""The optimum of the problem of the groups where no formula is known, to round-off.

In units of the strength the problem is :math:`\min f(Z) + \|Z\|_*`, with f the mean loss and the penalty on a bias. A
point is optimal iff it is the soft threshold of :math:`Y = Z - t \nabla f(Z)`. Newton's method on the augmented
Lagrangian, which is smooth and convex, comes close to the optimum from anywhere; Newton's method on that condition, as
an equation for Y, ends it. Both need f to be strictly convex on what the loss tells apart, and no more: unlike the
Hessian in factors :math:`Z = H W^\top`, the system is regular also at thresholds, where a direction is about to vanish.

The systems are solved by conjugate gradients in the axes of the singular vectors of Y. The derivative of the threshold
is diagonal there, and the preconditioner takes that of the loss to be so, but for the likeliest class of each row.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from nclightning.problems.alike import Coordinates, Parts
from nclightning.problems.curved import Curved, Flanks, Peaks
from nclightning.problems.preconditioning import Bends, Diagonal, Peaked, Pieces
from nclightning.problems.thresholding import Threshold, Turned, apply

if TYPE_CHECKING:
    from nclightning.problems.groups import Factors, Groups

__all__ = ["solve"]

# Values of t; Newton steps with one of them, each of which may divide the probabilities of wrong classes by little more
# than e; steps of conjugate gradients.
_OUTER, _INNER, _CG_STEPS = 20, 150, 1000
# Part of the multipliers that the gradient of the augmented Lagrangian is let be.
_CLOSE = 1e-2
# Gradient, as part of the multipliers, that a solution has, and that rounding explains.
_SOLVED, _ROUNDING = 1e-10, 1e-15
# Roundings of the residuals that a gradient may come from where Newton's method makes it no smaller.
_ROUNDINGS = 16
# Gradient, as part of the multipliers, from which Newton's method is tried on the condition.
_NEAR = 0.3
# Newton steps for the condition without a gradient below half of the least; factor of the least that is given up at.
_PATIENCE, _DIVERGED = 3, 100
# Part of its curvature that a row of the loss must keep along a step.
_KEPT_CURVATURE = 0.1
_TINY = torch.finfo(torch.float64).tiny


def solve(groups: Groups, bias_at_zero: Tensor | None) -> Factors:
    """Find the optimum.

    Args:
        groups: The problem, whose optimum is not zero.
        bias_at_zero: Best bias for logits zero, None without a bias.

    Returns:
        Its factors, sorted by singular value; the best point found if the method does not converge.
    """
    smooth = _Smooth(groups)
    x = smooth.coordinates.zero(bias_at_zero)
    _, gradient = smooth.gradient(x)
    multipliers = gradient.map(torch.neg)
    shrunk = _Shrunk(smooth.coordinates.weights, multipliers, 1.0)
    # Where the loss is a multiple of the squared error this is the largest singular value of the optimum.
    t = groups.num_samples * groups.strength * (shrunk.largest() - 1)
    along, multipliers = shrunk.kept(), shrunk.subgradient()
    along = along.map(lambda part: groups.num_samples * groups.strength * part)._replace(bias=torch.zeros_like(x.bias))
    best, least = shrunk, math.inf
    for count in range(_OUTER):
        x, shrunk = _augmented(smooth, x, multipliers, t, None if count else along)
        kept, multipliers = shrunk.kept(), shrunk.subgradient()
        found, size = _newton(smooth, _Shrunk(smooth.coordinates.weights, kept.plus(multipliers, t), t))
        if size < least:
            best, least = found, size
        if least <= max(_SOLVED, smooth.noise / multipliers.norm()):
            break
        t /= 3
    return best.factors(smooth.coordinates)


class _Smooth:
    """f, the part of the objective that is smooth."""

    def __init__(self, groups: Groups) -> None:
        self.groups, self.coordinates = groups, Coordinates(groups)
        self.loss, self.targets, self.strength = groups.loss, self.coordinates.targets, groups.strength
        self.pull = (groups.lambda_b or 0.0) / groups.strength
        # What the gradient may be where residuals have the rounding of targets, which those of 0 and 1 have not.
        rounding = self.coordinates.gradient(self.targets * (1 - self.targets)).norm()
        self.noise = _ROUNDINGS * torch.finfo(self.targets.dtype).eps * rounding
        self.noise /= self.strength

    def gradient(self, parts: Parts) -> tuple[Tensor, Parts]:
        """Logits of a point, and the gradient there."""
        logits = self.coordinates.logits(parts)
        return logits, self._back(self.loss.residual(logits, self.targets), parts.bias)

    def curved(self, logits: Tensor, stress: Tensor) -> Curved:
        """Hessians of the rows of the loss."""
        return Curved(self.loss, logits, self.targets, stress)

    def product(self, curved: Curved, move: Parts) -> Parts:
        """Hessian times a direction."""
        return self._back(curved.product(self.coordinates.logits(move)), move.bias)

    def stress(self, logits: Tensor, subgradient: Parts) -> Tensor:
        """Factors of the curvatures of rows on flat parts of the loss, ``(R, 1)``.

        Without them a step of such a row would be far longer than its logits, and all of the step would be about it.
        """
        pull = self.groups.num_samples * self.strength * self.coordinates.logits(subgradient)
        rows = self.loss.residual(logits, self.targets) + pull
        square = rows.square().sum(dim=1)
        bent = (rows * self.loss.curvature(logits, self.targets, rows)).sum(dim=1)
        longest = 3 + logits.max(dim=1).values - logits.min(dim=1).values
        stress = square * square.sqrt() / (longest * bent).clamp(min=_TINY)
        return stress.clamp(1, 1e8).unsqueeze(1)

    def _back(self, rows: Tensor, bias: Tensor) -> Parts:
        found = self.coordinates.gradient(rows / self.strength)
        return found._replace(bias=found.bias + self.pull * bias)

    def longest(self, logits: Tensor, move: Parts, length: float = 1.0) -> float:
        """Shorten a step until the curvature collapses in no row: from there Newton's method would not come back."""
        change = self.coordinates.logits(move)
        share = self.coordinates.row_sizes * self.coordinates.counts

        def bent(at: Tensor) -> Tensor:
            return share * (change * self.loss.curvature(at, self.targets, change)).sum(dim=1)

        before = bent(logits)
        counted = before > 1e-6 * before.sum()
        for _ in range(40):
            if bool((bent(logits + length * change) >= _KEPT_CURVATURE * before)[counted].all()):
                break
            length *= 0.5
        return length


class _Shrunk:
    """The soft threshold at a point Y, of all its singular values."""

    def __init__(self, weights: Tensor, parts: Parts, t: float) -> None:
        self.core, self.t = Threshold(parts.core, t), t
        self.weights, self.apart, self.bias = weights, parts.apart, parts.bias
        self.is_kept = parts.apart.abs() > t * weights

    def largest(self) -> float:
        """Largest singular value."""
        values: list[float] = [*self.core.values[:1].tolist(), *(self.apart.abs() / self.weights).tolist()]
        return max(values)

    def kept(self) -> Parts:
        """The soft threshold."""
        apart = torch.where(self.is_kept, self.apart - self.t * self.weights * self.apart.sign(), 0)
        return Parts(self.core.kept, apart, self.bias)

    def subgradient(self) -> Parts:
        """Subgradient of the nuclear norm at the soft threshold."""
        apart = torch.where(self.is_kept, self.weights * self.apart.sign(), self.apart / self.t)
        return Parts(self.core.subgradient, apart, torch.zeros_like(self.bias))

    def factors(self, coordinates: Coordinates) -> Factors:
        """Decompose the soft threshold."""
        rank = int((self.core.kept_values > 0).sum())
        left, right = (axes[:, :rank] for axes in (self.core.left, self.core.right))
        return coordinates.factors(left, self.core.kept_values[:rank], right, self.kept())


class _State(NamedTuple):
    """A point, its soft threshold, what Newton's method is to make zero, and factors of the rows' curvatures."""

    point: Parts
    shrunk: _Shrunk
    logits: Tensor
    gradient: Parts
    stress: Tensor

    @property
    def size(self) -> float:
        """Norm of the gradient, as part of that of the multipliers."""
        return self.gradient.norm() / self.shrunk.subgradient().norm()


def _augmented(smooth: _Smooth, x: Parts, multipliers: Parts, t: float, along: Parts | None) -> tuple[Parts, _Shrunk]:
    """Minimize the augmented Lagrangian roughly: f plus the nuclear norm smoothed by t about the multipliers.

    The first step goes along a direction that is given: at logits zero those of Newton's method would be so long that
    some rows end far on the wrong side.
    """

    def at(x: Parts) -> _State:
        shrunk = _Shrunk(smooth.coordinates.weights, x.plus(multipliers, t), t)
        logits, gradient = smooth.gradient(x)
        subgradient = shrunk.subgradient()
        return _State(x, shrunk, logits, gradient.plus(subgradient), smooth.stress(logits, subgradient))

    state = at(x)
    for count in range(_INNER):
        if count and state.size <= _CLOSE:
            break
        step = along if along is not None and not count else _System(smooth, state, smoothed=True).solve(0.1)
        slope = state.gradient.dot(step)
        if not slope < 0:  # All that is left is rounding.
            break
        # The slope along the step grows. Its values are those of the loss, whose rounding may be above the strength.
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
    return state.point, state.shrunk


def _newton(smooth: _Smooth, start: _Shrunk) -> tuple[_Shrunk, float]:
    """Solve the condition of the optimum; the best point, and its gradient as part of the multipliers."""
    t, weights = start.t, start.weights

    def at(shrunk: _Shrunk) -> _State:
        kept = shrunk.kept()
        logits, gradient = smooth.gradient(kept)
        return _State(kept, shrunk, logits, gradient.plus(shrunk.subgradient()), torch.ones_like(logits[:, :1]))

    state = at(start)
    best, least, waiting = state, state.size, 0
    if least > _NEAR:
        return start, least
    while least > _ROUNDING and waiting <= (0 if least <= 1e-2 * _SOLVED else _PATIENCE):
        size = state.size
        system = _System(smooth, state, smoothed=False)
        step = system.solve(min(1e-3, max(math.sqrt(size), 1e-16 / size)))
        # The step is one of the soft threshold; that of Y follows.
        rest = smooth.product(system.curved, step).plus(state.gradient)
        move = step.plus(rest._replace(bias=torch.zeros_like(rest.bias)), -t)
        y = state.point.plus(state.shrunk.subgradient(), t).plus(move)
        if not math.isfinite(y.norm()):
            break
        state = at(_Shrunk(weights, y, t))
        if not state.size <= _DIVERGED * least:
            break
        waiting = 0 if state.size <= 0.5 * least else waiting + 1
        if state.size < least:
            best, least = state, state.size
    return best.shrunk, least


class _System:
    """The equations of a Newton step, symmetric, and their preconditioners.

    The unknown is the step of the soft threshold, in the axes of the singular vectors, as one vector. The matrix is the
    Hessian of f plus that of the nuclear norm: of the smoothed one, or of the norm itself, which is infinite across
    directions that are not kept; there the step is zero.
    """

    def __init__(self, smooth: _Smooth, state: _State, smoothed: bool) -> None:
        self.smooth, self.state = smooth, state
        self.curved = smooth.curved(state.logits, state.stress)
        shrunk, core = state.shrunk, state.shrunk.core
        self.core = core
        kept = shrunk.is_kept.to(shrunk.apart)
        apart = (1 - kept) / shrunk.t if smoothed else torch.zeros_like(kept)
        self.bends = Bends(*core.bend(smoothed), apart, torch.ones_like(kept) if smoothed else kept, smooth.pull)
        columns = 0 if not core.has_rest else smooth.coordinates.shape[0]
        self.shapes = (
            (core.left.shape[1], core.right.shape[1]),
            (columns, core.size),
            shrunk.apart.shape,
            shrunk.bias.shape,
        )

    def solve(self, part: float) -> Parts:
        """Conjugate gradients, until the residual in the norm of the preconditioner is a part of that at zero."""
        residual = -self._turn(self.state.gradient)
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
        return self._turn_back(x)

    def _preconditioned(self, residual: Tensor) -> tuple[Diagonal | Peaked, Tensor]:
        """The better preconditioner that there is, and what it makes of the residual."""
        peaks = None if self.core.has_rest else self.curved.peaks()
        if peaks is not None:
            left, right = self.core.left, self.core.right
            roots = Peaks(peaks.heights / self.smooth.strength, *peaks[1:])
            leads = self.smooth.coordinates.leads(roots, left, right)
            peaked = Peaked(self.bends, self._curvatures(peaks.flanks), leads)
            if peaked.is_valid:
                image = self._applied(peaked, residual)
                if float(residual @ image) > 0:
                    return peaked, image
        diagonal = Diagonal(self.bends, self._curvatures(self.curved))
        return diagonal, self._applied(diagonal, residual)

    def _curvatures(self, curved: Curved | Flanks) -> Pieces:
        """Second derivatives of f without the penalty on the bias, of which the Hessian."""
        coordinates, core = self.smooth.coordinates, self.core
        inner = coordinates.curvatures(curved, core.left, core.right)
        rest = inner[:0, : core.size]
        if core.has_rest:
            axes = torch.eye(coordinates.shape[0], dtype=inner.dtype, device=inner.device)
            rest = coordinates.curvatures(curved, axes, core.right)
        found = inner, rest, coordinates.curvatures_of_apart(curved), coordinates.hessian_of_bias(curved)
        return Pieces(*(part / self.smooth.strength for part in found))

    def _product(self, flat: Tensor) -> Tensor:
        inner, rest, apart, bias = self._split(flat)
        image = self._turn(self.smooth.product(self.curved, self._turn_back(flat)))
        core = apply(self.bends.core, Turned(inner, rest))
        return image + Pieces(*core, self.bends.apart * apart, torch.zeros_like(bias)).flat()

    def _applied(self, precondition: Diagonal | Peaked, flat: Tensor) -> Tensor:
        image = precondition(self._split(flat))
        return image._replace(rest=self.core.without_left(image.rest)).flat()

    def _turn(self, parts: Parts) -> Tensor:
        return Pieces(*self.core.turn(parts.core), parts.apart, parts.bias).flat()

    def _turn_back(self, flat: Tensor) -> Parts:
        inner, rest, apart, bias = self._split(flat)
        return Parts(self.core.turn_back(Turned(inner, rest)), apart, bias)

    def _split(self, flat: Tensor) -> Pieces:
        pieces = torch.split(flat, [math.prod(shape) for shape in self.shapes])
        return Pieces(*(piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)))
