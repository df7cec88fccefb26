r"""The optimal set of a problem in factored form.

With optimal logits :math:`\hat Z^* = U S V^\top` and :math:`\alpha = (\lambda_H/\lambda_W)^{1/4}` the optimal set is

.. math:: \{ W = A R^\top,\ h_i = B_{m(i)} R^\top,\ b^* : R^\top R = I_r \}, \qquad
    A = \alpha V S^{1/2}, \quad B_m = \alpha^{-1} (U S^{1/2})_m / \sqrt{n_m}.

With fewer features than r, an optimum is known only for the squared error. R then has orthonormal rows instead, and r
is the number of largest singular values, including all those equal to the last one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nclightning.problems.frames import Columns, Table
from nclightning.problems.orbit import Orbit
from nclightning.problems.simplex import find_simplex_orbit

if TYPE_CHECKING:
    from nclightning.problems.optimum import Optimum

__all__ = ["OptimalSet"]


@dataclass(frozen=True, eq=False)
class OptimalSet:
    """The optimal set of a problem.

    Args:
        optimum: Optimal logits of the groups that have samples, with at most as many directions as there are features.
        feature_dim: d.
        lambda_w: Penalty on the head.
        lambda_h: Penalty on the features.
        is_cut: Whether there are fewer features than the optimal logits need.
    """

    optimum: Optimum
    feature_dim: int
    lambda_w: float
    lambda_h: float
    is_cut: bool = False

    @property
    def dimension(self) -> int:
        """Dimension of the set, which is the number of zero eigenvalues of the Hessian, without a free bias's shift."""
        d, r = self.feature_dim, self.optimum.rank
        return d * r - r * (r + 1) // 2 if d >= r else d * r - d * (d + 1) // 2

    @cached_property
    def weight_factor(self) -> Tensor:
        """A ``(K, r)``."""
        return self.optimum.factors.right * self._head_scale

    @cached_property
    def scaled_features(self) -> Tensor:
        """Rows of B times the square roots of the counts, ``(M, r)``."""
        return self.optimum.factors.left * self._feature_scale

    @property
    def feature_factor(self) -> Tensor:
        """B ``(M, r)``."""
        return self.scaled_features / self.optimum.groups.counts.sqrt().unsqueeze(1)

    @property
    def _sizes(self) -> tuple[int, float, float]:
        return self.feature_dim, self.lambda_w, self.lambda_h

    @property
    def _head_scale(self) -> Tensor:
        return self.optimum.factors.singular.sqrt() * math.sqrt(math.sqrt(self.lambda_h / self.lambda_w))

    @property
    def _feature_scale(self) -> Tensor:
        return self.optimum.factors.singular.sqrt() * math.sqrt(math.sqrt(self.lambda_w / self.lambda_h))

    def orbit(self, present: Tensor) -> Orbit:
        """Describe the set in the form that is used to compare points with it.

        Args:
            present: Which of all groups of the problem have samples, bool ``(M,)``.
        """
        groups, (left, _, right, bias) = self.optimum.groups, self.optimum.factors
        everywhere = bool(present.all())
        few = find_simplex_orbit(self.optimum, *self._sizes) if everywhere else None
        if few is not None:
            return few
        coupled_left, coupled_right, fractions = left, right, torch.ones_like(left[0])
        if not self.is_cut:
            more, more_left, more_right = self.optimum.inactive
            fractions = torch.cat([fractions, more])
            coupled_left, coupled_right = torch.cat([left, more_left], dim=1), torch.cat([right, more_right], dim=1)
        return Orbit(
            loss=groups.loss,
            targets=Table(groups.targets),
            logits=Table(self.optimum.logits),
            num_groups=len(left),
            counts=groups.counts.unsqueeze(1),
            feature_dim=self.feature_dim,
            lambda_w=self.lambda_w,
            lambda_h=self.lambda_h,
            lambda_b=groups.lambda_b or 0.0,
            active=(Columns(left), Columns(right)) if self.optimum.rank else None,
            head_scale=self._head_scale.unsqueeze(1),
            feature_scale=self._feature_scale.unsqueeze(1),
            bias=bias,
            shift_is_free=groups.shift_is_free,
            coupled=(Columns(coupled_left), Columns(coupled_right)),
            fractions=fractions,
            is_cut=self.is_cut,
            present=None if everywhere else torch.nonzero(present).flatten(),
            position=None if everywhere else present.cumsum(0) - 1,
        )
