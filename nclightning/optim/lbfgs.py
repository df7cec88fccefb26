"""Limited-memory BFGS with the line search of ArmijoGD."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from operator import add
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

__all__ = ["ArmijoLBFGS", "LimitedMemoryBFGS"]

_COLUMNS = 2**16  # Number of columns that are converted to float64 at once, to limit memory.


class ArmijoLBFGS(LineSearchOptimizer):
    r"""Limited-memory BFGS with the line search of :class:`ArmijoGD`.

    The descent vector is p = H g. Here H is the inverse BFGS matrix built from the last pairs of steps
    :math:`s_k = x_{k+1} - x_k` and gradient changes :math:`y_k = g_{k+1} - g_k`, starting from :math:`\gamma I` with
    :math:`\gamma = \langle s, y\rangle / \langle y, y\rangle` of the last pair (Nocedal and Wright 2006, Sec. 7.2). It
    is evaluated in the compact form (Byrd, Nocedal and Schnabel 1994), from inner products in float64.

    The first trial is t = 1. A trial is accepted on the conditions of :class:`ArmijoGD` with
    :math:`\langle g, p\rangle` in place of :math:`\|g\|^2`. After a rejected trial the next one is the minimum of the
    parabola fitted to it. The very first step is along the gradient and tries ``initial_step`` first. Until a curvature
    has been measured, the first trial grows fourfold from step to step.

    There are two safeguards. First, a pair is left out if :math:`\langle s, y\rangle` is not larger than the round-off
    of :math:`\|s\| (\|y\| + \|g_k\| + \|g_{k+1}\|)`, because the objective then is not convex along the step, or too
    flat to measure its curvature. Second, all pairs are forgotten if p is not a direction of descent beyond round-off,
    if no step is found along p, or if parameters were frozen, added or changed their shape. The step then goes along
    the gradient, scaled by :math:`\gamma`. Closures, options, writes to parameters between steps, and several processes
    are treated as by :class:`ArmijoGD`. Writes to parameters do not remove pairs, because these are measured curvature.

    A ``state_dict`` contains the pairs for each parameter, in its shape, so that a resumed run continues bit for bit.
    For parameters that are split between processes, each process keeps its part of the pairs.

    Memory: up to ``2 * history + 4`` times the parameters, beyond that of :class:`ArmijoGD`.

    Args:
        params: Parameters or parameter groups. Real and dense, float32 or float64.
        initial_step: First trial of the first step, along the gradient.
        history: Number of pairs.
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
        >>> from nclightning.optim import ArmijoLBFGS
        >>> x = torch.nn.Parameter(torch.tensor([3.0, -4.0], dtype=torch.float64))
        >>> optimizer = ArmijoLBFGS([x])
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     value = (x * x * torch.tensor([1.0, 100.0])).sum() / 2
        ...     value.backward()
        ...     return value
        >>> for _ in range(10):
        ...     value = optimizer.step(closure)
        >>> value < 1e-20
        True
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        initial_step: float = 1.0,
        history: int = 10,
        c1: float = 1e-4,
        shrink: float = 0.5,
        max_trials: int = 60,
        noise: float | None = None,
        reuse_gradient: bool = True,
    ) -> None:
        options: dict[str, Any] = {
            "initial_step": initial_step,
            "history": history,
            "c1": c1,
            "shrink": shrink,
            "max_trials": max_trials,
            "noise": noise,
            "reuse_gradient": reuse_gradient,
        }
        super().__init__(params, options, LimitedMemoryBFGS())


class LimitedMemoryBFGS(LearningDirection):
    r"""The vector H g of limited-memory BFGS, in its compact form.

    Let the columns of S and Y be the m pairs from the oldest to the newest, R the upper triangle of
    :math:`S^\top Y`, and D its diagonal. Then

    .. math::
        H g = \gamma g + S \delta - \gamma Y \alpha, \quad \alpha = R^{-1} S^\top g, \quad
        \delta = R^{-\top} \big( D \alpha + \gamma (Y^\top Y \alpha - Y^\top g) \big) .

    The optimizer's state has for each parameter a tensor ``pairs``. Its first m + 1 rows are steps, and the other m + 1
    are gradient changes. One row of each is free: the next pair is written there while the oldest is still in use. Each
    pair is multiplied by a number that brings its inner product near 1. This does not change H, and keeps the inner
    products from underflow and overflow.
    """

    kind = "limited-memory BFGS"

    def __init__(self) -> None:
        super().__init__()
        self._forget()

    def _forget(self) -> None:
        """Remove all pairs and everything that was computed from them."""
        self._order: list[int] = []  # Rows of the pairs, from the oldest to the newest.
        self._inner: list[list[float]] = []  # Inner products of steps with gradient changes, by row.
        self._squares: list[list[float]] = []  # Inner products of gradient changes with each other, by row.
        self._known: tuple[Evaluation, list[float]] | None = None  # Inner products of all rows with this gradient.
        self._along: list[Tensor | None] = []
        self._length = 0.0
        self._measured = False  # Whether the last step made a pair.

    def restart(self) -> bool:
        """Forget the pairs, and keep the scale."""
        had_history = bool(self._order)
        self._forget()
        return had_history

    def find(self, start: Evaluation, objective: LineObjective, space: Space) -> Descent:
        """Return H g."""
        self._check(space)
        count = space.options["history"] + 1
        rows = [_rows_of(space, p, g) for p, g in zip(space.params, start.gradients, strict=True)]
        while True:
            factors = self._factors(start, objective, rows, count)
            self._along = [
                None if g is None or pairs is None else _combine(pairs, factors, own_shard(g), self.scale)
                for pairs, g in zip(rows, start.gradients, strict=True)
            ]
            products = objective.inner_products([(start.gradients, self._along), (self._along, self._along)])
            slope, square = products.tolist()
            self._length = math.sqrt(square)
            if is_descent(start, slope, self._length, space) or (not self._order and self.scale == 1.0):
                break
            if not self.restart():  # The gradient times the scale overflows or underflows.
                self.scale = 1.0
        for pairs, g in zip(rows, start.gradients, strict=True):
            if pairs is not None:  # Kept here because the objective may overwrite the gradient.
                before = pairs[count + self._free(count)]
                before.zero_() if g is None else before.copy_(_flat(g))
        return Descent(self._along, slope)

    def accept(self, start: Evaluation, found: SearchResult, objective: LineObjective, space: Space) -> None:
        """Build the pair of the step, and keep it if the curvature along the step is positive."""
        assert found.end is not None
        end, count = found.end, space.options["history"] + 1
        free, length = self._free(count), found.size * self._length
        gradients = math.sqrt(start.square) + math.sqrt(end.square)
        factor = _balancing(length, gradients, space.params)
        rows = [_rows_of(space, p, g) for p, g in zip(space.params, end.gradients, strict=True)]
        for pairs, along, g in zip(rows, self._along, end.gradients, strict=True):
            if pairs is not None:
                step, change = pairs[free], pairs[count + free]
                step.zero_() if along is None else torch.mul(_flat(along), -found.size * factor, out=step)
                change.neg_() if g is None else torch.sub(_flat(g), change, out=change)
                change.mul_(factor)
        changes = [None if pairs is None else pairs[count + free] for pairs in rows]
        products = _multiply(rows, changes, objective)
        self._known = end, _multiply(rows, end.gradients, objective)
        curvature, square = products[free], products[count + free]
        noise = ROUNDINGS * epsilon_of(space.params) * factor * length * (math.sqrt(square) + factor * gradients)
        scale = curvature / square if square > 0 else math.inf
        self._along, self._measured = [], noise < curvature and 0 < scale < math.inf
        if not self._measured:
            for pairs in rows:  # An infinity or NaN in the free row would spread through the products with all rows.
                if pairs is not None:
                    pairs[free].zero_()
                    pairs[count + free].zero_()
            return
        if not self._order:
            self._inner, self._squares = ([[0.0] * count for _ in range(count)] for _ in range(2))
        self._order = [*self._order, free][-count + 1 :]
        for i in range(count):
            self._inner[i][free] = products[i]
            self._squares[i][free] = self._squares[free][i] = products[count + i]
        self.scale = scale

    def _check(self, space: Space) -> None:
        """Forget all pairs if trainable parameters, shapes, dtypes or devices have changed."""
        check_precision(space.params, "ArmijoLBFGS")
        fits, count = self.trains_the_same(space), space.options["history"] + 1
        for p in space.params:
            shard = own_shard(p)
            if p in space.state:
                pairs, shape = space.state[p]["pairs"], (2 * count, *shard.shape)
                fits = fits and (pairs.shape, pairs.dtype, pairs.device) == (shape, shard.dtype, shard.device)
        if not fits:
            self.restart()
            for p in space.params:
                space.state.pop(p, None)

    def _free(self, count: int) -> int:
        return min(set(range(count)) - set(self._order))

    def _factors(
        self, start: Evaluation, objective: LineObjective, rows: Sequence[Tensor | None], count: int
    ) -> Tensor | None:
        """Return the coefficients of H g, delta and -gamma alpha, one per row; None if there are no pairs."""
        if not self._order:
            return None
        if self._known is None or self._known[0] is not start:
            self._known = start, _multiply(rows, start.gradients, objective)
        steps, changes = self._known[1][:count], self._known[1][count:]
        inner, squares, order, scale = self._inner, self._squares, self._order, self.scale
        alpha, delta = [0.0] * count, [0.0] * count
        for place in reversed(range(len(order))):
            i = order[place]
            rest = sum(inner[i][j] * alpha[j] for j in order[place + 1 :])
            alpha[i] = (steps[i] - rest) / inner[i][i]
        for place, i in enumerate(order):
            right = inner[i][i] * alpha[i] + scale * (sum(squares[i][j] * alpha[j] for j in order) - changes[i])
            delta[i] = (right - sum(inner[j][i] * delta[j] for j in order[:place])) / inner[i][i]
        return torch.tensor([*delta, *(-scale * a for a in alpha)], dtype=torch.float64, device="cpu")

    def state_dict(self) -> dict[str, Any]:
        """Add the order of the pairs and their inner products."""
        numbers = {"order": self._order, "inner": self._inner, "squares": self._squares}
        return super().state_dict() | copy.deepcopy(numbers)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of :meth:`state_dict`."""
        self._forget()
        super().load_state_dict(state)
        self._order = list(state["order"])
        self._inner, self._squares = copy.deepcopy((state["inner"], state["squares"]))

    def saved(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        """Return the step and the gradient change of each pair, named by their row."""
        steps, changes = entries["pairs"].chunk(2)
        named = (("step", steps), ("change", changes))
        return {f"{name}_{row}": part[row] for name, part in named for row in self._order}

    def loaded(self, entries: Mapping[str, Any], space: Space) -> dict[str, Any]:
        """Write the pairs to their rows."""
        count = len(self._inner)  # If the option history was changed since, the next step forgets the pairs.
        some = next(iter(entries.values()))
        pairs = some.new_zeros(2 * count, *some.shape)
        for first, name in ((0, "step"), (count, "change")):
            for row in self._order:
                pairs[first + row] = entries[f"{name}_{row}"]
        return {"pairs": pairs}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_known": None, "_along": []}


def _flat(tensor: Tensor) -> Tensor:
    return own_shard(tensor).reshape(-1)


def _balancing(length: float, gradient: float, params: Sequence[Tensor]) -> float:
    """Return the power of two that brings the product of a step and a gradient of these norms near 1."""
    if not (0 < length < math.inf and 0 < gradient < math.inf):
        return 1.0
    most = 1000 if epsilon_of(params) < 1e-10 else 120  # Exponents that float64 and float32 can represent.
    return 2.0 ** min(max(-round((math.log2(length) + math.log2(gradient)) / 2), -most), most)


def _rows_of(space: Space, p: Tensor, gradient: Tensor | None) -> Tensor | None:
    """Return the pairs of a parameter as a matrix; None if the parameter has never had a gradient."""
    if p not in space.state:
        if gradient is None:
            return None
        shard = own_shard(p.detach())
        space.state[p]["pairs"] = shard.new_zeros(2 * space.options["history"] + 2, *shard.shape)
    pairs: Tensor = space.state[p]["pairs"]
    return pairs.view(len(pairs), own_shard(p).numel())


def _columns(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """Yield blocks of columns of the tensors, converted to float64."""
    count = tensors[0].shape[-1]
    if count <= _COLUMNS:
        yield [each.double() for each in tensors]
        return
    for first in range(0, count, _COLUMNS):
        yield [each[..., first : first + _COLUMNS].double() for each in tensors]


def _multiply(rows: Sequence[Tensor | None], vector: Sequence[Tensor | None], objective: LineObjective) -> list[float]:
    """Return the inner products of all rows with a vector, over parameters and processes."""
    products = [
        None if pairs is None or part is None else reduce(add, (a @ b for a, b in _columns(pairs, _flat(part))))
        for pairs, part in zip(rows, vector, strict=True)
    ]
    numbers: list[float] = objective.add_up(products).tolist()
    return numbers


def _combine(pairs: Tensor, factors: Tensor | None, gradient: Tensor, scale: float) -> Tensor:
    """Return ``scale * gradient`` plus the rows weighted by ``factors``."""
    if factors is None:
        return gradient * scale
    factors, flat = factors.to(pairs.device), gradient.reshape(-1)
    parts = [(factors @ a).add_(b, alpha=scale).to(gradient.dtype) for a, b in _columns(pairs, flat)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(gradient.shape)
