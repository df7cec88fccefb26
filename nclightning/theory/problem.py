r"""The unconstrained feature model as a problem with a known answer.

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
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from nclightning.errors import UserError
from nclightning.theory import gap, moments, solutions
from nclightning.theory.landscape import UFMLandscape

if TYPE_CHECKING:
    from typing import Literal

    from torch import Tensor

    from nclightning.theory.solutions import Solution

__all__ = ["UFMProblem"]

_FREE_BIAS = "the known optimum is that of a head with a free bias, which is 1/K there."


@dataclass(frozen=True)
class UFMProblem(UFMLandscape):
    r"""Closed forms of the unconstrained feature model, Problem (5) (MSE, free bias) or (8) (CE, no bias).

    .. math::
        \min_{W,H(,b)} \frac1N \sum_i L(W^\top h_i (+ b), y_i)
        + \frac{\lambda_W}2\|W\|_F^2 + \frac{\lambda_H}2\|H\|_F^2

    The optimum is a neural-collapse solution when :math:`K^2 n \lambda_W \lambda_H < 1` and zero otherwise
    (Props. 1 and 3 with errata E2 and E3). MSE is covered for every feature dimension; for ``d < K - 1`` the
    optimal set consists of the rank-``d`` partial isometries.

    Args:
        loss: ``"mse"`` or ``"ce"``.
        num_classes: K, at least 2.
        samples_per_class: n, at least 1.
        feature_dim: d, at least 1; for CE at least ``K - 1``.
        lambda_w: Penalty on the head, positive.
        lambda_h: Penalty on the features, positive.

    Raises:
        ValueError: If a size or a penalty is out of range, or for CE with ``d < K - 1``, where no closed form exists.
    """

    def labels(self, device: torch.device | str | None = None) -> Tensor:
        """Labels ``(N,)`` of the balanced training set, class after class: ``0, .., 0, 1, .., 1, ..``."""
        return torch.arange(self.num_classes, device=device).repeat_interleave(self.samples_per_class)

    def nearest_optimum(self, weight: Tensor, features: Tensor, labels: Tensor, bias: Tensor | None = None) -> Solution:
        r"""Project a point on the optimal set.

        With :math:`S = W + c \sum_i H_i` the nearest member is built from the polar factor of :math:`S P`. Where
        :math:`SP` is rank-deficient the nearest member is not unique and one of them is returned.

        Args:
            weight: Head ``(K, d)``.
            features: ``(N, d)``.
            labels: ``(N,)`` int64, every class exactly n times, any order.
            bias: ``(K,)`` for MSE; for CE None or zeros do not matter, a bias is refused.

        Returns:
            Solution in float64 on the device of ``features``, rows in the order of ``labels``.

        Raises:
            ValueError: If a shape does not fit the problem, labels are not balanced, MSE comes without a bias or CE
                with one.
        """
        return solutions.nearest(self, *self._admit(weight, features, labels, bias))

    def distance(
        self, weight: Tensor, features: Tensor, labels: Tensor, bias: Tensor | None = None, *, check_labels: bool = True
    ) -> Tensor:
        r"""Measure the Euclidean distance to the optimal set, from the residual of the projection.

        Relative error about :math:`\epsilon\|x\|/\mathrm{dist}`; 0 only if the point equals its rounded projection.
        Arguments and errors as in :meth:`nearest_optimum`; ``check_labels=False`` skips the one check that
        transfers to the host, for labels that :meth:`check_labels` has passed.

        Returns:
            Non-negative float64 scalar.
        """
        return solutions.distance(self, *self._admit(weight, features, labels, bias, check_labels))

    def optimality_gap(
        self, weight: Tensor, features: Tensor, labels: Tensor, bias: Tensor | None = None, *, check_labels: bool = True
    ) -> Tensor:
        r"""Evaluate :math:`F - F^*` without subtracting the two.

        A sum of squares and Bregman divergences that is exact to about
        :math:`\epsilon\|x\|\sqrt{L/\mathrm{gap}}`, where the plain difference is noise below :math:`\epsilon F`.
        Non-negative by construction, except for MSE with ``d < K - 1`` below the threshold, whose form has a cross
        term and may come out negative at round-off level. Arguments and errors as in :meth:`distance`.

        Returns:
            Float64 scalar.
        """
        return gap.optimality_gap(self, *self._admit(weight, features, labels, bias, check_labels))

    gap = optimality_gap

    def divergence(self, logits: Tensor, labels: Tensor) -> Tensor:
        r"""Measure each sample's loss above that of the optimal logits, to first order removed.

        The Bregman divergence :math:`D(z_i, z^*_{y_i})` of the loss, the part of the gap that the features enter other
        than by their moments.

        Args:
            logits: ``(B, K)``, bias included.
            labels: ``(B,)`` int64 within ``0..K-1``.

        Returns:
            Non-negative float64 ``(B,)``; 0 at the optimal logits (CE: up to a common shift of a row).
        """
        offset = logits.new_zeros(self.num_classes, dtype=torch.float64) if self.loss == "mse" else None
        return gap.divergence(self, logits.detach().double(), labels, offset)

    def distance_from_moments(
        self, weight: Tensor, means: Tensor, spread: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """Measure the distance to the optimal set from the moments of features that are not kept.

        As :meth:`distance`. A bias under CE, which the loss does not tell from its shifts, counts by its distance
        from a constant.

        Args:
            weight: Head ``(K, d)``.
            means: Class means ``(K, d)`` of n samples each.
            spread: Sum of the squared distances of all samples from their class means.
            bias: ``(K,)``; needed for MSE.

        Returns:
            Non-negative float64 scalar.

        Raises:
            ValueError: If a shape does not fit the problem, or MSE comes without a bias.
        """
        self._admit_moments(weight, means, bias)
        if self.loss == "mse" and bias is None:
            raise UserError(f"bias must have shape ({self.num_classes},) for loss='mse', got None: {_FREE_BIAS}")
        return moments.distance(
            self,
            weight.detach().double(),
            means.double(),
            spread.double(),
            None if bias is None else bias.detach().double(),
        )

    def gap_from_moments(
        self, weight: Tensor, means: Tensor, spread: Tensor, divergence: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """Evaluate F - F* from the moments of features that are not kept, without cancellation.

        As :meth:`optimality_gap`; under CE a bias, which is free, enters by the divergence only.

        Args:
            weight: Head ``(K, d)``.
            means: Class means ``(K, d)`` of n samples each.
            spread: Sum of the squared distances of all samples from their class means.
            divergence: Mean of :meth:`divergence` over all samples.

        Returns:
            Non-negative float64 scalar.

        Raises:
            ValueError: If a shape does not fit the problem, or ``d < K - 1``, where the gap needs the samples.
        """
        if self.rank < self.num_classes - 1 and self.collapses:
            raise UserError(
                f"feature_dim must be at least num_classes - 1 = {self.num_classes - 1} for a gap from moments, got "
                f"{self.feature_dim}: use optimality_gap with all samples."
            )
        self._admit_moments(weight, means)
        return moments.gap(self, weight.detach().double(), means.double(), spread.double(), divergence.double())

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
        r"""Find the penalties at which given scales of head and features are the optimal ones.

        The inverse of :attr:`weight_scale` a and :attr:`feature_scale` h: with s = a h and c = h / a it is
        q = (1 - s)/K for MSE and :math:`q = 1/(e^s + K - 1)` for CE, :math:`\lambda_W = q c` and
        :math:`\lambda_H = q/(n c)`.

        Args:
            loss: As for the class, like the sizes.
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
                f"{weight_scale} and {feature_scale}: they are optimal at no penalties."
            )
        q = (1 - s) / num_classes if loss == "mse" else math.exp(-s) / (1 + (num_classes - 1) * math.exp(-s))
        ratio = feature_scale / weight_scale
        return cls(loss, num_classes, samples_per_class, feature_dim, q * ratio, q / (samples_per_class * ratio))

    def random_optimum(self, generator: torch.Generator | None = None) -> Solution:
        """Draw a member of the optimal set, uniformly under rotations of the feature space.

        Args:
            generator: Source of randomness; its device is the result's. None takes torch's global CPU generator.

        Returns:
            Solution in float64 with labels in the order of :meth:`labels`.
        """
        device = None if generator is None else generator.device
        noise = torch.randn(self.num_classes, self.feature_dim, dtype=torch.float64, device=device, generator=generator)
        return solutions.member(self, noise, self.labels(device))

    def _admit(
        self, weight: Tensor, features: Tensor, labels: Tensor, bias: Tensor | None, check_labels: bool = True
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Check a point against the problem and cast it to float64."""
        K, n, d = self.num_classes, self.samples_per_class, self.feature_dim
        for name, tensor, shape in (
            ("weight", weight, (K, d)),
            ("features", features, (K * n, d)),
            ("labels", labels, (K * n,)),
        ):
            if tuple(tensor.shape) != shape:
                raise UserError(f"{name} must have shape {shape} for this problem, got {tuple(tensor.shape)}.")
        if self.loss == "mse" and (bias is None or tuple(bias.shape) != (K,)):
            raise UserError(
                f"bias must have shape ({K},) for loss='mse', got {None if bias is None else tuple(bias.shape)}: "
                f"{_FREE_BIAS}"
            )
        if self.loss == "ce" and bias is not None:
            raise UserError("bias must be None for loss='ce': the closed form is that of a head without a bias.")
        if check_labels:
            self.check_labels(labels)
        return (
            weight.detach().double(),
            features.detach().double(),
            labels,
            None if bias is None else bias.detach().double(),
        )

    def _admit_moments(self, weight: Tensor, means: Tensor, bias: Tensor | None = None) -> None:
        shape = (self.num_classes, self.feature_dim)
        for name, tensor, expected in (("weight", weight, shape), ("means", means, shape), ("bias", bias, shape[:1])):
            if tensor is not None and tuple(tensor.shape) != expected:
                raise UserError(f"{name} must have shape {expected} for this problem, got {tuple(tensor.shape)}.")

    def check_labels(self, labels: Tensor) -> None:
        """Raise unless every class occurs exactly n times.

        Args:
            labels: ``(N,)`` int64. One transfer to the host.

        Raises:
            ValueError: If labels are of another type, out of range or unbalanced.
        """
        if labels.dtype != torch.int64:
            raise UserError(f"labels must be int64, got {labels.dtype}.")
        ordered = labels.sort().values
        if not torch.equal(ordered, self.labels(labels.device)):
            raise UserError(
                f"labels must hold each of the classes 0..{self.num_classes - 1} exactly "
                f"{self.samples_per_class} times: the closed forms are those of balanced data."
            )
