"""Newton's method, solved by conjugate gradients, with the line search of ArmijoGD."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nclightning.optim.backtracking import SearchResult
from nclightning.optim.direction import ROUNDINGS, Descent, Direction, Space, epsilon_of, is_descent
from nclightning.optim.evaluation import Evaluation
from nclightning.optim.hessian import Hessian
from nclightning.optim.line_search import LineSearchOptimizer
from nclightning.optim.objectives import LineObjective
from nclightning.optim.options import check_precision, largest_step
from nclightning.sharding import own_shard

__all__ = ["ArmijoNewtonCG", "NewtonByConjugateGradients"]

_LARGEST_RESIDUAL = 0.5  # Largest relative residual of Newton's equations.
_GROWTH = 4.0  # Growth of the step along the gradient until a curvature has been measured.
_WIDENING = 2.0  # Growth of the radius.
_FARTHER = 10.0  # Radius for a direction without positive curvature, over the length reached before it.


class ArmijoNewtonCG(LineSearchOptimizer):
    r"""Newton's method without a Hessian matrix, with the line search of :class:`ArmijoGD`.

    The descent vector p solves :math:`\nabla^2 F\, p = g` inexactly. Conjugate gradients start at zero and stay within
    a radius (Steihaug 1983; Nocedal and Wright 2006, Algorithms 7.1 and 7.2). They end as soon as

    .. math:: \|\nabla^2 F\, p - g\| \le \min\big(1/2, (\|g\| / \|g_0\|)^{1/4}\big)\, \|g\| ,

    where :math:`g_0` is the gradient of the first step, or the left-hand side is below the round-off of the gradient.
    Convergence is superlinear. The Hessian may be singular, and is not regularised: started at zero, conjugate
    gradients stay in its range.

    Let d be a direction of conjugate gradients whose curvature :math:`\langle d, \nabla^2 F\, d\rangle` is not positive
    beyond the error of the products. Then p follows d up to the radius, and so uses negative curvature. If the radius
    is infinite, p follows d up to ten times the length that it has reached. If in this case d is the gradient itself,
    p is a multiple of the gradient: it is divided by the absolute value of a negative curvature; without any curvature
    it has the last scale, which grows fourfold from step to step. The radius is infinite at first. After a step that
    the line search shortens, it is the length of that step. After a step to the radius that is accepted at once, it is
    twice as long.

    The first trial is t = 1. A trial is accepted on the conditions of :class:`ArmijoGD` with
    :math:`\langle g, p\rangle` in place of :math:`\|g\|^2`. After a rejected trial the next one is the minimum of the
    parabola fitted to it. If no step is found along p, the search is repeated along the gradient.

    Products with the Hessian are computed in one of three ways:

    - A :class:`~nclightning.optim.LineObjective` has its own, as in the full-batch loop of the models: in closed form
      for the unconstrained feature model, and by differentiating twice for networks. Networks whose weights
      ``fully_shard`` splits use differences.
    - If a closure calls ``backward(create_graph=True)`` on a single process, its gradients are differentiated again.
    - For any other closure, a product is the difference of two gradients at points with distance
      :math:`\sqrt\epsilon\, \|x\|`. Its relative error of about :math:`\sqrt\epsilon` matters little, because p is
      inexact anyway. However, curvatures below :math:`\sqrt\epsilon` times the largest are not seen.

    Each product counts as one evaluation, and so does the graph of the gradient through which networks are
    differentiated. Either costs one or two gradients. Closures, options, writes to parameters between steps, and
    several processes are treated as by :class:`ArmijoGD`. The state consists of a few numbers, and a resumed run
    continues bit for bit.

    Once the gradient has reached round-off, the method may continue with steps of the size of round-off. Stop a run by
    ``outcome.grad_norm``.

    Memory: 6 times the parameters.

    Args:
        params: Parameters or parameter groups. Real and dense, float32 or float64.
        initial_step: First trial of the first step. 1 is the Newton step.
        max_products: Largest number of products with the Hessian per step. After these, p is used as it is.
        c1: Required fraction of the linear decrease, in (0, 1/2).
        shrink: Largest factor by which a rejected trial is shortened, in (0, 1).
        max_trials: Largest number of trials along one vector.
        noise: As for :class:`ArmijoGD`.
        reuse_gradient: As for :class:`ArmijoGD`.

    Raises:
        ValueError: If an option is out of range, a group sets options of its own, or a parameter is complex, of half
            precision, or occurs twice in a group.

    Example:
        >>> import torch
        >>> from nclightning.optim import ArmijoNewtonCG
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
    """The inexact solution of Newton's equations by conjugate gradients."""

    kind = "Newton's method by conjugate gradients"

    def __init__(self) -> None:
        self.scale = 1.0
        self._first = 0.0  # Norm of the first gradient.
        self._unit = 0.0  # A distance over which the gradient is known to change.
        self._length = 0.0  # Norm of the last vector.
        self._is_gradient = False  # Whether the last vector was along the gradient.
        self._is_flat = False  # Whether the length of the last vector is not based on a curvature.
        self._is_restarted = False  # Whether the next vector is along the gradient.
        self._radius = math.inf  # The quadratic model is trusted within this distance.
        self._is_cut = False  # Whether the last vector ends at the radius.

    def restart(self) -> bool:
        """Make the next vector a multiple of the gradient."""
        self._is_restarted = not self._is_gradient
        return self._is_restarted

    def find(self, start: Evaluation, objective: LineObjective, space: Space) -> Descent:
        """Solve Newton's equations."""
        check_precision(space.params, "ArmijoNewtonCG")
        norm, curvature, evaluations = math.sqrt(start.square), 0.0, 0
        self._first = self._first or norm
        along: list[Tensor | None] | None = None
        self._is_flat = self._is_cut = False
        if not self._is_restarted:
            hessian = objective.hessian(start, self._unit)
            solution = _solve(hessian, start, self._tolerance(norm), self._radius, objective, space)
            along, curvature, evaluations = solution.vector, solution.curvature, solution.products + hessian.evaluations
            self._is_cut = solution.is_cut
        if along is not None:
            slope, square = objective.inner_products([(start.gradients, along), (along, along)]).tolist()
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
        return min(_LARGEST_RESIDUAL, math.pow(norm / self._first, 0.25))

    def accept(self, start: Evaluation, found: SearchResult, objective: LineObjective, space: Space) -> None:
        """Update the radius, and the scale of a vector whose length is not based on a curvature."""
        self._unit = max(self._unit / 2, found.size * self._length)
        if found.trials > 1:
            self._radius = found.size * self._length
        elif self._is_cut:
            self._radius = _WIDENING * self._length
        if self._is_flat:
            self.scale *= found.size * (_GROWTH if found.trials == 1 else 1)

    def next_trial(self, found: SearchResult, streak: int, space: Space) -> tuple[float, bool]:
        """Return 1, and whether the vectors have grown beyond the dtype of the parameters."""
        return 1.0, self.scale > largest_step(space.params)

    def state_dict(self) -> dict[str, Any]:
        """Return the norm of the first gradient, scale, distance and radius."""
        return {"scale": self.scale, "first": self._first, "unit": self._unit, "radius": self._radius}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of :meth:`state_dict`."""
        self.scale, self._first, self._unit = state["scale"], state["first"], state["unit"]
        self._radius = state["radius"]


class _Solution(NamedTuple):
    """The result of conjugate gradients.

    Attributes:
        vector: The solution; None if the curvature along the gradient is not positive and the radius is infinite.
        curvature: Curvature along the gradient; 0 if it is within the error of the product.
        products: Number of products with the Hessian.
        is_cut: Whether the vector ends at the radius.
    """

    vector: list[Tensor | None] | None
    curvature: float
    products: int
    is_cut: bool = False


def _solve(
    hessian: Hessian, start: Evaluation, tolerance: float, radius: float, objective: LineObjective, space: Space
) -> _Solution:
    """Solve Newton's equations by conjugate gradients from zero, within a radius."""
    residual = [None if g is None else own_shard(g).clone() for g in start.gradients]
    square = start.square  # Squared norm of the residual.
    length = norm = math.sqrt(square)
    direction = [None if r is None else r / length for r in residual]  # A unit vector, because squares could overflow.
    vector: list[Tensor | None] = [None if r is None else torch.zeros_like(r) for r in residual]
    reached = overlap = 0.0  # Squared length of the vector, and its inner product with the direction.
    largest = along_gradient = 0.0
    present = [None if g is None else p for p, g in zip(space.params, start.gradients, strict=True)]
    rounding = epsilon_of(space.params) * math.sqrt(float(objective.inner_products([(present, present)])[0]))
    for number in range(1, space.options["max_products"] + 1):
        products = hessian.multiply(direction)
        curvature, size = objective.inner_products([(direction, products), (products, products)]).tolist()
        largest = max(largest, math.sqrt(size) if math.isfinite(size) else abs(curvature))
        if not ROUNDINGS * hessian.error * largest < abs(curvature) < math.inf:
            curvature = 0.0
        along_gradient = curvature if number == 1 else along_gradient
        if curvature <= 0 and number > 1 and radius == math.inf:
            radius = _FARTHER * math.sqrt(reached)
        step = square / length / curvature if curvature > 0 else math.inf
        if radius < math.inf and reached + step * (2 * overlap + step) >= radius * radius:
            _add(vector, direction, math.sqrt(overlap * overlap + radius * radius - reached) - overlap)
            return _Solution(vector, along_gradient, number, True)
        if curvature <= 0:
            return _Solution(None, along_gradient, number)
        _add(vector, direction, step)
        _add(residual, products, -step)
        after = float(objective.inner_products([(residual, residual)])[0])
        # A residual below the round-off of the gradient is noise, and would be divided by curvatures near zero.
        if math.sqrt(after) <= max(tolerance * norm, rounding * largest):
            break
        reached += step * (2 * overlap + step)
        kept = after / square * length
        square, length = after, math.sqrt(after + kept * kept)
        overlap = kept / length * (overlap + step)
        for r, d in zip(residual, direction, strict=True):
            if r is not None and d is not None:
                d.mul_(kept).add_(r).div_(length)
    return _Solution(vector, along_gradient, number)


def _add(vector: Sequence[Tensor | None], other: Sequence[Tensor | None], factor: float) -> None:
    """Add ``factor * other`` to a vector in place."""
    for v, o in zip(vector, other, strict=True):
        if v is not None and o is not None:
            v.add_(o, alpha=factor)
