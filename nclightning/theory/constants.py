"""The constants of the unconstrained feature model: sizes, penalties, threshold, scales and minimum.

Legend in :mod:`nclightning.theory.problem`.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING

from nclightning.errors import UserError

if TYPE_CHECKING:
    from typing import Literal

__all__ = ["UFMConstants"]

# Rounding error of K q, a product of two square roots: four roundings.
_ROUNDING = 4 * sys.float_info.epsilon


@dataclass(frozen=True)
class UFMConstants:
    """Checked sizes and penalties, and the constants that follow from them.

    Arguments and errors as for :class:`nclightning.theory.UFMProblem`.
    """

    loss: Literal["mse", "ce"]
    num_classes: int
    samples_per_class: int
    feature_dim: int
    lambda_w: float
    lambda_h: float

    def __post_init__(self) -> None:
        if self.loss not in ("mse", "ce"):
            raise UserError(f"loss must be 'mse' or 'ce', got {self.loss!r}.")
        for name, least in (("num_classes", 2), ("samples_per_class", 1), ("feature_dim", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(f"{name} must be an integer of at least {least}, got {value!r}.")
        for name in ("lambda_w", "lambda_h"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UserError(
                    f"{name} must be positive and finite, got {value!r}: the closed forms divide by it. "
                    f"Raise {name}, or train without the theory."
                )
        if self.loss == "ce" and self.feature_dim < self.num_classes - 1:
            raise UserError(
                f"feature_dim must be at least num_classes - 1 = {self.num_classes - 1} for loss='ce', got "
                f"{self.feature_dim}: no simplex ETF of {self.num_classes} classes fits, and no closed form is known. "
                "Raise feature_dim, or use loss='mse'."
            )

    @property
    def num_groups(self) -> int:
        """K."""
        return self.num_classes

    @property
    def num_samples(self) -> int:
        """N = K n."""
        return self.num_classes * self.samples_per_class

    @property
    def samples_per_group(self) -> int:
        """n, under the name that every problem has for the counts."""
        return self.samples_per_class

    @property
    def has_bias(self) -> bool:
        """Whether the head has a bias: for MSE."""
        return self.loss == "mse"

    @property
    def rank(self) -> int:
        """Rank ``min(d, K - 1)`` of a collapsed optimum."""
        return min(self.feature_dim, self.num_classes - 1)

    @property
    def q(self) -> float:
        r""":math:`\sqrt{n \lambda_W \lambda_H}`. The optimal logits depend on the penalties through it only."""
        return math.sqrt(self.samples_per_class * self.lambda_w) * math.sqrt(self.lambda_h)

    @property
    def threshold(self) -> float:
        r"""Least value of :math:`\lambda_W\lambda_H` for which the optimum is zero, :math:`1/(nK^2)`."""
        return 1.0 / (self.samples_per_class * self.num_classes**2)

    @property
    def collapses(self) -> bool:
        """Whether the optimum is a neural-collapse solution (``K q < 1``) rather than zero.

        It is False where ``K q`` equals 1 up to rounding.
        """
        return self.num_classes * self.q < 1 - _ROUNDING

    @cached_property
    def slack(self) -> float:
        """``1 - K q`` to full relative accuracy; 0 at the threshold, positive below it."""
        Kq = self.num_classes * self.q
        if abs(1 - Kq) <= _ROUNDING:
            return 0.0
        if not 0.5 < Kq < 2:
            return 1 - Kq
        # Near 1 the subtraction would leave only the rounding of K q. (K q)^2 is a product of the inputs, so that
        # 1 - (K q)^2 can be computed exactly.
        squared = Fraction(self.lambda_w) * Fraction(self.lambda_h) * self.samples_per_class * self.num_classes**2
        return float(1 - squared) / (1 + Kq)

    @property
    def ratio(self) -> float:
        r"""Norm of an optimal feature divided by that of its head row, :math:`\sqrt{\lambda_W/(n\lambda_H)}`."""
        return math.sqrt(self.lambda_w / self.samples_per_class) / math.sqrt(self.lambda_h)

    @property
    def logit_scale(self) -> float:
        """Scale s of the optimal logits ``s (e_k - 1/K)``; 0 where the optimum is zero."""
        if not self.collapses:
            return 0.0
        return self.slack if self.loss == "mse" else math.log1p(self.slack / self.q)

    @property
    def weight_scale(self) -> float:
        """Singular value a of an optimal head."""
        return math.sqrt(self.logit_scale / self.ratio)

    @property
    def feature_scale(self) -> float:
        """Singular value h of the class-mean matrix of optimal features."""
        return math.sqrt(self.logit_scale * self.ratio)

    @property
    def optimum_norm(self) -> float:
        """Euclidean norm of head, features and bias together, the same for every optimum."""
        bias = 1.0 / self.num_classes if self.loss == "mse" else 0.0
        return math.sqrt(self.rank * (self.weight_scale**2 + self.samples_per_class * self.feature_scale**2) + bias)

    @property
    def optimal_value(self) -> float:
        """Global minimum F*."""
        K, s, q, r = self.num_classes, self.logit_scale, self.q, self.rank
        if self.loss == "ce":
            return math.log1p((K - 1) * math.exp(-s)) + (K - 1) * s * q
        return r * ((1 - s) ** 2 / (2 * K) + s * q) + (K - 1 - r) / (2 * K)

    @property
    def dimension(self) -> int:
        """Dimension of the optimal set; 0 where the optimum is the single point zero."""
        d, r = self.feature_dim, self.rank
        K = self.num_classes
        if not self.collapses:
            return 0
        return d * (K - 1) - (K * (K - 1) if d >= K - 1 else r * (r + 1)) // 2
