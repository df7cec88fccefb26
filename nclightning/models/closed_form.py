r"""Value and gradient of the unconstrained feature model without autograd.

With the residual R, whose rows are the gradients of each sample's loss in its logits:

.. math::
    \nabla_H F = \tfrac1N R W + \lambda_H H, \quad
    \nabla_W F = \tfrac1N R^\top H + \lambda_W W, \quad
    \nabla_b F = \tfrac1N R^\top \mathbf 1 + \lambda_b b.

A value costs one of the three matrix products, a gradient the other two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nclightning.errors import UserError
from nclightning.objective import Objective, square_norm
from nclightning.optim import LineObjective
from nclightning.optim.evaluation import Evaluation
from nclightning.ranks import sum_all_over_ranks, sum_over_ranks

__all__ = ["UFMLine"]

# Elements of the features that a CPU's cache holds beside their gradient; a GPU wants large products.
_ELEMENTS_AT_A_TIME, _ELEMENTS_ON_A_GPU = 2**17, 2**24


class UFMLine(LineObjective):
    """Problem (2) with free features, any loss and any targets, in closed form.

    Parameters stay where they are until a trial is accepted; then their gradients are overwritten. Sums over rows are
    accumulated in float64; those within a row of float32 features in float32 for the penalty on features.

    Args:
        objective: Loss, targets and penalties.
        features: Parameter ``(B, d)``, one row per sample of this process.
        head: Weight ``(K, d)`` and perhaps bias ``(K,)``, parameters that are the same on each process.
        labels: Classes, or rows of the targets, ``(B,)`` int64.
        params: The parameters in the order in which gradients are wanted.
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
        self._info = torch.finfo(features.dtype)
        # From here on the gradient may overflow, though the value, a float64, does not.
        self._limit = self._largest = math.sqrt(self._info.max)
        elements = _ELEMENTS_AT_A_TIME if features.device.type == "cpu" else _ELEMENTS_ON_A_GPU
        self._rows = max(1, min(len(features), elements // features.shape[1]))
        # The workspace. Trial features exist some rows at a time, so that what happens to them happens in cache: at
        # K = 100, d = 512 an iteration takes 7% more with all at once in float64, a third more in float32.
        self._some = features.detach().new_empty(self._rows, features.shape[1])
        self._residual = self._some.new_empty(self._rows, len(head[0]))  # Of all rows from the first trial on.
        self._trial_head = [torch.empty_like(part.detach()) for part in head]
        self._gradients: list[Tensor] = []  # At the start.
        # That of the features is kept from the first slope on: to compute it anew takes a quarter more near an optimum.
        self._trial_gradients = [self._some, *(torch.empty_like(part) for part in self._trial_head)]
        self._slope: float | None = None  # At the trial, if it was taken.
        self._expects_slope = False  # As the last step did. Value and slope in one pass spare a tenth.

    def __call__(self) -> Tensor:
        """Set the gradients and return the value."""
        evaluation = self.evaluate()
        for p, g in zip(self._params, evaluation.gradients, strict=True):
            p.grad = g
        return torch.tensor(evaluation.value, dtype=torch.float64)

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        """Evaluate value and gradient."""
        self._bind(self._gradients or [torch.empty_like(owner) for owner in self._owners])
        *sums, self._square = _numbers(self._pass(None, self._gradients[0], value=True))
        self._value = self._objective.combine(sums[0], self._num_samples, *sums[1:])
        return self._swap(1)

    @torch.no_grad()
    def measure(self) -> tuple[Tensor, Tensor]:
        """Evaluate value and squared norm of the gradient on the device, without holding the gradient as a whole."""
        self._bind(self._gradients)
        *sums, square = self._pass(None, self._some, value=True)
        return self._objective.combine(sums[0], self._num_samples, *sums[1:]), square

    def begin(self, start: Evaluation, along: Sequence[Tensor | None] | None = None) -> None:
        """Search along the gradient of the start, which is overwritten once a trial is accepted."""
        assert along is None
        gradients = dict(zip(self._order, start.gradients, strict=True))
        self._bind([g for i in range(len(self._owners)) if (g := gradients[i]) is not None])
        # A value above the start is rejected, finite or not.
        self._limit = max(self._largest, start.value)

    def _bind(self, gradients: list[Tensor]) -> None:
        """Find the parameters, whose memory may have been replaced."""
        self._at, self._gradients = [owner.detach() for owner in self._owners], gradients

    def trial(self, size: float) -> float:
        """Evaluate the value at a step: one matrix product."""
        self._length, self._slope = size, None
        for x, g, t in zip(self._at[1:], self._gradients[1:], self._trial_head, strict=True):
            torch.sub(x, g, alpha=size, out=t)
        if len(self._residual) < len(self._labels):
            self._residual = self._residual.new_empty(len(self._labels), self._residual.shape[1])
        sums = _numbers(self._pass(self._some, self._trial_gradients[0] if self._expects_slope else None, value=True))
        if self._expects_slope:
            *sums, self._slope, self._square = sums
        self._value = self._objective.combine(sums[0], self._num_samples, *sums[1:])
        return self._value if self._value <= self._limit else math.inf

    def slope(self) -> float:
        """Evaluate the gradient at the last trial against that of the start: two matrix products."""
        if self._slope is None:
            if self._trial_gradients[0] is self._some:
                self._trial_gradients[0] = torch.empty_like(self._at[0])
            self._slope, self._square = _numbers(self._pass(self._some, self._trial_gradients[0]))
        return self._slope

    def stands_still(self) -> bool:
        """Compare the trial point with the start."""
        rows = self._each(self._at[0], self._gradients[0], self._some)
        moves = [(torch.sub(x, g, alpha=self._length, out=t) != x).any() for x, g, t in rows]
        moved = torch.stack(moves).any().double()
        if self._shared:
            sum_over_ranks(moved)
        return not bool(moved) and all(map(torch.equal, self._trial_head, self._at[1:]))

    def accept(self) -> Evaluation:
        """Move, and replace the gradient: two matrix products, none after a slope."""
        self._expects_slope = self._slope is not None
        first = 0 if self._expects_slope else 1
        for x, g in zip(self._at[first:], self._gradients[first:], strict=True):
            x.sub_(g, alpha=self._length)
        if not self._expects_slope:
            (self._square,) = _numbers(self._pass(self._at[0], self._gradients[0]))
        if not math.isfinite(self._square):
            raise UserError(
                f"the gradient of {type(self._objective.function).__name__} is not finite where its value is: define "
                "its residual so that it is, or start from smaller parameters."
            )
        return self._swap(first)

    def reject(self) -> None:
        """Do nothing: trials do not move the parameters."""

    def _swap(self, first: int) -> Evaluation:
        """Make the gradients at the trial those of the start, with the first, of the features, or without."""
        mine, others = self._gradients[first:], self._trial_gradients[first:]
        self._gradients[first:], self._trial_gradients[first:] = others, mine
        return Evaluation(self._value, self._info.eps, [self._gradients[i] for i in self._order], self._square)

    def _pass(self, trial: Tensor | None, out: Tensor | None, value: bool = False) -> list[Tensor]:
        """Go through the rows once, for a value, a gradient or both. Of a short tensor rows are written over.

        Args:
            trial: Takes the features at the trial; None stays at the parameters.
            out: Takes the gradient of the features, that of the head goes to the trial gradients; None takes none.
            value: Whether the residual is yet to be computed, and the value.

        Returns:
            Scalars: what :meth:`Objective.combine` takes; the slope, if the start is kept; the square of the gradient.
        """
        objective, head = self._objective, self._at[1:] if trial is None else self._trial_head
        gradients = [] if out is None else self._trial_gradients[1:]
        slope = out is not None and trial is self._some
        for gradient in gradients:
            gradient.zero_()
        start = self._some if trial is None else self._gradients[0]
        places = [self._some if place is None else place for place in (trial, out)]
        total: Tensor | None = None
        for x, y, r, g, t, o in self._each(self._at[0], self._labels, self._residual, start, *places):
            features = x if trial is None else torch.sub(x, g, alpha=self._length, out=t)
            sums = objective.residual_of(features, head, y, r) if value else []
            if out is not None:
                new = _wide(objective.gradient_of(features, head, r, self._num_samples, gradients, o))
                sums += [torch.dot(new, _wide(g)), torch.dot(new, new)] if slope else [torch.dot(new, new)]
            # Added up as they come: those that waited would keep free memory between them from being used again.
            total = torch.stack(sums) if total is None else total.add_(torch.stack(sums))
        assert total is not None
        if self._shared:
            sum_all_over_ranks([total, *gradients])
        scalars = [*total]
        if value:
            weight_square, *bias_square = [square_norm(part) for part in head]
            scalars[1:2] = [weight_square, scalars[1], *bias_square]
        if gradients:
            objective.add_penalty_gradients_(gradients, head)
            scalars[-1] = torch.stack([scalars[-1], *map(square_norm, gradients)]).sum()
        if slope:
            inner = [torch.dot(_wide(a), _wide(b)) for a, b in zip(gradients, self._gradients[1:], strict=True)]
            scalars[-2] = scalars[-2] + torch.stack(inner).sum()
        return scalars

    def _each(self, *tensors: Tensor) -> Iterator[list[Tensor]]:
        """Yield some rows of each at a time."""
        for first in range(0, len(self._labels), self._rows):
            count = min(self._rows, len(self._labels) - first)
            yield [each.narrow(0, first % len(each), count) for each in tensors]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).double()


def _numbers(scalars: list[Tensor]) -> list[float]:
    """Bring scalars to the host."""
    return torch.stack(scalars).tolist()
