"""Objectives that a line search can evaluate along a descent vector."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from nclightning.compat.torch import version_of
from nclightning.errors import UserError
from nclightning.optim.evaluation import Evaluation, add_up, average_over_ranks, products_of
from nclightning.optim.hessian import Hessian, multiply_by_graph
from nclightning.optim.unchanged import Iterate, IterateCopy, remember
from nclightning.ranks import count_over_ranks, world_size
from nclightning.sharding import own_shard

__all__ = ["ClosureObjective", "LineObjective"]


class LineObjective(ABC):
    """Base class of objectives that can be evaluated along a descent vector without a gradient at each trial.

    An instance is a closure in torch's sense as well: a call sets the gradients at the current parameters and returns
    the value, so that any optimizer can use it. A line search calls ``begin``, then ``trial`` as often as needed, each
    perhaps followed by ``slope``, then ``accept`` or ``reject``, all under ``torch.no_grad``. On several processes
    every returned number is that of the whole objective, bitwise the same on each.

    Example:
        :class:`ClosureObjective` is the implementation for closures:

        >>> import torch
        >>> from nclightning.optim import ClosureObjective, LineObjective
        >>> x = torch.nn.Parameter(torch.tensor([3.0, -4.0], dtype=torch.float64))
        >>> def closure():
        ...     x.grad = None
        ...     value = x.square().sum() / 2
        ...     value.backward()
        ...     return value
        >>> objective: LineObjective = ClosureObjective(closure, [x])
        >>> with torch.no_grad():
        ...     start = objective.evaluate()
        ...     objective.begin(start)
        ...     values = start.value, objective.trial(0.5), objective.trial(1.0)
        ...     objective.reject()
        >>> values
        (12.5, 3.125, 0.0)
        >>> x.tolist()
        [3.0, -4.0]
    """

    @abstractmethod
    def __call__(self) -> Tensor:
        """Set the gradients at the current parameters and return the value."""

    @abstractmethod
    def evaluate(self) -> Evaluation:
        """Evaluate value and gradient at the current parameters."""

    @abstractmethod
    def measure(self) -> tuple[Tensor, Tensor]:
        """Evaluate value and squared norm of the gradient at the current parameters, without a transfer to the host.

        Returns:
            Two scalars on the device. Gradients that were set may change.
        """

    @abstractmethod
    def begin(self, start: Evaluation, along: Sequence[Tensor | None] | None = None) -> None:
        """Begin a search from the current parameters along a descent vector.

        Args:
            start: Value and gradient at the current parameters.
            along: The descent vector p, one entry per parameter, None where the gradient is None; for a sharded
                parameter the shard of this process. It is not overwritten. None in place of the list is the gradient.
        """

    @abstractmethod
    def trial(self, size: float) -> float:
        """Move the parameters by a step along the descent vector, and return the value.

        Args:
            size: Step t along the descent vector p.

        Returns:
            F(x - t p). Infinity if value or gradient is not finite, minus infinity if that is because they overflowed
            while the value decreased.
        """

    @abstractmethod
    def slope(self) -> float:
        """Return the inner product of the gradient at the last trial and the descent vector."""

    @abstractmethod
    def stands_still(self) -> bool:
        """Return whether the step of the last trial was too short to change any parameter."""

    @abstractmethod
    def accept(self) -> Evaluation:
        """Leave the parameters at the last trial.

        Returns:
            Value and gradient there. The gradient of the start may have been overwritten.
        """

    @abstractmethod
    def reject(self) -> None:
        """Restore the parameters of the start, bit for bit."""

    def is_shared_out(self, index: int) -> bool:
        """Return whether the parameter with this index is split between processes."""
        return False

    def add_up(self, products: Sequence[Tensor | None]) -> Tensor:
        """Sum this process's inner products over parameters and processes.

        Args:
            products: One tensor per parameter, all of one shape; None is zero.

        Returns:
            The sum, of the same shape, on the device of the first product.
        """
        return add_up(products, [self.is_shared_out(index) for index in range(len(products))])

    def inner_products(self, pairs: Sequence[tuple[Sequence[Tensor | None], Sequence[Tensor | None]]]) -> Tensor:
        """Return inner products of vectors with one entry per parameter.

        Args:
            pairs: Pairs of vectors. A missing entry is zero.

        Returns:
            One number per pair, over all processes, in float64 on the device.
        """
        columns = zip(*(products_of(left, right) for left, right in pairs), strict=True)
        products = []
        for column in columns:
            present = [product for product in column if product is not None]
            zero = torch.zeros_like(present[0]) if present else None
            stacked = [zero if product is None else product for product in column]
            products.append(torch.stack(stacked) if present else None)  # type: ignore[arg-type]
        total = self.add_up(products)
        return total if total.ndim else total.expand(len(pairs))

    def hessian(self, start: Evaluation, unit: float) -> Hessian:
        """Return the Hessian at the current parameters. It is valid until they change.

        Args:
            start: Value and gradient at the current parameters.
            unit: A distance over which the gradient is known to change, for products by differences of gradients.

        Raises:
            ValueError: If the objective has no products with its Hessian.
        """
        raise UserError(
            f"{type(self).__name__} has no products with the Hessian: define its method hessian, or use ArmijoLBFGS."
        )

    def iterate(self, params: Sequence[Tensor]) -> Iterate:
        """Record the values of the parameters.

        Args:
            params: All parameters of the optimizer.

        Returns:
            The record, which can later be compared with the parameters.
        """
        return remember(params)


class ClosureObjective(LineObjective):
    """The objective of a standard closure, which computes value and gradient at each call.

    On several processes values are averaged, and the closure must synchronise the gradients. Of a parameter that
    ``fully_shard`` splits, each process moves its own shard.

    Args:
        closure: Function that clears the gradients, computes the objective at the current parameters, calls
            ``backward`` and returns the value.
        params: The parameters that the objective depends on.
        owner: Name of the optimizer's class, for messages.

    Example:
        >>> import torch
        >>> from nclightning.optim import ClosureObjective
        >>> x = torch.nn.Parameter(torch.tensor([3.0, -4.0], dtype=torch.float64))
        >>> def closure():
        ...     x.grad = None
        ...     value = x.square().sum() / 2
        ...     value.backward()
        ...     return value
        >>> start = ClosureObjective(closure, [x]).evaluate()
        >>> start.value, start.square
        (12.5, 25.0)
    """

    def __init__(self, closure: Callable[[], Any], params: Sequence[Tensor], owner: str = "optimizer") -> None:
        self.closure = closure
        self._owner = owner
        self._params = params
        self._graph: tuple[Evaluation, list[Tensor | None], list[int]] | None = None  # The last evaluation.
        self._copies: list[Tensor | None] = [None] * len(
            params
        )  # Parameters at the start, then at the end of a search.

    def has(self, params: Sequence[Tensor]) -> bool:
        """Return whether these are the parameters of the objective."""
        return len(params) == len(self._params) and all(p is q for p, q in zip(params, self._params, strict=True))

    def __call__(self) -> Tensor:
        """Call the closure."""
        result: Tensor = self.closure()
        return result

    def evaluate(self) -> Evaluation:
        """Call the closure for value and gradient."""
        value = self._call()
        gradients = self._gradients()
        if all(g is None for g in gradients):
            raise UserError(
                f"the closure of {self._owner}.step left no gradient at any parameter: it has to call backward() on "
                "the objective after zero_grad(), and the objective has to depend on the parameters that the optimizer "
                "was given."
            )
        # After backward(create_graph=True) the gradients can be differentiated again for products with the Hessian.
        # On several processes they cannot, because the sum over processes is not part of the graph.
        with_graph = world_size() == 1 and any(g is not None and g.requires_grad for g in gradients)
        plain = [g if g is None or not g.requires_grad else g.detach() for g in gradients]
        number, epsilon = float(average_over_ranks(value.detach())), self._epsilon_of(value)
        end = Evaluation(number, epsilon, plain, float(self._product(plain, plain)))
        self._graph = (end, gradients, [version_of(p) for p in self._params]) if with_graph else None
        return end

    def measure(self) -> tuple[Tensor, Tensor]:
        """Call the closure for value and gradient. The closure itself may transfer them to the host."""
        here = self.evaluate()
        return torch.tensor(here.value, dtype=torch.float64), torch.tensor(here.square, dtype=torch.float64)

    def begin(self, start: Evaluation, along: Sequence[Tensor | None] | None = None) -> None:
        """Copy the parameters at the start of the search."""
        self._start, self._along = start, start.gradients if along is None else along
        moving = [i for i, v in enumerate(self._along) if v is not None]
        self._moving = [(own_shard(self._params[i]), own_shard(self._along[i])) for i in moving]  # type: ignore[arg-type]
        self._in_shards = any(shard is not self._params[i] for i, (shard, _) in zip(moving, self._moving, strict=True))
        self._origin = [self._copy(i) for i in moving]

    def trial(self, size: float) -> float:
        """Move the parameters and call the closure."""
        self._move(size)
        self._end = self.evaluate()
        if self._end.finite:
            return self._end.value
        fell = self._end.value < self._start.value and not math.isnan(self._end.square)
        return -math.inf if fell else math.inf

    def slope(self) -> float:
        """Compute the inner product from the gradient of the last trial."""
        return float(self._product(self._along, self._end.gradients))

    def stands_still(self) -> bool:
        """Compare the parameters with the copies of the start."""
        still = all(torch.equal(p, x) for (p, _), x in zip(self._moving, self._origin, strict=True))
        if not self._in_shards:
            return still
        return count_over_ranks(int(not still), self._moving[0][0].device) == 0

    def accept(self) -> Evaluation:
        """Return the evaluation of the last trial, where the parameters are."""
        return self._end

    def reject(self) -> None:
        """Copy the parameters of the start back."""
        for (p, _), x in zip(self._moving, self._origin, strict=True):
            p.copy_(x)

    def hessian(self, start: Evaluation, unit: float) -> Hessian:
        """Multiply by differentiating the gradients of the start if they have a graph, else by their differences."""
        graph = self._graph
        if graph is not None and graph[0] is start and graph[2] == [version_of(p) for p in self._params]:
            return Hessian(partial(multiply_by_graph, graph[1], self._params), self._rounding(start))
        moving = [p if g is not None else None for p, g in zip(self._params, start.gradients, strict=True)]
        extent = max(unit, math.sqrt(float(self._product(moving, moving)))) or math.sqrt(start.square)
        length = math.sqrt(self._rounding(start)) * extent
        return Hessian(partial(self._difference, start, length), math.sqrt(self._rounding(start)))

    def _rounding(self, start: Evaluation) -> float:
        return max([start.epsilon, *(torch.finfo(p.dtype).eps for p in self._params)])

    def _difference(self, start: Evaluation, length: float, vector: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return a product with the Hessian: the change of the gradient over this length, divided by the length."""
        size = length / math.sqrt(float(self._product(vector, vector)))
        self.begin(start, vector)
        try:
            self._move(-size)
            there = self.evaluate()
        finally:
            self.reject()
        return [
            None if v is None or h is None else (own_shard(h) if g is None else own_shard(h) - own_shard(g)) / size
            for v, g, h in zip(vector, start.gradients, there.gradients, strict=True)
        ]

    def is_shared_out(self, index: int) -> bool:
        """Return whether ``fully_shard`` splits the parameter."""
        return own_shard(self._params[index]) is not self._params[index]

    def _product(self, left: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> Tensor:
        return self.add_up(products_of(left, right))

    def iterate(self, params: Sequence[Tensor]) -> Iterate:
        """Copy the trainable parameters into the copies of the start, which are no longer needed."""
        return IterateCopy([self._copy(i) if p.requires_grad else None for i, p in enumerate(params)])

    def _copy(self, index: int) -> Tensor:
        """Copy a parameter, or its shard, into memory that is kept for later searches."""
        shard = own_shard(self._params[index].detach())
        copy = self._copies[index]
        if copy is None or (copy.shape, copy.dtype, copy.device) != (shard.shape, shard.dtype, shard.device):
            copy = self._copies[index] = shard.clone()
            return copy
        return copy.copy_(shard)

    def _move(self, size: float) -> None:
        """Set the parameters to x - size * p."""
        for (p, v), x in zip(self._moving, self._origin, strict=True):
            if p.dtype in (torch.float16, torch.bfloat16):  # Their kernels round the step to this dtype.
                p.copy_(torch.sub(x.float(), v.float(), alpha=size))
            else:
                torch.sub(x, v, alpha=size, out=p)

    def _call(self) -> Tensor:
        """Call the closure, and return its value as a tensor. Raise if it changed a parameter."""
        # A closure that zeroes gradients in place must not overwrite those of the start.
        for p in self._params:
            p.grad = None
        versions = [version_of(p) for p in self._params]
        with torch.enable_grad():
            result: Any = self.closure()
        if any(own_shard(p) is p and version_of(p) != v for p, v in zip(self._params, versions, strict=True)):
            raise UserError(
                f"the closure of {self._owner}.step changed a parameter: it may only evaluate the objective at the "
                "current parameters. Clamp or normalise them between steps."
            )
        self._is_plain_number = isinstance(result, Real)
        if isinstance(result, Real):
            return torch.tensor(float(result), dtype=torch.float64)
        if not isinstance(result, Tensor) or result.numel() != 1 or not result.is_floating_point():
            raise UserError(
                f"the closure of {self._owner}.step must return the objective as one real number, got "
                f"{_describe(result)}."
            )
        return result

    def _epsilon_of(self, value: Tensor) -> float:
        """Return the machine epsilon that limits a value: that of its dtype, or of parameters below float32."""
        of_params = {torch.finfo(p.dtype).eps for p in self._params}
        if self._is_plain_number:
            return max(of_params)
        return max([torch.finfo(value.dtype).eps, *(eps for eps in of_params if eps > torch.finfo(torch.float32).eps)])

    def _gradients(self) -> list[Tensor | None]:
        """Return the gradients of the parameters. Raise if one is sparse."""
        gradients = [p.grad for p in self._params]
        for g in gradients:
            if g is not None and g.layout != torch.strided:
                raise UserError(
                    f"{self._owner} needs dense gradients, got a sparse one. Build the embedding with sparse=False."
                )
        return gradients


def _describe(result: Any) -> str:
    """Describe what a closure returned, for messages."""
    if isinstance(result, Tensor):
        return f"a tensor of shape {tuple(result.shape)} and dtype {result.dtype}"
    return "nothing (None)" if result is None else f"an object of type {type(result).__name__}"
