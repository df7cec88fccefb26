"""Nonlinear conjugate gradients with the line search of ArmijoGD."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nclightning.optim.backtracking import SearchResult
from nclightning.optim.direction import ROUNDINGS, Descent, LearningDirection, Space, epsilon_of, is_descent
from nclightning.optim.evaluation import Evaluation
from nclightning.optim.line_search import LineSearchOptimizer
from nclightning.optim.objectives import LineObjective
from nclightning.optim.options import check_precision
from nclightning.sharding import own_shard

__all__ = ["ArmijoCG", "ConjugateGradients"]

_STEEPER = 1.5  # Assumed curvature along the gradient, over its lower bound by the Cauchy-Schwarz inequality.


class ArmijoCG(LineSearchOptimizer):
    r"""Nonlinear conjugate gradients with the line search of :class:`ArmijoGD`.

    The formulas of Fletcher and Reeves, of Polak and Ribière, and of Hager and Zhang assume a line search that comes
    close to the minimum along the direction. Backtracking does not. The descent vector is therefore the minimizer of a
    quadratic model over the plane spanned by the gradient g and the last vector p (Yuan and Stoer 1995; Dai and Kou
    2016):

    .. math::
        p_+ = \mu g + \nu p, \quad
        \begin{pmatrix} \rho & \langle g, q\rangle \\ \langle g, q\rangle & \langle p, q\rangle \end{pmatrix}
        \begin{pmatrix} \mu \\ \nu \end{pmatrix} =
        \begin{pmatrix} \|g\|^2 \\ \langle g, p\rangle \end{pmatrix}, \quad
        q = \frac{g_{-} - g}{t}, \quad \rho = \frac32 \frac{\|q\|^2}{\langle p, q\rangle} \|g\|^2 .

    Here :math:`g_-` is the gradient before the last step and t is that step. The vector q is the product of the Hessian
    and p, and :math:`\rho` is an estimate of the curvature along g. The matrix is positive definite, because
    :math:`\langle g, q\rangle^2 \le \|g\|^2 \|q\|^2`. Therefore :math:`p_+` is a direction of descent whenever the
    curvature :math:`\langle p, q\rangle` along the last step is positive. After an exact line search on a quadratic it
    is parallel to the direction of Hestenes and Stiefel. Its length is that of a whole step: the first trial is t = 1,
    and it is almost always accepted.

    A trial is accepted on the conditions of :class:`ArmijoGD` with :math:`\langle g, p\rangle` in place of
    :math:`\|g\|^2`. After a rejected trial the next one is the minimum of the parabola fitted to it. The very first
    step is along the gradient and tries ``initial_step`` first. Until a curvature has been measured, the first trial
    grows fourfold from step to step.

    The method restarts along the gradient, scaled by :math:`\langle p, q\rangle / \|q\|^2`, if the curvature along the
    last step is not positive beyond round-off, if :math:`p_+` is not a direction of descent beyond round-off, if no
    step is found along it, or if parameters were frozen, added or changed their shape. Closures, options, writes to
    parameters between steps, and several processes are treated as by :class:`ArmijoGD`.

    A ``state_dict`` contains p and q for each parameter, in its shape, so that a resumed run continues bit for bit.

    Memory: 4 times the parameters.

    Args:
        params: Parameters or parameter groups. Real and dense, float32 or float64.
        initial_step: First trial of the first step, along the gradient.
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
        >>> from nclightning.optim import ArmijoCG
        >>> x = torch.nn.Parameter(torch.tensor([3.0, -4.0], dtype=torch.float64))
        >>> optimizer = ArmijoCG([x])
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     value = (x * x * torch.tensor([1.0, 100.0])).sum() / 2
        ...     value.backward()
        ...     return value
        >>> for _ in range(20):
        ...     value = optimizer.step(closure)
        >>> value < 1e-20
        True
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        initial_step: float = 1.0,
        c1: float = 0.2,
        shrink: float = 0.5,
        max_trials: int = 60,
        noise: float | None = None,
        reuse_gradient: bool = True,
    ) -> None:
        options: dict[str, Any] = {
            "initial_step": initial_step,
            "c1": c1,
            "shrink": shrink,
            "max_trials": max_trials,
            "noise": noise,
            "reuse_gradient": reuse_gradient,
        }
        super().__init__(params, options, ConjugateGradients())


class ConjugateGradients(LearningDirection):
    r"""The minimizer of a quadratic model over the plane spanned by the gradient and the last vector.

    The optimizer's state has for each parameter ``step``, which is t p, and ``change``, which is t q: the last step and
    the change of the gradient over it. Without the factor t, inner products of p and q could overflow or underflow.
    """

    kind = "conjugate gradients"

    def __init__(self) -> None:
        super().__init__()
        self._along: list[Tensor | None] = []
        self._before: list[Tensor | None] = []  # Gradient at the start of the step.

    def restart(self) -> bool:
        """Forget the last vector, and keep the scale."""
        had_history, self._measured = self._measured, False
        return had_history

    def find(self, start: Evaluation, objective: LineObjective, space: Space) -> Descent:
        """Solve the two equations for mu and nu, and combine gradient and last vector."""
        self._check(space)
        self._before = [None if g is None else own_shard(g).clone() for g in start.gradients]
        while True:
            factor, last, turn = self.scale, [None] * len(space.params), 0.0
            if self._measured:
                last = [space.state[p]["step"] if p in space.state else None for p in space.params]
                factor, turn = self._solve(start, last, objective, space)
            self._along = [_combine(g, factor, p, turn) for g, p in zip(self._before, last, strict=True)]
            products = objective.inner_products([(self._before, self._along), (self._along, self._along)])
            slope, square = products.tolist()
            if is_descent(start, slope, math.sqrt(square), space) or (not self._measured and self.scale == 1.0):
                return Descent(self._along, slope)
            if not self.restart():  # The gradient times the scale overflows or underflows.
                self.scale = 1.0

    def _solve(
        self, start: Evaluation, last: Sequence[Tensor | None], objective: LineObjective, space: Space
    ) -> tuple[float, float]:
        """Return mu and nu; NaN if the equations overflow or underflow."""
        products = [space.state[p]["change"] if p in space.state else None for p in space.params]
        pairs = [(self._before, last), (self._before, products), (last, products), (products, products)]
        descent, mixed, curvature, square = objective.inner_products(pairs).tolist()
        if not curvature > 0:
            return math.nan, math.nan
        norm, size = (
            math.sqrt(start.square),
            math.sqrt(square),
        )  # Everything is divided by these, because squares would overflow.
        descent, mixed, steep = descent / norm, mixed / norm, _STEEPER * size * (size / curvature)
        rest = steep * curvature - mixed * mixed
        if not rest > 0:
            return math.nan, math.nan
        return (curvature - descent * mixed) / rest, (steep * descent - mixed) / rest * norm

    def accept(self, start: Evaluation, found: SearchResult, objective: LineObjective, space: Space) -> None:
        """Measure the curvature along the step from the change of the gradient."""
        assert found.end is not None
        end = found.end
        changes = [_difference(g, after) for g, after in zip(self._before, end.gradients, strict=True)]
        pairs = [(self._along, changes), (changes, changes), (self._along, self._along)]
        curvature, square, length = objective.inner_products(pairs).tolist()
        gradients = math.sqrt(start.square) + math.sqrt(end.square)
        noise = ROUNDINGS * epsilon_of(space.params) * math.sqrt(length) * (math.sqrt(square) + gradients)
        scale = found.size * (curvature / square) if square > 0 else math.inf
        self._measured = noise < curvature and 0 < scale < math.inf
        if self._measured:
            self.scale = scale
        for p, along, change in zip(space.params, self._along, changes, strict=True):
            space.state.pop(p, None)
            if self._measured and change is not None:
                step = torch.zeros_like(change) if along is None else along.mul_(found.size)
                space.state[p].update(step=step, change=change)
        self._along, self._before = [], []

    def _check(self, space: Space) -> None:
        """Forget the last vector if trainable parameters, shapes, dtypes or devices have changed."""
        check_precision(space.params, "ArmijoCG")
        fits = self.trains_the_same(space)
        for p in space.params:
            shard = own_shard(p)
            if p in space.state:
                step = space.state[p]["step"]
                fits = fits and (step.shape, step.dtype, step.device) == (shard.shape, shard.dtype, shard.device)
        if not fits:
            self.restart()

    def state_dict(self) -> dict[str, Any]:
        """Add whether there is a last vector."""
        return super().state_dict() | {"learnt": self._measured}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of :meth:`state_dict`."""
        super().load_state_dict(state)
        self._measured = state["learnt"]

    def saved(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        """Return the tensors if there is a last vector."""
        return dict(entries) if self._measured else {}

    def loaded(self, entries: Mapping[str, Any], space: Space) -> dict[str, Any]:
        """Undo :meth:`saved`. Older states have other names."""
        older = {"along": "step", "bend": "change"}
        return {older.get(name, name): value for name, value in entries.items()}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_along": [], "_before": []}


def _combine(gradient: Tensor | None, factor: float, last: Tensor | None, turn: float) -> Tensor | None:
    """Return ``factor * gradient + turn * last``; None without a gradient."""
    if gradient is None:
        return None
    vector = gradient * factor
    return vector if last is None else vector.add_(last, alpha=turn)


def _difference(gradient: Tensor | None, after: Tensor | None) -> Tensor | None:
    """Return ``gradient - after``, in the memory of ``gradient``. None is zero."""
    if after is None:
        return gradient
    return -own_shard(after) if gradient is None else gradient.sub_(own_shard(after))
