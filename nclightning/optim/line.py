"""What a line search looks at: an objective along its negative gradient."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nclightning.optim.evaluation import Evaluation, average_over_ranks, inner_product
from nclightning.ranks import count_over_ranks
from nclightning.sharding import own_shard

__all__ = ["ClosureLine", "LineObjective"]


class LineObjective(ABC):
    """An objective that knows more than a closure: values without gradients, and how to move.

    It is a closure in torch's sense as well: a call sets the gradients at the current parameters and returns the value,
    so that any optimizer can step it. A search goes ``begin``, then ``trial`` as often as needed, each perhaps followed
    by ``slope``, then ``accept`` or ``reject``, all under ``torch.no_grad``. On several processes all numbers that it
    returns are those of the whole objective, the same bits on each.
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
    def begin(self, start: Evaluation) -> None:
        """Search from the current parameters along the negative gradient.

        Args:
            start: Value and gradient there.
        """

    @abstractmethod
    def trial(self, size: float) -> float:
        """Evaluate the value a step of this size away.

        Args:
            size: Step t along the negative gradient g of the start.

        Returns:
            F(x - t g); not finite where the gradient is not.
        """

    @abstractmethod
    def slope(self) -> float:
        """Evaluate the inner product of the gradients at the last trial and at the start."""

    @abstractmethod
    def stands_still(self) -> bool:
        """Say whether the last trial was too short to change any parameter."""

    @abstractmethod
    def accept(self) -> Evaluation:
        """Leave the parameters at the last trial, with its gradient.

        Returns:
            Value and gradient there. The gradient of the start may have been overwritten.
        """

    @abstractmethod
    def reject(self) -> None:
        """Put the parameters back, bit for bit."""


class ClosureLine(LineObjective):
    """Line of a standard closure, which brings value and gradient at each call.

    On several processes values are averaged; gradients must be synchronised by the closure. Of parameters that
    ``fully_shard`` shares out each process moves its own part.

    Args:
        closure: Clears the gradients, computes the objective at the current parameters, calls ``backward`` and returns
            the value.
        params: What it depends on.
    """

    def __init__(self, closure: Callable[[], Any], params: Sequence[Tensor]) -> None:
        self._closure = closure
        self._params = params

    def __call__(self) -> Tensor:
        """Call the closure."""
        result: Tensor = self._closure()
        return result

    def evaluate(self) -> Evaluation:
        """Call the closure for value and gradient."""
        value = self._call()
        gradients = self._gradients()
        number, epsilon = float(average_over_ranks(value.detach())), torch.finfo(value.dtype).eps
        return Evaluation(number, epsilon, gradients, inner_product(gradients, gradients))

    def measure(self) -> tuple[Tensor, Tensor]:
        """Call the closure for value and gradient, which it may bring to the host by itself."""
        here = self.evaluate()
        return torch.tensor(here.value, dtype=torch.float64), torch.tensor(here.square, dtype=torch.float64)

    def begin(self, start: Evaluation) -> None:
        """Remember the parameters."""
        self._start = start
        pairs = [(p, g) for p, g in zip(self._params, start.gradients, strict=True) if g is not None]
        self._moving = [(own_shard(p), own_shard(g)) for p, g in pairs]
        self._in_shards = any(shard is not p for (shard, _), (p, _) in zip(self._moving, pairs, strict=True))
        self._origin = [p.clone() for p, _ in self._moving]

    def trial(self, size: float) -> float:
        """Move the parameters and call the closure."""
        self._move(size)
        self._end = self.evaluate()
        return self._end.value if self._end.finite else math.inf

    def slope(self) -> float:
        """Multiply the two gradients."""
        return inner_product(self._start.gradients, self._end.gradients)

    def stands_still(self) -> bool:
        """Compare with the parameters remembered."""
        still = all(torch.equal(p, x) for (p, _), x in zip(self._moving, self._origin, strict=True))
        if not self._in_shards:
            return still
        return count_over_ranks(int(not still), self._moving[0][0].device) == 0

    def accept(self) -> Evaluation:
        """Stay."""
        return self._end

    def reject(self) -> None:
        """Go back."""
        for (p, _), x in zip(self._moving, self._origin, strict=True):
            p.copy_(x)

    def _move(self, size: float) -> None:
        for (p, g), x in zip(self._moving, self._origin, strict=True):
            torch.sub(x, g, alpha=size, out=p)

    def _call(self) -> Tensor:
        # Own the gradients: a closure that zeroes in place must not reach those of the start.
        for p in self._params:
            p.grad = None
        with torch.enable_grad():
            result: Any = self._closure()
        if not isinstance(result, Tensor):
            result = torch.as_tensor(result, dtype=torch.float64) if isinstance(result, (int, float)) else None
        if result is None or result.numel() != 1 or result.is_complex():
            raise ValueError("the closure of ArmijoGD.step must return the objective as one real number.")
        assert isinstance(result, Tensor)
        return result

    def _gradients(self) -> list[Tensor | None]:
        gradients = [p.grad for p in self._params]
        for g in gradients:
            if g is not None and g.layout != torch.strided:
                raise ValueError(
                    "ArmijoGD needs dense gradients, got a sparse one. Build the embedding with sparse=False."
                )
        return gradients
