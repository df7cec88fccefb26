r"""Value and gradient of the unconstrained feature model without autograd.

With logits Z, residual :math:`R = Z - Y` (MSE) or :math:`\mathrm{softmax}(Z) - Y` (CE):

.. math::
    \nabla_H F = \tfrac1N R W + \lambda_H H, \quad
    \nabla_W F = \tfrac1N R^\top H + \lambda_W W, \quad
    \nabla_b F = \tfrac1N R^\top \mathbf 1 .

Features are gone through a cacheful of rows at a time: trial features never exist as a whole, a trial that is rejected
costs one of the three matrix products, and what is held beside the features is their gradient and the residual.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nclightning.objective import Objective, square_norm
from nclightning.optim import LineObjective
from nclightning.optim.evaluation import Evaluation
from nclightning.ranks import sum_all_over_ranks, sum_over_ranks

__all__ = ["UFMLine"]

# Elements of the features that a CPU's cache holds beside their gradient; a GPU wants large products.
_ELEMENTS_AT_A_TIME, _ELEMENTS_ON_A_GPU = 2**17, 2**24


class _Rows(NamedTuple):
    """Views of some rows of the features."""

    features: Tensor
    gradient: Tensor
    residual: Tensor
    labels: Tensor
    room: Tensor


class _Head(NamedTuple):
    """Weight or bias of the head: where it is, the gradient there, the last trial, the gradient there."""

    current: Tensor
    gradient: Tensor
    trial: Tensor
    trial_gradient: Tensor


class UFMLine(LineObjective):
    """Problem (2) with free features, in closed form.

    Parameters stay where they are until a trial is accepted; then their gradients are overwritten. Norms, and sums over
    rows at a time, are accumulated in float64.

    Args:
        objective: Loss and penalties, none on the bias.
        features: Parameter ``(B, d)``, one row per sample of this process.
        head: Weight ``(K, d)`` and perhaps bias ``(K,)``, parameters that are the same on each process.
        labels: ``(B,)`` int64.
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
        assert objective.lambda_b == 0.0
        devices = {str(tensor.device) for tensor in (features, *head, labels)}
        if len(devices) > 1:
            raise ValueError(f"features, head and labels must be on one device, got {' and '.join(sorted(devices))}.")
        self._objective, self._num_samples, self._shared = objective, num_samples, shared
        self._params, self._owners = params, [features, *head]
        self._order = [next(i for i, owner in enumerate(self._owners) if owner is p) for p in params]
        self._features, self._labels = features.detach(), labels
        count, dim = features.shape
        on_cpu = features.device.type == "cpu"
        self._rows_at_a_time = max(1, min(count, (_ELEMENTS_AT_A_TIME if on_cpu else _ELEMENTS_ON_A_GPU) // dim))
        self._residual = self._features.new_empty(count, len(head[0]))
        self._room = self._features.new_empty(self._rows_at_a_time, dim)
        dtype = features.dtype
        # From here on the gradient may overflow, though the value, a float64, does not.
        self._largest = math.sqrt(torch.finfo(dtype).max)
        self._limit, self._epsilon = self._largest, torch.finfo(dtype).eps
        self._head: list[_Head] = []
        self._gradients: list[Tensor] = []

    def __call__(self) -> Tensor:
        """Set the gradients and return the value."""
        evaluation = self.evaluate()
        for p, g in zip(self._params, evaluation.gradients, strict=True):
            p.grad = g
        return torch.tensor(evaluation.value, dtype=torch.float64)

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        """Evaluate value and gradient, as a trial at length zero."""
        self._bind()
        self._write_to([g.zero_() for g in self._gradients] or [torch.zeros_like(owner) for owner in self._owners])
        self.trial(0.0)
        return self._end(move=False)

    @torch.no_grad()
    def measure(self) -> tuple[Tensor, Tensor]:
        """Evaluate value and squared norm of the gradient on the device."""
        self._bind()
        self._write_to([torch.zeros_like(owner) for owner in self._owners])
        losses, features_square, weight_square = self._trial(0.0)
        value = self._objective.combine(losses, self._num_samples, weight_square, features_square)
        return value, self._replace_gradient(move=False)

    def begin(self, start: Evaluation) -> None:
        """Search along the gradient of the start, which is overwritten once a trial is accepted."""
        by_owner = dict(zip(self._order, start.gradients, strict=True))
        gradients = [g for i in range(len(self._owners)) if (g := by_owner[i]) is not None]
        # A value above the start is rejected, finite or not.
        self._limit = max(self._largest, start.value)
        known = len(self._gradients) == len(gradients) and not self._bind()
        if not known or any(new is not old for new, old in zip(gradients, self._gradients, strict=True)):
            self._write_to(gradients)

    def _bind(self) -> bool:
        """Follow parameters whose memory was replaced; say whether there were any."""
        currents = [self._features, *(part.current for part in self._head)]
        if len(currents) == len(self._owners) and all(
            current.is_set_to(owner) for current, owner in zip(currents, self._owners, strict=True)
        ):
            return False
        self._features = self._owners[0].detach()
        return True

    def _write_to(self, gradients: list[Tensor]) -> None:
        self._gradients = gradients
        whole = (self._features, gradients[0], self._residual, self._labels)
        parts = zip(*(torch.split(tensor, self._rows_at_a_time) for tensor in whole), strict=True)
        self._rows = [_Rows(h, g, r, y, self._room.narrow(0, 0, len(h))) for h, g, r, y in parts]
        self._head = [
            _Head(owner.detach(), gradient, torch.empty_like(gradient), torch.empty_like(gradient))
            for owner, gradient in zip(self._owners[1:], gradients[1:], strict=True)
        ]

    def trial(self, size: float) -> float:
        """Evaluate the value at a step: one matrix product."""
        losses, features_square, weight_square = self._trial(size).tolist()
        self._value = self._objective.combine(losses, self._num_samples, weight_square, features_square)
        return self._value if self._value <= self._limit else math.inf

    def _trial(self, size: float) -> Tensor:
        """Compute the residual; return summed losses and squared norms of features and weight."""
        self._size, self._head_is_known = size, False
        for part in self._head:
            torch.sub(part.current, part.gradient, alpha=self._size, out=part.trial)
        total = self._reduce(_sum(self._trial_of(rows) for rows in self._rows))
        return torch.cat([total, square_norm(self._head[0].trial).view(1)])

    def _trial_of(self, rows: _Rows) -> Tensor:
        features = self._trial_features(rows)
        torch.mm(features, self._head[0].trial.T, out=rows.residual)
        for bias in self._head[1:]:
            rows.residual.add_(bias.trial)
        return torch.stack([self._objective.residual_(rows.residual, rows.labels), square_norm(features)])

    def _trial_features(self, rows: _Rows) -> Tensor:
        return torch.sub(rows.features, rows.gradient, alpha=self._size, out=rows.room)

    def slope(self) -> float:
        """Evaluate the gradient at the last trial against that of the start: two matrix products."""
        return float(self._slope())

    def _slope(self) -> Tensor:
        self._head[0].trial_gradient.zero_()
        slope = self._complete_head(_sum(self._slope_of(rows) for rows in self._rows))
        return torch.cat([slope, *(_inner(part.trial_gradient, part.gradient) for part in self._head)]).sum()

    def _slope_of(self, rows: _Rows) -> Tensor:
        features = self._trial_features(rows)
        self._head[0].trial_gradient.addmm_(rows.residual.T, features, alpha=1 / self._num_samples)
        return _inner(self._feature_gradient(features, rows.residual, out=features), rows.gradient)

    def stands_still(self) -> bool:
        """Compare the trial point with the start."""
        moved = self._reduce(_sum(self._moves(rows) for rows in self._rows))
        return not bool(moved) and all(torch.equal(part.trial, part.current) for part in self._head)

    def _moves(self, rows: _Rows) -> Tensor:
        return (self._trial_features(rows) != rows.features).any().double().view(1)

    def accept(self) -> Evaluation:
        """Move, and replace the gradient: two matrix products, one of which a slope has done already."""
        return self._end(move=True)

    def _end(self, move: bool) -> Evaluation:
        square = float(self._replace_gradient(move))
        return Evaluation(self._value, self._epsilon, [self._gradients[i] for i in self._order], square)

    def _replace_gradient(self, move: bool) -> Tensor:
        """Replace the gradient, and move the parameters or not; return the squared norm."""
        if self._head_is_known:
            square = self._reduce(_sum(self._gradient_of(rows, move) for rows in self._rows))
        else:
            self._head[0].trial_gradient.zero_()
            square = self._complete_head(_sum(self._gradient_of(rows, move) for rows in self._rows))
        if move:
            for part in self._head:
                part.current.sub_(part.gradient, alpha=self._size)
        self._head = [part._replace(gradient=part.trial_gradient, trial_gradient=part.gradient) for part in self._head]
        self._gradients[1:] = [part.gradient for part in self._head]
        return torch.cat([square, *(square_norm(part.gradient).view(1) for part in self._head)]).sum()

    def _gradient_of(self, rows: _Rows, move: bool) -> Tensor:
        features = rows.features.sub_(rows.gradient, alpha=self._size) if move else rows.features
        if not self._head_is_known:
            self._head[0].trial_gradient.addmm_(rows.residual.T, features, alpha=1 / self._num_samples)
        return square_norm(self._feature_gradient(features, rows.residual, out=rows.gradient)).view(1)

    def reject(self) -> None:
        """Do nothing: trials do not move the parameters."""

    def _reduce(self, total: Tensor) -> Tensor:
        return sum_over_ranks(total) if self._shared else total

    def _feature_gradient(self, features: Tensor, residual: Tensor, out: Tensor) -> Tensor:
        weight, lambda_h = self._head[0].trial, self._objective.lambda_h
        return torch.mul(features, lambda_h, out=out).addmm_(residual, weight, alpha=1 / self._num_samples)

    def _complete_head(self, summand: Tensor) -> Tensor:
        """Make the gradient of the head out of its parts; sum them, and a summand, over processes on the way."""
        gradients = [part.trial_gradient for part in self._head]
        for bias_gradient in gradients[1:]:
            torch.mul(self._residual.sum(dim=0), 1 / self._num_samples, out=bias_gradient)
        if self._shared:
            sum_all_over_ranks([summand, *gradients])
        gradients[0].add_(self._head[0].trial, alpha=self._objective.lambda_w)
        self._head_is_known = True
        return summand


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.reshape(-1).double(), b.reshape(-1).double()).view(1)


def _sum(parts: Iterable[Tensor]) -> Tensor:
    """Add parts up as they come: those that waited would keep free memory between them from being used again."""
    total: Tensor | None = None
    for part in parts:
        total = part if total is None else total.add_(part)
    assert total is not None
    return total
