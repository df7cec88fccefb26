"""Newton's method by conjugate gradients on products with the Hessian, with the line search of ArmijoGD."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nclightning.optim.backtracking import Found
from nclightning.optim.direction import ROUNDINGS, Descent, Direction, Space, epsilon_of, is_descent
from nclightning.optim.evaluation import Evaluation
from nclightning.optim.line import Hessian, LineObjective
from nclightning.optim.line_search import LineSearchOptimizer
from nclightning.optim.options import check_precision, largest_step
from nclightning.sharding import own_shard

__all__ = ["ArmijoNewtonCG", "NewtonByConjugateGradients"]

_MOST_LEFT = 0.5  # Of the gradient, by an inexact solution.
_GROWTH = 4.0  # Of the step along the gradient while no curvature was measured.
_WIDENING = 2.0  # Of the radius.
_FARTHER = 10.0  # Along a direction without positive curvature than what was reached before it.


class ArmijoNewtonCG(LineSearchOptimizer):
    r"""Newton's method without a matrix, with the line search of :class:`ArmijoGD`.

    The descent vector p solves :math:`\nabla^2 F\, p = g` inexactly, by conjugate gradients from zero within a radius
    (Steihaug 1983; Nocedal and Wright 2006, Algorithms 7.1 and 7.2), until

    .. math:: \|\nabla^2 F\, p - g\| \le \min\big(1/2, (\|g\| / \|g_0\|)^{1/4}\big)\, \|g\| ,

    with the gradient :math:`g_0` of the first step, or the left-hand side is below the round-off of the gradient.
    Convergence is faster than linear. A singular Hessian does no harm and nothing is added to it: from zero, the
    iterates of conjugate gradients stay in its range.

    Along a direction d of which the curvature :math:`\langle d, \nabla^2 F\, d\rangle` is not positive beyond the error
    of the products, p goes as far as the radius, so that negative curvature is made use of. The radius is infinite
    until the search shortens a step; it then is the length of that step, and doubles with each step that reaches it
    and is not shortened. While it is infinite, p ends before such a direction. If that is the gradient itself, p is the
    gradient, scaled by its curvature in absolute value where this is negative, and where there is no curvature at all
    by the last scale, which grows fourfold from step to step.

    The first trial is t = 1. A trial is accepted on the conditions of :class:`ArmijoGD` with
    :math:`\langle g, p\rangle` in place of :math:`\|g\|^2`; a rejected one is followed by one where the parabola
    through what is known is least. Where there is no step along p, the gradient is tried.

    Products with the Hessian come from where they can be had:

    - a :class:`~nclightning.optim.LineObjective` has its own, as the full-batch loop of the models does: in closed form
      for the unconstrained feature model, by differentiating twice for networks (on weights that ``fully_shard``
      shares out, by differences);
    - the gradients that a closure leaves are differentiated once more if it calls ``backward(create_graph=True)``, on a
      single process;
    - for any other closure, a product is the difference of two gradients, at points
      :math:`\sqrt\epsilon\, \|x\|` apart. Its relative error of about :math:`\sqrt\epsilon` changes few of the vectors,
      which are inexact anyhow; but curvatures below :math:`\sqrt\epsilon` times the largest are not seen.

    Each product counts as one evaluation, and so does the graph of the gradient through which networks are
    differentiated: the cost of either is that of one or two gradients. All that :class:`ArmijoGD` says of closures,
    options, writes between steps and processes holds here too. What is kept from step to step is some numbers, so that
    a resumed run continues bit for bit.

    At the round-off of the gradient it may go on taking steps of the length of round-off: end a run by
    ``outcome.grad_norm``.

    Memory: 6 times the parameters.

    Args:
        params: Parameters or parameter groups. Real and dense, float32 or float64.
        initial_step: First trial of the first step. 1 is Newton's.
        max_products: Products with the Hessian per step before the vector is taken as it is.
        c1: Fraction of the linear decrease that is asked for, in (0, 1/2).
        shrink: Largest factor by which a rejected trial is shortened, in (0, 1).
        max_trials: Trials along one vector before the search gives up.
        noise: As for :class:`ArmijoGD`.
        reuse_gradient: As for :class:`ArmijoGD`.

    Raises:
        ValueError: If an option is out of range, a group carries options of its own, or a parameter is complex, of half
            precision, or occurs twice in a group.

    Example:
        >>> x = torch.nn.Parameter(torch.tensor([3.0, -4.0], dtype=torch.float64))
        >>> optimizer = ArmijoNewtonCG([x])
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     value = (x**4 * torch.tensor([1.0, 100.0])).sum() + x.square().sum()
        ...     value.backward()
        ...     return value
        >>> for _ in range(25):
        ...     value = optimizer.step(closure)
        >>> value < 1e-20
        True
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        initial_step: float = 1.0,
        max_products: int = 200,
        c1: float = 0.2,
        shrink: float = 0.5,
        max_trials: int = 60,
        noise: float | None = None,
        reuse_gradient: bool = True,
    ) -> None:
        options: dict[str, Any] = {
            "initial_step": initial_step,
            "max_products": max_products,
            "c1": c1,
            "shrink": shrink,
            "max_trials": max_trials,
            "noise": noise,
            "reuse_gradient": reuse_gradient,
        }
        super().__init__(params, options, NewtonByConjugateGradients())


class NewtonByConjugateGradients(Direction):
    """The inexact solution of Newton's equations."""

    kind = "Newton's method by conjugate gradients"

    def __init__(self) -> None:
        self.scale = 1.0
        self._first = 0.0  # Norm of the first gradient.
        self._unit = 0.0  # Length over which gradients are known to change.
        self._length = 0.0  # Of the last vector.
        self._is_gradient = False  # Whether that was along the gradient.
        self._is_flat = False  # Whether no curvature was measured at it.
        self._is_restarted = False
        self._radius = math.inf  # Within which the quadratic model is trusted.
        self._is_cut = False  # Whether the last vector ends there.

    def restart(self) -> bool:
        """Go along the gradient next."""
        self._is_restarted = not self._is_gradient
        return self._is_restarted

    def find(self, start: Evaluation, line: LineObjective, space: Space) -> Descent:
        """Solve Newton's equations."""
        check_precision(space.params, "ArmijoNewtonCG")
        norm, curvature, evaluations = math.sqrt(start.square), 0.0, 0
        self._first = self._first or norm
        along: list[Tensor | None] | None = None
        self._is_flat = self._is_cut = False
        if not self._is_restarted:
            hessian = line.hessian(start, self._unit)
            solution = _solve(hessian, start, self._tolerance(norm), self._radius, line, space)
            along, curvature, evaluations = solution.vector, solution.curvature, solution.products + hessian.evaluations
            self._is_cut = solution.is_cut
        if along is not None:
            slope, square = line.inner_products([(start.gradients, along), (along, along)]).tolist()
            self._length = math.sqrt(square)
            if not is_descent(start, slope, self._length, space):
                along, self._is_restarted = None, True
        self._is_gradient = along is None
        if along is None:
            self._is_flat = self._is_restarted or curvature == 0
            factor = self.scale if self._is_flat else 1 / abs(curvature)
            along = [None if g is None else own_shard(g) * factor for g in start.gradients]
            slope, self._length = factor * start.square, factor * norm
        self.scale, self._is_restarted = self._length / norm or 1.0, False
        return Descent(along, slope, evaluations)

    def _tolerance(self, norm: float) -> float:
        return min(_MOST_LEFT, math.pow(norm / self._first, 0.25))

    def accept(self, start: Evaluation, found: Found, line: LineObjective, space: Space) -> None:
        """Remember the length, and lengthen the next step along the gradient where nothing else tells how long."""
        self._unit = max(self._unit / 2, found.size * self._length)
        if found.trials > 1:
            self._radius = found.size * self._length
        elif self._is_cut:
            self._radius = _WIDENING * self._length
        if self._is_flat:
            self.scale *= found.size * (_GROWTH if found.trials == 1 else 1)

    def next_trial(self, found: Found, streak: int, space: Space) -> tuple[float, bool]:
        """Try 1."""
        return 1.0, self.scale > largest_step(space.params)

    def state_dict(self) -> dict[str, Any]:
        """Return the norm of the first gradient and the lengths that were learnt."""
        return {"scale": self.scale, "first": self._first, "unit": self._unit, "radius": self._radius}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self.scale, self._first, self._unit = state["scale"], state["first"], state["unit"]
        self._radius = state["radius"]


class _Solution(NamedTuple):
    """What conjugate gradients found.

    Attributes:
        vector: None if the curvature along the gradient is not positive and there is no radius.
        curvature: Along the gradient; 0 for what may be error.
        products: With the Hessian.
        is_cut: Whether the vector ends at the radius.
    """

    vector: list[Tensor | None] | None
    curvature: float
    products: int
    is_cut: bool = False


def _solve(
    hessian: Hessian, start: Evaluation, tolerance: float, radius: float, line: LineObjective, space: Space
) -> _Solution:
    """Solve Newton's equations by conjugate gradients from zero, within a radius."""
    rest = [None if g is None else own_shard(g).clone() for g in start.gradients]
    square = start.square  # Of what is left.
    length = norm = math.sqrt(square)
    turn = [None if r is None else r / length for r in rest]  # Of length 1: no square leaves the numbers.
    vector: list[Tensor | None] = [None if r is None else torch.zeros_like(r) for r in rest]
    reached = mixed = 0.0  # Squared length of the vector, and its inner product with the turn.
    largest = along_gradient = 0.0
    present = [None if g is None else p for p, g in zip(space.params, start.gradients, strict=True)]
    rounding = epsilon_of(space.params) * math.sqrt(float(line.inner_products([(present, present)])[0]))
    for number in range(1, space.options["max_products"] + 1):
        products = hessian.multiply(turn)
        curvature, size = line.inner_products([(turn, products), (products, products)]).tolist()
        largest = max(largest, math.sqrt(size) if math.isfinite(size) else abs(curvature))
        if not ROUNDINGS * hessian.error * largest < abs(curvature) < math.inf:
            curvature = 0.0
        along_gradient = curvature if number == 1 else along_gradient
        if curvature <= 0 and number > 1 and radius == math.inf:
            radius = _FARTHER * math.sqrt(reached)
        step = square / length / curvature if curvature > 0 else math.inf
        if radius < math.inf and reached + step * (2 * mixed + step) >= radius * radius:
            _add(vector, turn, math.sqrt(mixed * mixed + radius * radius - reached) - mixed)
            return _Solution(vector, along_gradient, number, True)
        if curvature <= 0:
            return _Solution(None, along_gradient, number)
        _add(vector, turn, step)
        _add(rest, products, -step)
        after = float(line.inner_products([(rest, rest)])[0])
        # What is below the round-off of the gradient would be divided by curvatures near zero.
        if math.sqrt(after) <= max(tolerance * norm, rounding * largest):
            break
        reached += step * (2 * mixed + step)
        kept = after / square * length
        square, length = after, math.sqrt(after + kept * kept)
        mixed = kept / length * (mixed + step)
        for r, d in zip(rest, turn, strict=True):
            if r is not None and d is not None:
                d.mul_(kept).add_(r).div_(length)
    return _Solution(vector, along_gradient, number)


def _add(vector: Sequence[Tensor | None], other: Sequence[Tensor | None], factor: float) -> None:
    for v, o in zip(vector, other, strict=True):
        if v is not None and o is not None:
            v.add_(o, alpha=factor)
