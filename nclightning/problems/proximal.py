r"""Newton's method on scaled logits: the augmented Lagrangian first, then the condition of the optimum itself.

The unit is the strength, so that the penalty is the nuclear norm. A point is optimal iff the soft threshold of
:math:`Z - t \nabla f(Z)` is Z again. As f is strictly convex on what a loss tells apart, the steps are well defined also
where a direction is about to vanish, at thresholds, where the Hessian in factors is singular. Conjugate gradients are
preconditioned in the axes of the singular vectors, where the derivative of the threshold is diagonal, and that of the
loss is taken to be.
"""

from __future__ import annotations

import os, sys, time
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from nclightning.problems.alike import Coordinates, Parts
from nclightning.problems.thresholding import Threshold, Turned, apply, inverse

if TYPE_CHECKING:
    from collections.abc import Callable

    from nclightning.problems.groups import Factors, Groups

__all__ = ["find"]

_DEBUG = bool(os.environ.get("DBG"))
COUNT = {"cg": 0, "svd": 0}


class _Vector(NamedTuple):
    inner: Tensor
    rest: Tensor
    apart: Tensor
    bias: Tensor

    def dot(self, other):
        return float(sum((a * b).sum() for a, b in zip(self, other, strict=True)))

    def plus(self, other, times):
        return _Vector(*(a + times * b for a, b in zip(self, other, strict=True)))


class _Smooth:
    """Mean loss and penalty on the bias, over the strength."""

    def __init__(self, groups: Groups) -> None:
        self.groups, self.coordinates = groups, Coordinates(groups)
        self.pull = (groups.lambda_b or 0.0) / groups.strength

    def gradient(self, parts: Parts) -> tuple[Tensor, Parts]:
        logits = self.coordinates.logits(parts)
        found = self.coordinates.gradient(self.groups.loss.residual(logits, self.coordinates.targets) / self.groups.strength)
        return logits, found._replace(bias=found.bias + self.pull * parts.bias)

    def product(self, logits: Tensor, move: Parts) -> Parts:
        rows = self.coordinates.logits(move)
        bent = self.groups.loss.curvature(logits, self.coordinates.targets, rows) / self.groups.strength
        found = self.coordinates.gradient(bent)
        return found._replace(bias=found.bias + self.pull * move.bias)


    def longest(self, logits, move, length=1.0):
        """Part of a step along which the curvature does not collapse in any row."""
        rows = self.coordinates.logits(move)
        loss, targets = self.groups.loss, self.coordinates.targets
        share = self.coordinates.row_sizes * self.coordinates.counts
        before = share * (rows * loss.curvature(logits, targets, rows)).sum(dim=1)
        worth = before > 1e-6 * before.sum()
        for _ in range(40):
            after = share * (rows * loss.curvature(logits + length * rows, targets, rows)).sum(dim=1)
            if bool((after >= 0.1 * before)[worth].all()):
                break
            length *= 0.5
        return length


class _Cut:
    """The soft threshold at a point."""

    def __init__(self, weights: Tensor, parts: Parts, t: float) -> None:
        COUNT["svd"] += 1
        self.core, self.t = Threshold(parts.core, t), t
        self.weights, self.apart, self.bias = weights, parts.apart, parts.bias

    def kept(self) -> Parts:
        size = (self.apart.abs() - self.t * self.weights).clamp(min=0)
        return Parts(self.core.kept, size * self.apart.sign(), self.bias)

    def subgradient(self) -> Parts:
        apart = torch.maximum(torch.minimum(self.apart / self.t, self.weights), -self.weights)
        return Parts(self.core.subgradient, apart, torch.zeros_like(self.bias))


class _System:
    def __init__(self, smooth: _Smooth, logits: Tensor, cut: _Cut, smoothed: bool) -> None:
        self.smooth, self.logits, self.cut = smooth, logits, cut
        core, coordinates = cut.core, smooth.coordinates
        self.bent, self.there = core.bend(smoothed)
        strength = smooth.groups.strength
        inner = coordinates.curvatures(logits, core.left, core.right) / strength
        eye = torch.eye(coordinates.shape[0]).to(logits)
        rest = (
            coordinates.curvatures(logits, eye, core.right[:, : core.size]) / strength
            if core.has_rest
            else inner[:0, : core.size]
        )
        apart, bias = (each / strength for each in coordinates.curvatures_of_rest(logits))
        out = (cut.apart.abs() <= cut.t * cut.weights).to(inner)
        self.apart_bent = out / cut.t if smoothed else torch.zeros_like(out)
        self.apart_there = torch.ones_like(out) if smoothed else 1 - out
        least = 1e-300
        self.inverse = inverse(self.bent, self.there, inner, rest)
        self.apart_inverse = self.apart_there / (apart + self.apart_bent).clamp(min=least)
        self.bias_inverse = 1 / (bias + smooth.pull).clamp(min=least)

    def turn(self, parts: Parts) -> _Vector:
        return _Vector(*self.cut.core.turn(parts.core), parts.apart, parts.bias)

    def back(self, v: _Vector) -> Parts:
        return Parts(self.cut.core.turn_back(Turned(v.inner, v.rest)), v.apart, v.bias)

    def product(self, v: _Vector) -> _Vector:
        image = self.turn(self.smooth.product(self.logits, self.back(v)))
        bent = apply(self.bent, Turned(v.inner, v.rest))
        return _Vector(image.inner + bent.inner, image.rest + bent.rest, image.apart + self.apart_bent * v.apart, image.bias)

    def precondition(self, v: _Vector) -> _Vector:
        core = apply(self.inverse, Turned(v.inner, v.rest))
        return _Vector(core.inner, self.cut.core.without_left(core.rest), self.apart_inverse * v.apart, self.bias_inverse * v.bias)

    def solve(self, right: Parts, part: float, most: int = 500) -> tuple[Parts, float]:
        """Conjugate gradients; the step, and the preconditioned norm of the right side."""
        residual = self.turn(right)
        x = residual.plus(residual, -1.0)
        direction = image = self.precondition(residual)
        square = first = residual.dot(image)
        n = 0
        if first > 0:
            for n in range(1, most + 1):
                image = self.product(direction)
                curvature = direction.dot(image)
                if not curvature > 0:
                    break
                x = x.plus(direction, square / curvature)
                residual = residual.plus(image, -square / curvature)
                image = self.precondition(residual)
                before, square = square, residual.dot(image)
                if square <= part**2 * first:
                    break
                direction = image.plus(direction, square / before)
        COUNT["cg"] += n
        self.iterations = n
        return self.back(x), max(first, 0.0) ** 0.5


def log(*args):
    if _DEBUG:
        print(f"{time.process_time() - T0:8.2f}", *args, file=sys.stderr, flush=True)


T0 = time.process_time()


def find(groups: Groups, bias: Tensor | None) -> tuple[Factors, float]:
    smooth = _Smooth(groups)
    coordinates = smooth.coordinates
    x = coordinates.zero(bias)
    log("size", coordinates.shape, len(coordinates.many))
    _, gradient = smooth.gradient(x)
    start = Threshold(gradient.core, 1.0)
    multiplier = gradient.map(lambda a: -a)
    cut = _Cut(coordinates.weights, multiplier, 1.0)
    largest = max(float(start.values.max()), float((gradient.apart.abs() / coordinates.weights).max()) if len(coordinates.weights) else 0)
    multiplier = cut.subgradient()
    t = groups.num_samples * groups.strength * (largest - 1) 
    switch = 0.1
    z = x
    for outer in range(60):
        x, cut, primal, dual = _augmented(smooth, x, multiplier, t, 1e-2)
        z, multiplier = cut.kept(), cut.subgradient()
        rank = int((cut.core.kept_values > 0).sum())
        log(f"outer {outer} t {t:.3g} primal {primal:.2e} dual {dual:.2e} rank {rank} cg {COUNT['cg']} svd {COUNT['svd']}")
        if primal < switch:
            scale = t
            cut2, size = _newton(smooth, z, multiplier, scale)
            if size < 1e-10:
                cut = cut2
                break
            switch *= 0.1
        t = t / 3
    kept = cut.core.kept_values > 0
    at = int(kept.sum())
    factors = coordinates.factors(cut.core.left[:, :at], cut.core.kept_values[:at], cut.core.right[:, :at], cut.kept())
    return factors, size


def _augmented(smooth, x, multiplier, t, tolerance):
    weights = smooth.coordinates.weights
    def at(x):
        cut = _Cut(weights, x.plus(multiplier, t), t)
        logits, gradient = smooth.gradient(x)
        return cut, logits, gradient.plus(cut.subgradient())
    cut, logits, gradient = at(x)
    for newton in range(30):
        kept = cut.kept()
        primal = Parts(x.core - kept.core, x.apart - kept.apart, x.bias[:0]).norm() / max(kept.core.norm(), kept.apart.norm(), 1e-300)
        dual = gradient.norm() / max(cut.subgradient().norm(), 1e-300)
        if newton and dual < tolerance * min(1.0, primal):
            break
        system = _System(smooth, logits, cut, smoothed=True)
        step, size = system.solve(gradient.map(lambda a: -a), min(0.1, dual))
        slope = gradient.dot(step)
        low, high, length = 0.0, float("inf"), smooth.longest(logits, step)
        low_slope = slope
        for trial in range(30):
            new = x.plus(step, length)
            now = at(new)
            after = now[2].dot(step)
            if abs(after) <= 0.5 * abs(slope):
                break
            if after < 0:
                low, low_slope = length, after
            else:
                high, high_slope = length, after
            if high == float("inf"):
                longer = 2 * length
                if trial >= 3 or smooth.longest(logits, step, longer) < longer:
                    break
                length = longer
            else:
                frac = low_slope / (low_slope - high_slope)
                length = low + (high - low) * min(max(frac, 0.1), 0.9)
        x = new
        cut, logits, gradient = now
        log(f"   newton {newton} primal {primal:.2e} dual {dual:.2e} size {size:.2e} cg {system.iterations} length {length:.3g}")
    return x, cut, primal, dual


def _newton(smooth, z, multiplier, t):
    weights = smooth.coordinates.weights
    def at(y):
        cut = _Cut(weights, y, t)
        kept = cut.kept()
        logits, gradient = smooth.gradient(kept)
        return cut, kept, logits, gradient.plus(cut.subgradient())
    y = z.plus(multiplier._replace(bias=0 * z.bias), t)
    cut, kept, logits, gradient = at(y)
    scale = cut.subgradient().norm()
    size = gradient.norm() / scale
    best = (cut, size)
    waiting = 0
    for newton in range(30):
        if size < 1e-15 or waiting > 2:
            break
        system = _System(smooth, logits, cut, smoothed=False)
        step, _ = system.solve(gradient.map(lambda a: -a), max(1e-8, min(0.1, size**0.5)))
        move = smooth.product(logits, step).plus(gradient)
        change = step.plus(move, -t)._replace(bias=step.bias)
        log(f"   semismooth {newton} size {size:.2e} cg {system.iterations} rank {int((cut.core.kept_values>0).sum())}")
        y = y.plus(change)
        cut, kept, logits, gradient = at(y)
        new = gradient.norm() / scale
        if new < best[1]:
            best, 
        waiting = 0 if new < 0.5 * best[1] else waiting + 1
        if new < best[1]:
            best = (cut, new)
        size = new
        if not size < 1e3:
            break
    log(f"   semismooth end {best[1]:.2e}")
    return best
