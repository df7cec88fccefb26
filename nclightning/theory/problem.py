r"""The closed forms of the paper's two unconstrained feature models.

Letters used in this package (paper: features and head in columns; here: in rows):

    K, n, d     classes, samples per class, feature dimension; N = K n
    q, c        q = sqrt(n lambda_w lambda_h),  c = sqrt(lambda_w / (n lambda_h)) = |feature| / |head row|
    s           logit scale of the optimum: the logits of class k are s (e_k - 1/K) (+ bias)
    r           rank of the optimum, min(d, K - 1)
    a, h        scale of the head and of the features: W* = a M, H*_i = h M with M a partial isometry, a h = s
    P           centring matrix I - 11^T / K
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from nclightning.errors import UserError
from nclightning.problems import CrossEntropy, SquaredError, balanced_ce, balanced_mse
from nclightning.problems.frames import OwnAndOther
from nclightning.problems.simplex import simplex_orbit
from nclightning.problems.with_optimum import WithOptimum
from nclightning.theory import rates
from nclightning.theory.constants import UFMConstants
from nclightning.theory.spectrum import spectrum

if TYPE_CHECKING:
    from typing import Literal

    import torch
    from torch import Tensor

    from nclightning.problems import Eigenvalue, Problem
    from nclightning.problems.orbit import Orbit

__all__ = ["UFMProblem"]


@dataclass(frozen=True)
class UFMProblem(UFMConstants, WithOptimum):
    r"""Closed forms of the unconstrained feature model: Problem (5) (MSE, free bias) or (8) (CE, no bias).

    .. math::
        \min_{W,H(,b)} \frac1N \sum_i L(W^\top h_i (+ b), y_i)
        + \frac{\lambda_W}2\|W\|_F^2 + \frac{\lambda_H}2\|H\|_F^2

    The optimum is a neural-collapse solution when :math:`K^2 n \lambda_W \lambda_H < 1` and zero otherwise
    (Paper: Props. 1 and 3 with errata E2 and E3). MSE is covered for every feature dimension: for ``d < K - 1`` the
    optimal set consists of partial isometries of rank ``d``.

    Args:
        loss: ``"mse"`` or ``"ce"``.
        num_classes: K, at least 2.
        samples_per_class: n, at least 1.
        feature_dim: d, at least 1; for CE at least ``K - 1``.
        lambda_w: Penalty on the head, positive.
        lambda_h: Penalty on the features, positive.

    Raises:
        ValueError: If a size or a penalty is out of range, or for CE with ``d < K - 1``, where no closed form exists.

    Example:
        >>> from nclightning.theory import UFMProblem
        >>> problem = UFMProblem("mse", 4, samples_per_class=10, feature_dim=8, lambda_w=0.01, lambda_h=0.001)
        >>> problem.collapses, round(problem.optimal_value, 6), round(problem.mu, 6)
        (True, 0.0294, 0.000977)
        >>> optimum = problem.random_optimum()
        >>> bool(problem.gap(*optimum) < 1e-25), bool(problem.distance(*optimum) < 1e-12)
        (True, True)
    """

    # Cross-entropy ignores a shift of the bias. A bias given with moments counts by its deviation from a shift.
    _ignores_bias: ClassVar[bool] = True

    @cached_property
    def general(self) -> Problem:
        """The same problem as a :class:`nclightning.problems.Problem`, which has a matrix of targets ``(K, K)``."""
        make = balanced_mse if self.loss == "mse" else balanced_ce
        return make(self.num_classes, self.samples_per_class, self.feature_dim, self.lambda_w, self.lambda_h)

    def optimality_gap(
        self, weight: Tensor, features: Tensor, labels: Tensor, bias: Tensor | None = None, *, check_labels: bool = True
    ) -> Tensor:
        """Evaluate F - F*; another name of :meth:`gap`."""
        return self.gap(weight, features, labels, bias, check_labels=check_labels)

    @property
    def bias_argument(self) -> str:
        """The argument ``loss``, as the user typed it."""
        return f"loss={self.loss!r}"

    @property
    def rank_in_words(self) -> str:
        """The number of classes minus one, in words."""
        return f"num_classes - 1 = {self.num_classes - 1}"

    def orbit(self, device: torch.device) -> Orbit:
        """The optimal set, for points on any device."""
        return self._orbit

    @cached_property
    def _orbit(self) -> Orbit:
        K, is_mse = self.num_classes, self.loss == "mse"
        return simplex_orbit(
            SquaredError() if is_mse else CrossEntropy(),
            OwnAndOther(1.0, 0.0),
            num_classes=K,
            samples_per_class=self.samples_per_class,
            feature_dim=self.feature_dim,
            lambda_w=self.lambda_w,
            lambda_h=self.lambda_h,
            lambda_b=0.0,
            logit_scale=self.logit_scale,
            fraction=min(1.0, 1.0 / (K * self.q)),
            bias=1.0 / K if is_mse else 0.0,
            shift_is_free=not is_mse,
        )

    def spectrum(self) -> tuple[Eigenvalue, ...]:
        """List the eigenvalues of the Hessian of F at the optimal set, the same at each of its points.

        Returns:
            Entries ``(value, multiplicity, sector)`` in ascending order. The multiplicities sum to the number of
            variables. The number of zeros is :attr:`dimension`: F is flat along the optimal set only. The exception is
            the threshold ``K q = 1``, where the optimum is one point and there are ``d (K - 1)`` more zeros: F is flat
            to second order, but not to fourth, along these directions.
        """
        return spectrum(self)

    def decay_rates(self) -> rates.DecayRates:
        r"""Predict the exponents of gradient flow near the optimal set.

        A quantity decays as :math:`e^{-\mathrm{rate}\cdot\mathrm{time}}`, where time is the sum of the steps. The rates
        of gap and distance follow from the spectrum.

        The rates of NC1-NC3 are **heuristic**. Near the set, each of these quantities is a sum of products of modes.
        The rate is the least sum of eigenvalues over the products that do not vanish by symmetry, for a generic start.
        This was checked in descents with 33 digits, but is not proven. It is the exponent in the limit: a product that
        decays faster but has a larger amplitude can dominate until round-off. In float64 this happened for MSE in a
        quarter to a third of the cases tried, and seldom for CE.

        The rates are ``nan`` where a quantity is not defined (an optimum at zero; NC1 with ``n = 1``) or does not tend
        to zero (NC2 and NC3 with ``d < K - 1``).

        Returns:
            Exponents in the unit of F.
        """
        return rates.decay_rates(self, self.mu)

    def decay_factors(self, step: float) -> rates.DecayRates:
        """Predict the factors per iteration at a fixed step, for the quantities of :meth:`decay_rates`.

        The factors of NC1-NC3 are heuristic. They are for steps of at most 1/L, for which no mode alternates in sign.

        Args:
            step: Fixed step.

        Returns:
            Dimensionless factors.

        Raises:
            ValueError: If the step is not positive and finite.
        """
        return rates.decay_factors(self, step, self.contraction(step))

    @classmethod
    def at_scale(
        cls,
        loss: Literal["mse", "ce"],
        num_classes: int,
        samples_per_class: int,
        feature_dim: int,
        weight_scale: float,
        feature_scale: float,
    ) -> UFMProblem:
        r"""Make the problem at whose optimum head and features have given scales.

        This inverts :attr:`weight_scale` a and :attr:`feature_scale` h. With s = a h and c = h / a, q is
        :math:`(1 - s)/K` for MSE and :math:`1/(e^s + K - 1)` for CE; then :math:`\lambda_W = q c` and
        :math:`\lambda_H = q/(n c)`.

        Args:
            loss: ``"mse"`` or ``"ce"``.
            num_classes: K.
            samples_per_class: n.
            feature_dim: d.
            weight_scale: a, positive.
            feature_scale: h, positive; for MSE below 1/a.

        Returns:
            The problem.

        Raises:
            ValueError: If there are no such penalties.
        """
        s = weight_scale * feature_scale
        if not (weight_scale > 0 and feature_scale > 0 and math.isfinite(s)) or (loss == "mse" and s >= 1):
            raise UserError(
                "weight_scale and feature_scale must be positive, for MSE with a product below 1, got "
                f"{weight_scale} and {feature_scale}: no penalties make these scales optimal."
            )
        q = (1 - s) / num_classes if loss == "mse" else math.exp(-s) / (1 + (num_classes - 1) * math.exp(-s))
        ratio = feature_scale / weight_scale
        return cls(loss, num_classes, samples_per_class, feature_dim, q * ratio, q / (samples_per_class * ratio))

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the arguments only."""
        return {each.name: getattr(self, each.name) for each in fields(self)}
