r"""Value and gradient of the unconstrained feature model without autograd.

With logits Z, residual :math:`R = Z - Y` (MSE) or :math:`\mathrm{softmax}(Z) - Y` (CE):

.. math::
    \nabla_H F = \tfrac1N R W + \lambda_H H, \quad
    \nabla_W F = \tfrac1N R^\top H + \lambda_W W, \quad
    \nabla_b F = \tfrac1N R^\top \mathbf 1 .

Features are gone through a cacheful of rows at a time: trial features never exist as a whole, a trial that is rejected
costs one of the three matrix products, and what is held beside the features is their gradient and the residual. Of the
gradient that a slope needs half is kept for when the trial is accepted, in room made for the first slope; where a slope
decided the last step, that of a trial is taken in the same pass as its value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

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
# Between these mean squares no sum over a row of products of two gradients under- or overflows in float32.
_LEAST_SQUARE, _LARGEST_SQUARE = 1e-30, 1e20


class _Rows(NamedTuple):
    """Some rows of the features; the last is for their gradient at a trial, if it is kept."""

    features: Tensor
    gradient: Tensor
    residual: Tensor
    labels: Tensor
    room: Tensor
    kept: Tensor | None


class _Head(NamedTuple):
    """Weight or bias of the head: where it is, the gradient there, the last trial, the gradient there."""

    current: Tensor
    gradient: Tensor
    trial: Tensor
    trial_gradient: Tensor


class UFMLine(LineObjective):
    """Problem (2) with free features, in closed form.

    Parameters stay where they are until a trial is accepted; then their gradients are overwritten. Sums over rows are
    accumulated in float64; those within a row of float32 features in float32 for the penalty on trial features, and for
    slopes where they can neither under- nor overflow.

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
            raise UserError(f"features, head and labels must be on one device, got {' and '.join(sorted(devices))}.")
        self._objective, self._num_samples, self._shared = objective, num_samples, shared
        self._params, self._owners = params, [features, *head]
        self._order = [next(i for i, owner in enumerate(self._owners) if owner is p) for p in params]
        self._features, self._labels = features.detach(), labels
        count, dim = features.shape
        on_cpu = features.device.type == "cpu"
        self._rows_at_a_time = max(1, min(count, (_ELEMENTS_AT_A_TIME if on_cpu else _ELEMENTS_ON_A_GPU) // dim))
        self._room = self._features.new_empty(self._rows_at_a_time, dim)
        dtype = features.dtype
        # From here on the gradient may overflow, though the value, a float64, does not.
        self._largest = math.sqrt(torch.finfo(dtype).max)
        self._limit, self._epsilon = self._largest, torch.finfo(dtype).eps
        self._is_narrow = dtype != torch.float64
        self._head: list[_Head] = []
        self._gradients: list[Tensor] = []
        # Sums over rows of the slopes at the last trial, if they were taken, and of the squares of what was kept.
        self._rows_slope: Tensor | None = None
        self._kept_square: Tensor | None = None
        self._head_is_known = self._expects_slope = self._rows_are_summable = False

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
        """Evaluate value and squared norm of the gradient on the device, without holding the gradient as a whole."""
        self._bind()
        # A trial at length zero: all rows share the room for some of the gradient and of the residual.
        self._write_to([self._room, *(torch.zeros_like(owner) for owner in self._owners[1:])])
        self._move_head(0.0)
        self._clear_head()
        total = self._complete_head(_sum(self._measure_of(rows) for rows in self._rows))
        losses, features_square, square = total
        value = self._objective.combine(losses, self._num_samples, square_norm(self._head[0].trial), features_square)
        self._gradients = []
        return value, torch.stack([square, *(square_norm(part.trial_gradient) for part in self._head)]).sum()

    def _measure_of(self, rows: _Rows) -> Tensor:
        sums = self._trial_of(rows, rows.features)
        self._add_to_head(rows, rows.features)
        return torch.stack([*sums, square_norm(self._feature_gradient(rows.features, rows.residual, out=rows.room))])

    def begin(self, start: Evaluation) -> None:
        """Search along the gradient of the start, which is overwritten once a trial is accepted."""
        by_owner = dict(zip(self._order, start.gradients, strict=True))
        gradients = [g for i in range(len(self._owners)) if (g := by_owner[i]) is not None]
        mean_square = start.square / (self._num_samples * self._features.shape[1])
        self._rows_are_summable = self._is_narrow and _LEAST_SQUARE < mean_square < _LARGEST_SQUARE
        # A value above the start is rejected, finite or not.
        self._limit = max(self._largest, start.value)
        known = not self._bind() and len(self._gradients) == len(gradients)
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
        self._gradients, self._expects_slope = gradients, False
        self._split()
        self._head = [
            _Head(owner.detach(), gradient, torch.empty_like(gradient), torch.empty_like(gradient))
            for owner, gradient in zip(self._owners[1:], gradients[1:], strict=True)
        ]

    def _split(self) -> None:
        """Make the parts."""
        size, num_classes, gradient = self._rows_at_a_time, len(self._owners[1]), self._gradients[0]
        shared = self._room.new_empty(size, num_classes) if gradient is self._room else None
        self._rows: list[_Rows] = []
        for features, labels in zip(torch.split(self._features, size), torch.split(self._labels, size), strict=True):
            first, count = size * len(self._rows), len(features)
            own = gradient.narrow(0, first if shared is None else 0, count)
            # Not views of one tensor: such a large one, once freed, would have the C library hold on to as much.
            residual = own.new_empty(count, num_classes) if shared is None else shared.narrow(0, 0, count)
            self._rows.append(_Rows(features, own, residual, labels, self._room.narrow(0, 0, count), None))

    def trial(self, size: float) -> float:
        """Evaluate the value at a step: one matrix product."""
        losses, features_square, weight_square = self._trial(size).tolist()
        self._value = self._objective.combine(losses, self._num_samples, weight_square, features_square)
        return self._value if self._value <= self._limit else math.inf

    def _trial(self, size: float) -> Tensor:
        """Compute the residual; return summed losses and squared norms of features and weight."""
        self._move_head(size)
        if self._expects_slope:
            self._clear_head()
        total = _sum(torch.stack(self._trial_of(rows, self._trial_features(rows))) for rows in self._rows)
        if self._expects_slope:
            total, self._rows_slope = torch.split(total, 2)
        return torch.cat([self._reduce(total), square_norm(self._head[0].trial).view(1)])

    def _move_head(self, size: float) -> None:
        """Begin a trial."""
        self._size, self._rows_slope, self._kept_square, self._head_is_known = size, None, None, False
        for part in self._head:
            torch.sub(part.current, part.gradient, alpha=self._size, out=part.trial)

    def _trial_of(self, rows: _Rows, features: Tensor) -> list[Tensor]:
        torch.mm(features, self._head[0].trial.T, out=rows.residual)
        for bias in self._head[1:]:
            rows.residual.add_(bias.trial)
        norms = torch.linalg.vector_norm(features, dim=1) if self._is_narrow else features
        sums = [self._objective.residual_(rows.residual, rows.labels), square_norm(norms)]
        return [*sums, self._slope_of(rows, features)] if self._expects_slope else sums

    def _trial_features(self, rows: _Rows) -> Tensor:
        return torch.sub(rows.features, rows.gradient, alpha=self._size, out=rows.room)

    def slope(self) -> float:
        """Evaluate the gradient at the last trial against that of the start: two matrix products."""
        return float(self._slope())

    def _slope(self) -> Tensor:
        if self._rows_slope is None:
            self._make_room()
            self._clear_head()
            self._rows_slope = _sum(self._slope_of(rows, self._trial_features(rows)) for rows in self._rows).view(1)
        slope = self._complete_head(self._rows_slope)
        return slope + torch.stack([_inner(part.trial_gradient, part.gradient) for part in self._head]).sum()

    def _make_room(self) -> None:
        """Set aside what half of the gradient is kept in."""
        half = (len(self._rows) + 1) // 2
        for i, rows in enumerate(self._rows[:half]):
            if rows.kept is None:
                self._rows[i] = rows._replace(kept=torch.empty_like(rows.features))

    def _slope_of(self, rows: _Rows, features: Tensor) -> Tensor:
        self._add_to_head(rows, features)
        gradient = self._feature_gradient(features, rows.residual, out=features if rows.kept is None else rows.kept)
        if rows.kept is not None:
            square = square_norm(gradient)
            self._kept_square = square if self._kept_square is None else self._kept_square.add_(square)
        return self._inner_of(rows, gradient)

    def _inner_of(self, rows: _Rows, gradient: Tensor) -> Tensor:
        if self._rows_are_summable:
            of_rows: Tensor = torch.linalg.vecdot(gradient, rows.gradient)
            return of_rows.sum(dtype=torch.float64)
        return _inner(gradient, rows.gradient)

    def _add_to_head(self, rows: _Rows, features: Tensor) -> None:
        self._head[0].trial_gradient.addmm_(rows.residual.T, features, alpha=1 / self._num_samples)
        for bias in self._head[1:]:
            bias.trial_gradient.add_(rows.residual.sum(dim=0), alpha=1 / self._num_samples)

    def _clear_head(self) -> None:
        for part in self._head:
            part.trial_gradient.zero_()

    def stands_still(self) -> bool:
        """Compare the trial point with the start."""
        moved = self._reduce(_sum(self._moves(rows) for rows in self._rows))
        return not bool(moved) and all(torch.equal(part.trial, part.current) for part in self._head)

    def _moves(self, rows: _Rows) -> Tensor:
        return (self._trial_features(rows) != rows.features).any().double().view(1)

    def accept(self) -> Evaluation:
        """Move, and replace the gradient: two matrix products, of which a slope has done one and a half already."""
        self._expects_slope = self._head_is_known
        return self._end(move=True)

    def _end(self, move: bool) -> Evaluation:
        square = float(self._replace_gradient(move))
        return Evaluation(self._value, self._epsilon, [self._gradients[i] for i in self._order], square)

    def _replace_gradient(self, move: bool) -> Tensor:
        """Replace the gradient, and move the parameters or not; return the squared norm."""
        if self._rows_slope is None:
            self._clear_head()
        parts = (self._gradient_of(rows, move) for rows in self._rows)
        # What is kept comes first in either case: the same sums, bit for bit.
        square = _sum(part for part in chain([self._kept_square], parts) if part is not None)
        square = self._reduce(square) if self._head_is_known else self._complete_head(square)
        if move:
            for part in self._head:
                part.current.sub_(part.gradient, alpha=self._size)
        self._head = [part._replace(gradient=part.trial_gradient, trial_gradient=part.gradient) for part in self._head]
        self._gradients[1:] = [part.gradient for part in self._head]
        return torch.stack([square, *(square_norm(part.gradient) for part in self._head)]).sum()

    def _gradient_of(self, rows: _Rows, move: bool) -> Tensor | None:
        """Replace the gradient in some rows; return its square, None if that was kept."""
        features = rows.features.sub_(rows.gradient, alpha=self._size) if move else rows.features
        if self._rows_slope is None:
            self._add_to_head(rows, features)
        elif rows.kept is not None:
            torch.mul(rows.kept, 1, out=rows.gradient)
            return None
        return square_norm(self._feature_gradient(features, rows.residual, out=rows.gradient))

    def reject(self) -> None:
        """Do nothing: trials do not move the parameters."""

    def _reduce(self, total: Tensor) -> Tensor:
        return sum_over_ranks(total) if self._shared else total

    def _feature_gradient(self, features: Tensor, residual: Tensor, out: Tensor) -> Tensor:
        gradient = self._objective.penalty_gradient(features, out)
        return gradient.addmm_(residual, self._head[0].trial, alpha=1 / self._num_samples)

    def _complete_head(self, summand: Tensor) -> Tensor:
        """Complete the gradient of the head; sum it, and a summand, over processes on the way."""
        gradients = [part.trial_gradient for part in self._head]
        if self._shared:
            sum_all_over_ranks([summand, *gradients])
        self._objective.add_penalty_gradient_(gradients[0], self._head[0].trial)
        self._head_is_known = True
        return summand


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.reshape(-1).double(), b.reshape(-1).double())


def _sum(parts: Iterable[Tensor]) -> Tensor:
    """Add parts up as they come: those that waited would keep free memory between them from being used again."""
    total: Tensor | None = None
    for part in parts:
        total = part if total is None else total.add_(part)
    assert total is not None
    return total
