r"""The optimal set: a member, the nearest member, the distance, and F - F* without cancellation.

With optimal logits :math:`\hat Z^* = U S V^\top` and :math:`\alpha = (\lambda_H/\lambda_W)^{1/4}` the optimal set is

.. math:: \{ W = A R^\top,\ h_i = B_{m(i)} R^\top,\ b^* : R^\top R = I_r \}, \qquad
    A = \alpha V S^{1/2}, \quad B_m = \alpha^{-1} (U S^{1/2})_m / \sqrt{n_m}.

With fewer features than r, which only the squared error knows an optimum for, R has orthonormal rows instead and r
counts the largest singular values, equal ones together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from nclightning.problems.optimum import Optimum

__all__ = ["Moments", "OptimalSet", "Solution", "group_means"]


class Solution(NamedTuple):
    """A point: head, features of all samples, and the bias.

    Attributes:
        weight: Head ``(K, d)``.
        features: ``(N, d)``.
        labels: ``(N,)`` int64, the group of each sample.
        bias: ``(K,)``, None for a head without one.
    """

    weight: Tensor
    features: Tensor
    labels: Tensor
    bias: Tensor | None


def group_means(rows: Tensor, labels: Tensor, num_groups: int) -> Tensor:
    """Mean of the rows of each group ``(M, ..)``; zero for a group without samples."""
    counts = torch.bincount(labels, minlength=num_groups).to(rows).clamp(min=1)
    sums = rows.new_zeros(num_groups, rows.shape[1]).index_add_(0, labels, rows)
    return sums / counts.unsqueeze(1)


class Moments(NamedTuple):
    """A point with features by their moments, all that is needed of them here.

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

    @classmethod
    def of(cls, point: Solution, num_groups: int) -> Moments:
        """Those of a point with all its samples."""
        means = group_means(point.features, point.labels, num_groups)
        # The mean of deviations corrects the rounding of the mean.
        means += group_means(point.features - means.index_select(0, point.labels), point.labels, num_groups)
        spread = (point.features - means.index_select(0, point.labels)).square().sum()
        return cls(point.weight, means, spread, point.bias)


@dataclass(frozen=True, eq=False)
class OptimalSet:
    """The optimal set of a problem. Points are float64 and were checked by the caller.

    Args:
        optimum: Optimal logits of the groups that have samples, cut to the directions that the features hold.
        feature_dim: d.
        lambda_w: Penalty on the head.
        lambda_h: Penalty on the features.
    """

    optimum: Optimum
    feature_dim: int
    lambda_w: float
    lambda_h: float

    @property
    def dimension(self) -> int:
        """Dimension of the set, the zeros of the Hessian; without the shift of a free bias."""
        d, r = self.feature_dim, self.optimum.rank
        return d * r - r * (r + 1) // 2 if d >= r else d * r - d * (d + 1) // 2

    @property
    def weight_factor(self) -> Tensor:
        """A ``(K, r)``."""
        factors = self.optimum.factors
        return factors.right * factors.singular.sqrt() * math.sqrt(math.sqrt(self.lambda_h / self.lambda_w))

    @property
    def scaled_features(self) -> Tensor:
        """Rows of B times the roots of the counts ``(M, r)``."""
        factors = self.optimum.factors
        return factors.left * factors.singular.sqrt() * math.sqrt(math.sqrt(self.lambda_w / self.lambda_h))

    @property
    def feature_factor(self) -> Tensor:
        """B ``(M, r)``."""
        return self.scaled_features / self.optimum.groups.counts.sqrt().unsqueeze(1)

    def member(self, direction: Tensor) -> tuple[Tensor, Tensor]:
        """Head and mean features of the member whose R is nearest to ``direction (d, r)``."""
        finite = torch.isfinite(direction).all()
        left, _, right = torch.linalg.svd(torch.where(finite, direction, 0), full_matrices=False)
        rotation = torch.where(finite, left @ right, torch.nan)
        return self.weight_factor.to(direction) @ rotation.T, self.feature_factor.to(direction) @ rotation.T

    def nearest(self, point: Moments) -> tuple[Tensor, Tensor]:
        """Head and mean features of the member nearest to a point."""
        counts = self.optimum.groups.counts.to(point.means).unsqueeze(1)
        direction = point.weight.T @ self.weight_factor.to(point.weight)
        return self.member(direction + (counts * point.means).T @ self.feature_factor.to(point.means))

    def distance(self, point: Moments) -> Tensor:
        """Norm of the residual to the nearest member; the expanded square would lose half of the digits."""
        weight, means = self.nearest(point)
        counts = self.optimum.groups.counts.to(means).unsqueeze(1)
        squared = (point.weight - weight).square().sum() + (counts * (point.means - means).square()).sum()
        squared = squared + point.spread
        best = self.optimum.factors.bias
        if point.bias is not None and best is not None:
            off = point.bias - best.to(point.bias)
            if self.optimum.groups.shift_is_free:
                off = off - off.mean()
            squared = squared + off.square().sum()
        return squared.sqrt()

    def gap(self, point: Moments, divergence: Tensor) -> Tensor:
        r"""F - F* from the mean divergence of the samples.

        With f_j the multipliers over the strength, 1 for those of the optimal logits, and
        :math:`w_j = W^\top v_j`, :math:`h_j = \hat H^\top u_j` along the singular directions, the penalties exceed
        those of the optimum, and what the multipliers take of them, by

        .. math:: \frac12 \sum_j f_j \|\sqrt{\lambda_W} w_j - \sqrt{\lambda_H} h_j\|^2
            + (1 - f_j) (\lambda_W \|w_j\|^2 + \lambda_H \|h_j\|^2).
        """
        groups, (left, _, right, _) = self.optimum.groups, self.optimum.factors
        left, right = left.to(point.means), right.to(point.means)
        fractions, u, v = (t.to(point.means) for t in self.optimum.inactive)
        weight = math.sqrt(self.lambda_w) * point.weight
        features = math.sqrt(self.lambda_h) * groups.counts.to(point.means).sqrt().unsqueeze(1) * point.means
        total = (right.T @ weight - left.T @ features).square().sum()
        w, h = v.T @ weight, u.T @ features
        f = fractions.unsqueeze(1)
        total = total + (f * (w - h).square() + (1 - f) * (w.square() + h.square())).sum()
        rest_w = weight - right @ (right.T @ weight) - v @ w
        rest_h = features - left @ (left.T @ features) - u @ h
        total = total + rest_w.square().sum() + rest_h.square().sum() + self.lambda_h * point.spread
        return total / 2 + self._bias_term(point.bias) + divergence

    def expanded_gap(self, point: Moments, divergence: Tensor, multipliers: Tensor) -> Tensor:
        """F - F* around the nearest member, where the multipliers ``(M, K)`` exceed the strength.

        Right to round-off, but not a sum of squares: what is left of it at an optimum may be negative.
        """
        weight, means = self.nearest(point)
        step_w = point.weight - weight
        step_h = self.optimum.groups.counts.to(means).sqrt().unsqueeze(1) * (point.means - means)
        penalty = self.lambda_w * step_w.square().sum() + self.lambda_h * (step_h.square().sum() + point.spread)
        cross = (multipliers * (step_h @ step_w.T)).sum()
        return penalty / 2 + cross + self._bias_term(point.bias) + divergence

    def _bias_term(self, bias: Tensor | None) -> Tensor | float:
        best, lambda_b = self.optimum.factors.bias, self.optimum.groups.lambda_b
        if bias is None or best is None or not lambda_b:
            return 0.0
        return lambda_b / 2 * (bias - best.to(bias)).square().sum()
