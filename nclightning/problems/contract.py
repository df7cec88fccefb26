"""A check that every problem must pass, against autograd, dense Hessians and descents."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from nclightning.problems.orbit import Solution

if TYPE_CHECKING:
    from collections.abc import Callable

    from nclightning.problems.problem import Problem

__all__ = ["assert_problem_contract"]

# Number of variables for which a dense Hessian takes a second.
_LARGEST = 400
_POINTS = 4


def assert_problem_contract(problem: Problem, *, starts: int = 3, seed: int = 0) -> None:
    """Check a problem against direct computations. Use it to test a member or a loss of your own.

    - At a random optimum the gradient vanishes and the Hessian has no negative eigenvalue.
    - L-BFGS from random starts reaches ``optimal_value`` to 1e-10 and does not go below it.
    - The gap equals F - F* at random points. Near the optimal set, gap and distance agree with the dense Hessian.
    - The distance is the least distance that a search over rotations finds.
    - The spectrum is that of the dense Hessian, with as many zeros as the optimal set has dimensions.
    - The certified bound is below F* and tends to it.
    - Descent with a fixed step contracts as predicted.

    Args:
        problem: A small problem: at most 400 variables ``(K + N) d + K``, and not at a threshold.
        starts: Number of random starts of the descents.
        seed: Seed of the random points.

    Raises:
        AssertionError: If a check fails or the problem is too large. The message gives the numbers.

    Example:
        >>> from nclightning.problems import SquaredError, Problem, assert_problem_contract
        >>> problem = Problem(SquaredError(), "hard", [2, 1], feature_dim=2, lambda_w=0.05, lambda_h=0.05)
        >>> assert_problem_contract(problem, starts=1)
    """
    view = _View(problem, torch.Generator().manual_seed(seed))
    assert view.size <= _LARGEST, f"the problem has {view.size} variables, more than {_LARGEST}: take a smaller one"
    _check_optimum(view)
    for _ in range(starts):
        _check_descent(view)
    for _ in range(_POINTS):
        _check_gap(view)
        _check_bound(view)
    for _ in range(2):
        _check_distance(view)
    modes = _check_spectrum(view)
    _check_near(view, modes)
    _check_contraction(view, modes)


class _Modes(NamedTuple):
    """An optimum, and the nonzero eigenvalues of the dense Hessian there, ascending, with eigenvectors in columns."""

    optimum: Tensor
    values: Tensor
    vectors: Tensor


class _View:
    """A problem as a function of one vector of all variables."""

    def __init__(self, problem: Problem, generator: torch.Generator) -> None:
        self.problem, self.generator = problem, generator
        self.labels = problem.labels()
        self.optimum = problem.random_optimum(generator)
        self.parts = [
            part for part in (self.optimum.weight, self.optimum.features, self.optimum.bias) if part is not None
        ]
        self.size = sum(part.numel() for part in self.parts)
        self.minimum = problem.optimal_value

    def point(self, flat: Tensor) -> Solution:
        """Head, features and bias."""
        pieces = torch.split(flat, [part.numel() for part in self.parts])
        weight, features, *bias = (piece.view_as(part) for piece, part in zip(pieces, self.parts, strict=True))
        return Solution(weight, features, self.labels, bias[0] if bias else None)

    def flat(self, point: Solution) -> Tensor:
        return torch.cat([p.flatten() for p in (point.weight, point.features, point.bias) if p is not None])

    def value(self, flat: Tensor) -> Tensor:
        return self.problem.value(*self.point(flat))

    def gradient(self, flat: Tensor) -> Tensor:
        leaf = flat.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(self.value(leaf), leaf)
        return gradient

    def draw(self) -> Tensor:
        """Draw a normally distributed point of about the size of the optimum."""
        noise = torch.randn(self.size, dtype=torch.float64, generator=self.generator)
        norm = float(self.flat(self.optimum).norm())
        return noise * (norm if norm > 0 else 1.0) / math.sqrt(self.size)


def _check_optimum(view: _View) -> None:
    """Check that gradient, gap and distance vanish at an optimum, and that F is F* there."""
    flat = view.flat(view.optimum)
    norm = float(view.gradient(flat).norm())
    # A gradient of this size lets F be above its minimum by its square over mu.
    scale = math.sqrt(view.problem.smoothness * max(view.minimum, 1e-300))
    assert norm <= 1e-9 * scale, f"the gradient at an optimum has norm {norm:.3g}, in units of its scale {scale:.3g}"
    value = float(view.value(flat))
    assert abs(value - view.minimum) <= 1e-12 * abs(value), f"F is {value!r} at an optimum, F* {view.minimum!r}"
    gap, distance = float(view.problem.gap(*view.optimum)), float(view.problem.distance(*view.optimum))
    assert abs(gap) <= 1e-22 * abs(value), f"the gap at an optimum is {gap:.3g}"
    assert distance <= 1e-11 * (1 + float(flat.norm())), f"the distance of an optimum is {distance:.3g}"


def _check_descent(view: _View) -> None:
    """Check that a descent from a random start reaches F*, and does not go below it."""
    x = view.draw().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [x],
        max_iter=4000,
        max_eval=8000,
        tolerance_grad=1e-13,
        tolerance_change=0,
        history_size=30,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = view.value(x)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    excess = float(view.value(x.detach())) - view.minimum
    assert excess <= 1e-10, f"a descent ended {excess:.3g} above optimal_value"
    assert excess >= -1e-13 * max(1.0, view.minimum), f"a descent went {-excess:.3g} below optimal_value"


def _check_gap(view: _View) -> None:
    """Check that the gap equals F - F* at a random point."""
    flat = view.draw() * 3 ** float(torch.randn((), generator=view.generator))
    value, gap = float(view.value(flat)), float(view.problem.gap(*view.point(flat)))
    off = gap - (value - view.minimum)
    assert abs(off) <= 1e-12 * abs(value), f"gap is {gap!r}, F - F* {value - view.minimum!r}, F {value!r}"


def _check_distance(view: _View) -> None:
    """Search over all frames by descent, from starts of both determinants: rotations do not reach reflections."""
    problem, flat = view.problem, view.draw()
    point = view.point(flat)
    distance = float(problem.distance(*point))
    nearest = view.flat(problem.nearest_optimum(*point))
    shift_free = bool(problem.has_bias and problem.dimension > problem.optimal_set.dimension)
    if not shift_free:
        assert abs(float((flat - nearest).norm()) - distance) <= 1e-12 * distance, "nearest_optimum is not at distance"
    if not problem.optimal_set.optimum.rank:
        return
    best = math.inf
    for start in _frames(problem.feature_dim, problem.optimal_set.optimum.rank, view.generator):
        turns = max(start.shape)
        x = torch.zeros(turns, turns, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([x], max_iter=200, tolerance_change=1e-13, line_search_fn="strong_wolfe")

        def squared_at(x: Tensor, start: Tensor = start) -> Tensor:
            turn = torch.linalg.matrix_exp(x - x.T)
            return _squared_distance(view, point, turn @ start if len(start) == len(turn) else start @ turn)

        def closure(
            x: Tensor = x, optimizer: torch.optim.LBFGS = optimizer, squared_at: Callable[[Tensor], Tensor] = squared_at
        ) -> Tensor:
            optimizer.zero_grad()
            squared = squared_at(x)
            squared.backward()  # type: ignore[no-untyped-call]
            return squared

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        best = min(best, math.sqrt(float(squared_at(x.detach()))))
    off = abs(best - distance)
    assert off <= 1e-7 * distance, f"the distance is {distance!r}, a search over rotations found {best!r}"


def _frames(feature_dim: int, rank: int, generator: torch.Generator) -> list[Tensor]:
    """Random matrices ``(d, r)`` with orthonormal columns, or rows; square ones of either determinant."""
    found = []
    for flip in (1, -1):
        q = torch.linalg.qr(torch.randn([max(feature_dim, rank)] * 2, dtype=torch.float64, generator=generator))[0]
        q[0] *= flip * torch.linalg.det(q).sign()
        found.append(q[:feature_dim, :rank])
    return found


def _squared_distance(view: _View, point: Solution, rotation: Tensor) -> Tensor:
    """Squared distance from the member of the optimal set with a given frame, by definition."""
    optimal = view.problem.optimal_set
    weight = optimal.weight_factor @ rotation.T
    present = view.problem.present
    means = point.features.new_zeros(view.problem.num_groups, len(rotation))
    means[present] = optimal.feature_factor @ rotation.T
    squared: Tensor = (point.weight - weight).square().sum() + (point.features - means[view.labels]).square().sum()
    best = optimal.optimum.factors.bias
    if best is not None and point.bias is not None:
        off = point.bias - best
        if view.problem.dimension > optimal.dimension:
            off = off - off.mean()
        squared = squared + off.square().sum()
    return squared


def _check_bound(view: _View) -> None:
    """Check that the certified bound is at most F*, and equal to it at an optimum."""
    problem, flat = view.problem, view.draw()
    roof = view.minimum * (1 + 1e-12)
    for size in (1.0, 1e-2, 1e-4):
        near = view.flat(view.optimum) * (1 - size) + flat * size
        bound = problem.certified_lower_bound(*view.point(near))
        assert bound <= roof, f"the certified bound {bound!r} is above optimal_value {view.minimum!r}"
    if problem.feature_dim >= problem.convex_optimum.rank:
        bound = problem.certified_lower_bound(*view.optimum)
        off = view.minimum - bound
        assert off <= 1e-9 * abs(view.minimum), f"the certified bound at an optimum is {off:.3g} below optimal_value"


def _check_spectrum(view: _View) -> _Modes:
    """Check the spectrum against the dense Hessian at an optimum, whose modes are returned."""
    problem, flat = view.problem, view.flat(view.optimum)
    hessian = torch.func.hessian(view.value)(flat)
    values, vectors = torch.linalg.eigh((hessian + hessian.T) / 2)
    smoothness = float(values[-1])
    assert float(values[0]) >= -1e-10 * smoothness, (
        f"the Hessian at an optimum has the eigenvalue {float(values[0]):.3g}"
    )
    predicted = [each.value for each in problem.spectrum() for _ in range(each.multiplicity)]
    assert len(predicted) == view.size, f"the spectrum has {len(predicted)} eigenvalues for {view.size} variables"
    off = float((values - values.new_tensor(sorted(predicted))).abs().max())
    assert off <= 1e-9 * smoothness, f"an eigenvalue of the spectrum is off by {off:.3g} of {smoothness:.3g}"
    zeros, count = int((values <= 1e-10 * smoothness).sum()), sum(value == 0 for value in predicted)
    assert zeros == count == problem.dimension, f"{zeros} zeros, {count} in spectrum, dimension {problem.dimension}"
    return _Modes(flat, values[zeros:], vectors[:, zeros:])


def _check_near(view: _View, modes: _Modes) -> None:
    """Check gap and distance along modes of the Hessian so close to the set that F - F* itself is round-off."""
    size = 1e-7 * max(1.0, float(modes.optimum.norm()))
    for index in {0, len(modes.values) // 2, len(modes.values) - 1}:
        point = view.point(modes.optimum + size * modes.vectors[:, index])
        gap, expected = float(view.problem.gap(*point)), float(modes.values[index]) * size**2 / 2
        assert abs(gap / expected - 1) <= 1e-3, f"the gap {gap:.4g} near an optimum should be {expected:.4g}"
        distance = float(view.problem.distance(*point))
        assert abs(distance / size - 1) <= 1e-3, f"the distance {distance:.4g} near an optimum should be {size:.4g}"


def _check_contraction(view: _View, modes: _Modes) -> None:
    """Check the contraction of two step sizes from a point displaced along the slowest and the fastest mode."""
    rates, size = view.problem.rates, 1e-5 * max(1.0, float(modes.optimum.norm()))
    for step in (rates.best_step, 1 / rates.smoothness):
        x = modes.optimum + size * (modes.vectors[:, 0] + modes.vectors[:, -1]) / math.sqrt(2)
        before, predicted = 0.0, rates.contraction(step)
        if predicted < 0.01:  # One step reaches the set up to round-off: there is no rate to measure.
            continue
        # Twice this number of steps stays far above round-off.
        half = max(1, min(20, int(math.log(1e-2) / math.log(predicted))))
        for iteration in range(2 * half):
            if iteration == half:
                before = float(view.problem.distance(*view.point(x)))
            x = x - step * view.gradient(x)
        after = float(view.problem.distance(*view.point(x)))
        measured = (after / before) ** (1 / half)
        off = abs(math.log(measured) / math.log(predicted) - 1)
        assert off <= 0.02, f"a step of {step:.4g} contracts by {measured:.6g}, predicted is {predicted:.6g}"
