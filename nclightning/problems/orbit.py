r"""The optimal set in the form that is used to compare points with it: nearest member, distance, F - F*.

The set is :math:`\{ W = A R^\top,\ h_i = B_{m(i)} R^\top,\ b^* : R^\top R = I_r \}` with :math:`A = V \mathrm{diag}(a)`
and :math:`B_m = (U \mathrm{diag}(b))_m / \sqrt{n_m}`, one orbit of rotations of the feature space.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from nclightning.problems.frames import Columns, Table

if TYPE_CHECKING:
    from nclightning.problems.frames import Frame, Rows
    from nclightning.problems.loss import Loss

__all__ = ["Moments", "Orbit", "Solution"]


class Solution(NamedTuple):
    """A point: head, features of all samples, and bias.

    Attributes:
        weight: Head ``(K, d)``.
        features: ``(N, d)``.
        labels: ``(N,)`` int64, the group of each sample.
        bias: ``(K,)``; None for a head without one.
    """

    weight: Tensor
    features: Tensor
    labels: Tensor
    bias: Tensor | None

    @property
    def logits(self) -> Tensor:
        """Logits ``(N, K)``, bias included."""
        logits = self.features @ self.weight.T
        return logits if self.bias is None else logits + self.bias


class Moments(NamedTuple):
    """A point whose features are given by their moments.

    Attributes:
        weight: Head ``(K, d)``.
        means: Mean feature of each group ``(M, d)``.
        spread: Sum over all samples of the squared distance from the mean of their group.
        bias: ``(K,)`` or None.
    """

    weight: Tensor
    means: Tensor
    spread: Tensor
    bias: Tensor | None


@dataclass(frozen=True, eq=False)
class Orbit:
    r"""The optimal set of the groups that have samples. Points must be float64, on its device, and checked.

    A number that is the same for all groups or directions is a float, which needs no device.

    Args:
        loss: The loss.
        targets: Targets of the groups.
        logits: Optimal logits of the groups, bias included.
        num_groups: M, the groups that have samples.
        counts: Number of samples of each group: one number for all, or ``(M, 1)``.
        feature_dim: d.
        lambda_w: Penalty on the head.
        lambda_h: Penalty on the features.
        lambda_b: Penalty on the bias; 0.0 without a penalty or without a bias.
        active: U and V, the directions of the optimum among groups and among classes; None where zero is optimal.
        head_scale: a, one number or ``(r, 1)``.
        feature_scale: b, one number or ``(r, 1)``.
        bias: Optimal bias; None without a bias.
        shift_is_free: Whether the bias is determined only up to a shift of all its entries.
        coupled: The directions with nonzero multipliers among groups and classes: those of the optimum and others.
        fractions: The multipliers along the coupled directions divided by the strength: one number, or ``(p,)``. They
            are 1 for the directions of the optimum.
        is_cut: Whether there are fewer features than the optimal logits need.
        present: Indices of the groups that have samples; None if all have.
        position: Position of each group among those with samples; None if all have.
    """

    loss: Loss
    targets: Rows
    logits: Rows
    num_groups: int
    counts: float | Tensor
    feature_dim: int
    lambda_w: float
    lambda_h: float
    lambda_b: float
    active: tuple[Frame, Frame] | None
    head_scale: float | Tensor
    feature_scale: float | Tensor
    bias: float | Tensor | None
    shift_is_free: bool
    coupled: tuple[Frame, Frame]
    fractions: float | Tensor
    is_cut: bool
    present: Tensor | None = None
    position: Tensor | None = None

    def to(self, device: torch.device) -> Orbit:
        """Return the set for points on another device."""
        if not isinstance(self.counts, Tensor):
            return self  # Then all other fields are numbers, too.

        def placed(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(placed, value))
            if isinstance(value, Columns | Table):
                return replace(value, matrix=value.matrix.to(device))
            return value.to(device) if isinstance(value, Tensor) else value

        return Orbit(**{field.name: placed(getattr(self, field.name)) for field in fields(self)})

    @property
    def is_fake(self) -> bool:
        """Whether its tensors have no values, like those of a ``FakeTensorMode``."""
        return isinstance(self.counts, Tensor) and type(self.counts) is not Tensor

    def own(self, labels: Tensor) -> Tensor:
        """Return labels renumbered over the groups that have samples."""
        return labels if self.position is None else self.position.index_select(0, labels)

    def only_present(self, point: Moments) -> Moments:
        """Leave out the means of groups without samples."""
        return point if self.present is None else point._replace(means=point.means.index_select(0, self.present))

    def moments(self, point: Solution) -> Moments:
        """Compute the moments of a point from its samples."""
        own = self.own(point.labels)
        means = self._sums(point.features, own) / self.counts
        off = means.index_select(0, own).sub_(point.features)
        # The rounding error of a mean is the mean of the deviations from it.
        shift = self._sums(off, own) / self.counts
        spread = off.square_().sum() - (self.counts * shift.square()).sum()
        return Moments(point.weight, means - shift, spread.clamp(min=0), point.bias)

    def random(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Draw head and mean features of a member from normal ``noise (K, d)``."""
        if self.active is None:
            return torch.zeros_like(noise), noise.new_zeros(self.num_groups, noise.shape[1])
        return self._member(*self.active, self.active[1].coordinates(noise))

    def nearest(self, point: Moments) -> tuple[Tensor, Tensor]:
        """Compute head and mean features of the member nearest to a point."""
        if self.active is None:
            return torch.zeros_like(point.weight), torch.zeros_like(point.means)
        left, right = self.active
        features = self.feature_scale * left.coordinates(self._roots * point.means)
        return self._member(left, right, self.head_scale * right.coordinates(point.weight) + features)

    def distance(self, point: Moments) -> Tensor:
        """Compute the norm of the residual to the nearest member. The expanded square would lose half of the digits."""
        weight, means = self.nearest(point)
        squared = (point.weight - weight).square().sum() + point.spread
        squared = squared + (self._roots * (point.means - means)).square().sum()
        if point.bias is not None and self.bias is not None:
            off = point.bias - self.bias
            squared = squared + (off - off.mean() if self.shift_is_free else off).square().sum()
        return squared.sqrt()

    def divergence(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the Bregman divergence of the loss from the optimal logits, for each row."""
        own = self.own(labels)
        return self.loss.divergence(logits, self.logits.of(own, logits), self.targets.of(own, logits))

    def gap(self, point: Moments, divergence: Tensor) -> Tensor:
        r"""Compute F - F* from moments and the mean divergence of the samples.

        Let :math:`f_j` be the multipliers divided by the strength, which are 1 for the directions of the optimum, and
        let :math:`w_j = W^\top v_j` and :math:`h_j = \hat H^\top u_j` be the components along the singular directions.
        Then F - F* is the mean divergence plus

        .. math:: \frac12 \sum_j f_j \|\sqrt{\lambda_W} w_j - \sqrt{\lambda_H} h_j\|^2
            + (1 - f_j) (\lambda_W \|w_j\|^2 + \lambda_H \|h_j\|^2),

        plus the penalties on components outside of these directions.
        """
        left, right = self.coupled
        w, rest_w = right.split(point.weight)
        h, rest_h = left.split(self._roots * point.means)
        f, total = self.fractions, self.lambda_w * rest_w + self.lambda_h * (rest_h + point.spread)
        if isinstance(f, Tensor) or f != 1:
            alone = self.lambda_w * w.square().sum(dim=1) + self.lambda_h * h.square().sum(dim=1)
            total = total + ((1 - f) * alone).sum()
        # In place, since the components may be large and are not needed afterwards.
        between = w.mul_(math.sqrt(self.lambda_w)).sub_(h, alpha=math.sqrt(self.lambda_h)).square_()
        total = total + ((f * between.sum(dim=1)).sum() if isinstance(f, Tensor) else f * between.sum())
        return self._with_bias(total / 2 + divergence, point.bias)

    def expanded_gap(self, point: Solution) -> Tensor:
        """Compute F - F* by expanding F around the nearest member, for fewer features than the optimal logits need.

        The optimal logits are then not unique, and multipliers exceed the strength. The result is accurate to
        round-off, but it is not a sum of squares: at an optimum, round-off may make it negative.
        """
        moments, own = self.moments(point), self.own(point.labels)
        weight, means = self.nearest(moments)
        step_w, step_h = point.weight - weight, self._roots * (moments.means - means)
        logits, reference = point.logits, means @ weight.T
        if point.bias is not None and self.bias is not None:
            reference = reference + self.bias
        targets = self.targets.of(torch.arange(self.num_groups, device=means.device), reference)
        divergence = self.loss.divergence(logits, reference.index_select(0, own), targets.index_select(0, own)).mean()
        multipliers = self._roots / len(logits) * self.loss.residual(reference, targets)
        penalty = self.lambda_w * step_w.square().sum() + self.lambda_h * (step_h.square().sum() + moments.spread)
        return self._with_bias(penalty / 2 + (multipliers * (step_h @ step_w.T)).sum() + divergence, point.bias)

    def _member(self, left: Frame, right: Frame, direction: Tensor) -> tuple[Tensor, Tensor]:
        """Compute head and mean features of the member whose R^T is nearest to ``direction (r, d)``."""
        finite = torch.isfinite(direction).all()
        u, _, vh = torch.linalg.svd(torch.where(finite, direction, 0), full_matrices=False)
        turn = torch.where(finite, u @ vh, torch.nan)
        return right.rows(self.head_scale * turn), left.rows(self.feature_scale * turn) / self._roots

    @cached_property
    def _roots(self) -> float | Tensor:
        return self.counts**0.5

    def _sums(self, rows: Tensor, own: Tensor) -> Tensor:
        """Sum the rows of each group."""
        return rows.new_zeros(self.num_groups, rows.shape[1]).index_add_(0, own, rows)

    def _with_bias(self, gap: Tensor, bias: Tensor | None) -> Tensor:
        """Add the penalty on the difference between the bias and the optimal one."""
        if bias is None or self.bias is None or not self.lambda_b:
            return gap
        return gap + self.lambda_b / 2 * (bias - self.bias).square().sum()
