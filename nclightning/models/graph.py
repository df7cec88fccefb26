"""Value and gradient of any differentiable objective by autograd, for line searches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nclightning.errors import UserError
from nclightning.optim import ClosureObjective
from nclightning.optim.evaluation import Evaluation
from nclightning.optim.hessian import Hessian, multiply_by_graph
from nclightning.ranks import sum_all_over_ranks, sum_over_ranks

__all__ = ["AutogradObjective"]


class AutogradObjective(ClosureObjective):
    """Line of an objective whose gradient autograd finds, and only where it is asked for.

    Args:
        objective: Evaluates this process's share of the objective, with its graph.
        params: Parameters, the same on each process.
    """

    def __init__(self, objective: Callable[[], Tensor], params: Sequence[Tensor]) -> None:
        super().__init__(objective, params)
        self._share: Tensor | None = None  # The last value with its graph, until its gradient is computed.

    def __call__(self) -> Tensor:
        """Set the gradients and return the value."""
        return torch.tensor(self.evaluate().value, dtype=torch.float64)

    def evaluate(self) -> Evaluation:
        """Evaluate value and gradient."""
        self._evaluate_value()
        return self._differentiate()

    def trial(self, size: float) -> float:
        """Move the parameters, and evaluate the value."""
        self._move(size)
        return self._evaluate_value()

    def slope(self) -> float:
        """Evaluate the gradient, and its inner product with the descent vector."""
        self._end = self._differentiate()
        return super().slope()

    def accept(self) -> Evaluation:
        """Evaluate the gradient, unless :meth:`slope` has done so."""
        return self._end if self._share is None else self._differentiate()

    def hessian(self, start: Evaluation, unit: float) -> Hessian:
        """Make Hessian-vector products by differentiating twice. The graph of the gradient costs one evaluation."""
        with torch.enable_grad():
            share = self._call()
            moving = [p for p, g in zip(self._params, start.gradients, strict=True) if g is not None]
            found = iter(torch.autograd.grad(share, moving, create_graph=True))
        gradients = [None if g is None else next(found) for g in start.gradients]

        def multiply(vector: Sequence[Tensor | None]) -> list[Tensor | None]:
            products = multiply_by_graph(gradients, self._params, vector)
            sum_all_over_ranks([product for product in products if product is not None])
            return products

        return Hessian(multiply, self._rounding(start), evaluations=1)

    def measure(self) -> tuple[Tensor, Tensor]:
        """Evaluate the value and the squared norm of the gradient, on the device."""
        value = self._evaluate_share()
        self._differentiate_share()
        gradients = self._gradients()
        return value, self._product(gradients, gradients)

    def _evaluate_value(self) -> float:
        """Evaluate the value, summed over processes, as a float."""
        self._value = float(self._evaluate_share())
        return self._value

    def _evaluate_share(self) -> Tensor:
        """Evaluate this process's share with its graph; return the sum over processes on the device."""
        share = self._call()
        if not share.requires_grad:
            raise UserError(
                "the objective depends on no trainable parameter: evaluate_objective has to return it with its graph "
                "(not detached, nor under no_grad)."
            )
        self._share = share
        return sum_over_ranks(share.detach().to(torch.float64, copy=True))

    def _differentiate(self) -> Evaluation:
        """Compute the gradient of the last value."""
        epsilon = self._differentiate_share()
        gradients = self._gradients()
        return Evaluation(self._value, epsilon, gradients, float(self._product(gradients, gradients)))

    def _differentiate_share(self) -> float:
        """Set the gradients; return the machine epsilon of the value."""
        share, self._share = self._share, None
        assert share is not None
        share.backward()  # type: ignore[no-untyped-call]
        sum_all_over_ranks([g for g in self._gradients() if g is not None])
        return torch.finfo(share.dtype).eps
