r"""Value and gradient of the unconstrained feature model without autograd.

Let R be the residual, whose rows are the gradients of each sample's loss in its logits. Then

.. math::
    \nabla_H F = \tfrac1N R W + \lambda_H H, \quad
    \nabla_W F = \tfrac1N R^\top H + \lambda_W W, \quad
    \nabla_b F = \tfrac1N R^\top \mathbf 1 + \lambda_b b.

The value costs one of the three large matrix products, and the gradient the other two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import chain, starmap
from operator import add

import torch
from torch import Tensor

from nclightning.errors import UserError
from nclightning.functional.linear import ELEMENTS_PER_STEP
from nclightning.models.hessian import hessian_product
from nclightning.objective import Objective, Scalar, dot, square_norm, wide
from nclightning.optim import LineObjective
from nclightning.optim.evaluation import Evaluation
from nclightning.optim.hessian import Hessian
from nclightning.ranks import sum_all_over_ranks, sum_over_ranks

__all__ = ["UFMObjective"]

# Number of elements of the features per step on a GPU, which needs larger products than a CPU.
_ELEMENTS_ON_A_GPU = 2**24


class UFMObjective(LineObjective):
    """Problem (2) with free features, any loss and any targets, without autograd.

    Parameters are moved only when a trial is accepted; then the gradients of the start are overwritten. Sums over rows
    are accumulated in float64. Within a row of float32 features, the penalty on the features is summed in float32.

    Args:
        objective: Loss, targets and penalties.
        features: Parameter ``(B, d)``, one row per sample of this process.
        head: Weight ``(K, d)`` and perhaps bias ``(K,)``, parameters that are the same on each process.
        labels: Classes, or rows of the targets, ``(B,)`` int64.
        params: The parameters in the order in which gradients are returned.
        num_samples: N, over all processes.
        shared: Whether processes share the samples.

    Raises:
        ValueError: If parameters and labels are on different devices.
    """

    def __init__(
        self,
        objective: Objective,
        features: Tensor,
        head: Sequence[Tensor],
        labels: Tensor,
        params: Sequence[Tensor],
        num_samples: int,
        shared: bool = False,
    ) -> None:
        devices = {str(tensor.device) for tensor in (features, *head, labels)}
        if len(devices) > 1:
            raise UserError(f"features, head and labels must be on one device, got {' and '.join(sorted(devices))}.")
        self._objective, self._labels, self._num_samples, self._shared = objective, labels, num_samples, shared
        self._params, self._owners = params, [features, *head]
        self._order = [next(i for i, owner in enumerate(self._owners) if owner is p) for p in params]
        info = torch.finfo(features.dtype)
        # For a larger value the gradient may overflow in its dtype, although the value, a float64, does not.
        self._epsilon, self._largest = info.eps, math.sqrt(info.max)
        elements = ELEMENTS_PER_STEP if features.device.type == "cpu" else _ELEMENTS_ON_A_GPU
        self._rows = max(1, min(len(features), elements // features.shape[1]))
        # Trial features are formed block of rows by block, so that all work on a block happens in the cache.
        self._block = features.detach().new_empty(self._rows, features.shape[1])
        self._residual = self._block.new_empty(self._rows, len(head[0]))  # From the first trial on it has all rows.
        self._trial_head = [torch.empty_like(part.detach()) for part in head]
        self._gradients: list[Tensor] = []  # At the start.
        # From the first slope on, the trial gradient of the features is stored. Near an optimum, computing it twice
        # would take a quarter longer.
        self._trial_gradients = [self._block, *map(torch.empty_like, self._trial_head)]
        # Whether the last step needed a slope. If so, value and slope are computed in one pass, which saves a tenth.
        self._expects_slope = False

    def __call__(self) -> Tensor:
        """Set the gradients and return the value."""
        evaluation = self.evaluate()
        for p, g in zip(self._params, evaluation.gradients, strict=True):
            p.grad = g
        return torch.tensor(evaluation.value, dtype=torch.float64)

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        """Evaluate value and gradient."""
        self._gradients = self._gradients or [torch.empty_like(owner) for owner in self._owners]
        self._collect(self._pass(None, self._gradients[0], value=True))
        return self._swap(1)

    @torch.no_grad()
    def measure(self) -> tuple[Tensor, Tensor]:
        """Evaluate the value and the squared norm of the gradient on the device, without storing the whole gradient."""
        of_value, _, of_square = self._pass(None, self._block, value=True)
        return self._combine(of_value), reduce(add, of_square)

    def is_shared_out(self, index: int) -> bool:
        """Say whether it is the features of which processes have rows each."""
        return self._shared and self._params[index] is self._owners[0]

    def inner_products(self, pairs: Sequence[tuple[Sequence[Tensor | None], Sequence[Tensor | None]]]) -> Tensor:
        """Multiply vectors in the order of the parameters, over all processes; one float64 per pair."""
        features, head = [], []
        for pair in pairs:
            both, *rest = zip(*map(self._in_own_order, pair), strict=True)
            features.append(reduce(add, starmap(dot, self._blocks(*both))))
            head.append(reduce(add, starmap(dot, rest)))
        total = torch.stack(features)
        return (sum_over_ranks(total) if self._shared else total) + torch.stack(head)

    def hessian(self, start: Evaluation, unit: float) -> Hessian:
        """Make Hessian-vector products without autograd. A product costs as much as two gradients."""
        return Hessian(self.hessian_product, self._epsilon)

    @torch.no_grad()
    def hessian_product(self, vectors: Sequence[Tensor | None]) -> list[Tensor]:
        """Multiply the Hessian at the current parameters by a vector; both in the order of the parameters."""
        numbers = self._num_samples, self._shared, self._rows
        products = hessian_product(self._objective, self._owners, self._in_own_order(vectors), self._labels, *numbers)
        return [products[i] for i in self._order]

    def begin(self, start: Evaluation, along: Sequence[Tensor | None] | None = None) -> None:
        """Start a search along a vector, or along the gradient, which is overwritten once a trial is accepted."""
        self._gradients = self._in_own_order(start.gradients)
        self._along = list(self._gradients) if along is None else self._in_own_order(along)
        self._limit = max(self._largest, start.value)  # Larger values are reported as infinite, and rejected.

    def _in_own_order(self, vectors: Sequence[Tensor | None]) -> list[Tensor]:
        """Order vectors as features, weight, bias; a missing one is zero."""
        given = dict(zip(self._order, vectors, strict=True))
        return [torch.zeros_like(owner) if (v := given[i]) is None else v for i, owner in enumerate(self._owners)]

    def trial(self, size: float) -> float:
        """Evaluate the value at a step: one matrix product."""
        self._length = size
        for x, p, t in zip(self._owners[1:], self._along[1:], self._trial_head, strict=True):
            torch.sub(x, p, alpha=size, out=t)
        if len(self._residual) < len(self._labels):
            self._residual = self._residual.new_empty(len(self._labels), self._residual.shape[1])
        self._collect(self._pass(self._block, self._trial_gradients[0] if self._expects_slope else None, value=True))
        return self._value if self._value <= self._limit else math.inf

    def slope(self) -> float:
        """Evaluate the inner product of the gradient at the last trial with the direction: two matrix products."""
        if self._slope is None:
            if self._trial_gradients[0] is self._block:
                self._trial_gradients[0] = torch.empty_like(self._gradients[0])
            self._collect(self._pass(self._block, self._trial_gradients[0]))
        assert self._slope is not None
        return self._slope

    def stands_still(self) -> bool:
        """Whether the trial point equals the start."""
        rows = self._blocks(self._owners[0], self._along[0], self._block)
        moves = [(torch.sub(x, p, alpha=self._length, out=t) != x).any() for x, p, t in rows]
        moved = torch.stack(moves).any().double()
        if self._shared:
            sum_over_ranks(moved)
        return not bool(moved) and all(map(torch.equal, self._trial_head, self._owners[1:]))

    def accept(self) -> Evaluation:
        """Move to the trial, and compute its gradient: two matrix products, or none after :meth:`slope`."""
        self._expects_slope = self._slope is not None
        first = 0 if self._expects_slope else 1
        for x, p in zip(self._owners[first:], self._along[first:], strict=True):
            x.sub_(p, alpha=self._length)
        if not self._expects_slope:
            self._collect(self._pass(self._owners[0], self._gradients[0]))
        if not math.isfinite(self._square):
            raise UserError(
                f"the gradient of {type(self._objective.function).__name__} is not finite where its value is: define "
                "its residual so that it is, or start from smaller parameters."
            )
        return self._swap(first)

    def reject(self) -> None:
        """Do nothing: trials do not move the parameters."""

    def _swap(self, first: int) -> Evaluation:
        """Exchange the gradients at the trial with those of the start, from index ``first`` on."""
        mine, others = self._gradients[first:], self._trial_gradients[first:]
        self._gradients[first:], self._trial_gradients[first:] = others, mine
        return Evaluation(self._value, self._epsilon, [self._gradients[i] for i in self._order], self._square)

    def _pass(self, trial: Tensor | None, out: Tensor | None, value: bool = False) -> list[list[Tensor]]:
        """Compute the value, the gradient, or both, in one pass over the rows.

        Args:
            trial: Output tensor for the features at the trial; None evaluates at the parameters. A tensor with fewer
                rows is reused for each block.
            out: Output tensor for the gradient in the features; None computes no gradient. The gradient in the head
                goes to the trial gradients.
            value: Whether to compute the value, and with it the residual. Otherwise the stored residual is used.

        Returns:
            The terms of the value, of the slope (unless the features are moved) and of the squared norm of the
            gradient. A list is empty if its quantity was not computed.
        """
        objective, head = self._objective, self._owners[1:] if trial is None else self._trial_head
        gradients = [] if out is None else self._trial_gradients[1:]
        slope = out is not None and trial is self._block
        for gradient in gradients:
            gradient.zero_()
        along = self._block if trial is None else self._along[0]
        places = [self._block if place is None else place for place in (trial, out)]
        total: list[Tensor] = []
        for x, y, r, p, t, o in self._blocks(self._owners[0], self._labels, self._residual, along, *places):
            features = x if trial is None else torch.sub(x, p, alpha=self._length, out=t)
            sums = objective.residual_of(features, head, y, r) if value else []
            if out is not None:
                new = wide(objective.gradient_of(features, head, r, self._num_samples, gradients, o))
                sums += [torch.dot(new, wide(p)), torch.dot(new, new)] if slope else [torch.dot(new, new)]
            # Summed at once: tensors that are kept until the end would fragment the memory.
            total = [a + b for a, b in zip(total, sums, strict=True)] if total else sums
        if self._shared:
            total = [*torch.stack(total)]
            sum_all_over_ranks([*total, *gradients])
        objective.add_penalty_gradients_(gradients, head)
        return [
            [*total[:2], *map(square_norm, head if objective.lambda_b else head[:1])] if value else [],
            [total[-2], *map(dot, gradients, self._along[1:])] if slope else [],
            [total[-1], *map(square_norm, gradients)] if gradients else [],
        ]

    def _collect(self, sums: list[list[Tensor]]) -> None:
        """Transfer the terms of a pass to the host, and sum them."""
        numbers = iter(_numbers([*chain(*sums)]))
        of_value, of_slope, of_square = ([next(numbers) for _ in part] for part in sums)
        if of_value:
            self._value = self._combine(of_value)
        self._slope = reduce(add, of_slope) if of_slope else None
        self._square = reduce(add, of_square) if of_square else math.nan

    def _combine(self, sums: Sequence[Scalar]) -> Scalar:
        """Compute F from the sums of a pass."""
        losses, of_features, of_weight = sums[:3]
        of_bias = sums[3] if len(sums) > 3 else None
        return self._objective.combine(losses, self._num_samples, of_weight, of_features, of_bias)

    def _blocks(self, *tensors: Tensor) -> Iterator[Sequence[Tensor]]:
        """Yield blocks of rows of all tensors, or the tensors themselves if one block is enough."""
        count = len(self._labels)
        if count == self._rows:
            yield tensors
            return
        for first in range(0, count, self._rows):
            yield [each.narrow(0, first % len(each), min(self._rows, count - first)) for each in tensors]


def _numbers(scalars: list[Tensor]) -> list[float]:
    """Transfer scalars to the host."""
    return torch.stack(scalars).tolist()
