r"""The group problem: the training problem when all samples with the same target share one feature.

With :math:`\hat Z` the logits of the groups times the roots of their counts (without the bias), the problem is convex:

.. math::
    \min_{\hat Z, b} \frac1N \sum_m n_m l_m\!\left(\hat z_m / \sqrt{n_m} + b\right)
    + \rho \|\hat Z\|_* + \frac{\lambda_b}2 \|b\|^2, \qquad \rho = \sqrt{\lambda_W \lambda_H}.

Letters of this package: M groups, K outputs, :math:`n_m` samples of group m, N samples in all, d features. ``Factors``
are :math:`\hat Z = U S V^\top`. :math:`\rho` is the *strength*, :math:`\hat Z` are the *scaled logits*.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from nclightning.problems.loss import Loss

__all__ = ["Factors", "Groups", "bias_part"]


class Factors(NamedTuple):
    """Singular value decomposition of the scaled logits, and the bias.

    Attributes:
        left: U ``(M, r)``.
        singular: S ``(r,)``, positive.
        right: V ``(K, r)``.
        bias: ``(K,)``; None for a head without one.
    """

    left: Tensor
    singular: Tensor
    right: Tensor
    bias: Tensor | None

    @property
    def scaled_logits(self) -> Tensor:
        """The scaled logits U S V^T, ``(M, K)``."""
        return self.left * self.singular @ self.right.T


@dataclass(frozen=True, eq=False)
class Groups:
    """Loss, targets and penalties of the groups.

    Args:
        loss: The loss.
        targets: ``(M, K)`` float64, one row for each group.
        counts: ``(M,)`` float64, positive.
        strength: Square root of the product of the penalties on head and features.
        lambda_b: Penalty on the bias; 0.0 for a free bias, None for no bias.
    """

    loss: Loss
    targets: Tensor
    counts: Tensor
    strength: float
    lambda_b: float | None

    @property
    def num_samples(self) -> float:
        """N."""
        return float(self.counts.sum())

    @property
    def shares(self) -> Tensor:
        """Fraction of all samples that each group has, ``(M,)``."""
        return self.counts / self.counts.sum()

    @property
    def shift_is_free(self) -> bool:
        """Whether the optimal bias is determined only up to a shift of all its entries."""
        return self.lambda_b == 0 and self.loss.shift_invariant

    def logits(self, scaled: Tensor, bias: Tensor | None) -> Tensor:
        """Compute the logits of the groups, bias included, from the scaled logits."""
        logits = scaled / self.counts.sqrt().unsqueeze(1)
        return logits if bias is None else logits + bias

    def multipliers(self, logits: Tensor) -> Tensor:
        """Compute the gradient of the mean loss in the scaled logits, ``(M, K)``, at logits including the bias."""
        return self.scaled(self.loss.residual(logits, self.targets))

    def scaled(self, residual: Tensor) -> Tensor:
        """Scale the residuals of the groups. At an optimum the spectral norm of the result is at most the strength."""
        return (self.counts.sqrt() / self.counts.sum()).unsqueeze(1) * residual

    def mean_loss(self, logits: Tensor) -> Tensor:
        """Compute the mean loss of all samples, at logits that include the bias."""
        return (self.shares * self.loss.value(logits, self.targets)).sum()

    def value(self, factors: Factors) -> float:
        """Compute the objective of the group problem."""
        logits = self.logits(factors.scaled_logits, factors.bias)
        value = float(self.mean_loss(logits)) + self.strength * float(factors.singular.sum())
        if factors.bias is not None and self.lambda_b:
            value += self.lambda_b / 2 * float(factors.bias.square().sum())
        return value

    def best_bias(self, logits: Tensor, bias: Tensor) -> Tensor:
        """Minimize over the bias ``(K,)`` for fixed logits without it, by Newton's method from a given bias."""
        shares, penalty = self.shares.unsqueeze(1), self.lambda_b or 0.0

        def gradient(b: Tensor) -> Tensor:
            return (shares * self.loss.residual(logits + b, self.targets)).sum(dim=0) + penalty * b

        now, size = gradient(bias), torch.inf
        for _ in range(100):
            if not float(now.norm()) < size:
                break
            size = float(now.norm())
            step = -torch.linalg.pinv(self._bias_hessian(logits + bias), hermitian=True) @ now
            for halving in range(40):
                trial = bias + 0.5**halving * step
                after = gradient(trial)
                if float(after.norm()) < size:
                    bias, now = trial, after
                    break
        return bias

    def _bias_hessian(self, logits: Tensor) -> Tensor:
        """Compute the Hessian of the objective in the bias."""
        assert self.lambda_b is not None
        K = logits.shape[1]
        axes = torch.eye(K, dtype=logits.dtype, device=logits.device)
        return self.loss.mean_hessian(logits, self.targets, self.shares) + self.lambda_b * axes

    def to(self, device: torch.device) -> Groups:
        """Move to a device."""
        return replace(self, targets=self.targets.to(device), counts=self.counts.to(device))

    def lower_bound(self, residuals: Tensor) -> Tensor | None:
        r"""Compute a lower bound on the minimum from any residuals of the groups, by weak duality.

        Args:
            residuals: ``(M, K)``, in the domain of the loss's conjugate: the mean residual of each group's samples.

        Returns:
            The bound, a scalar; None if the conjugate of the loss is not known.
        """
        shares = self.shares
        if self.lambda_b == 0:
            residuals = self.loss.balance(residuals, self.targets, shares)
        dual = self._admissible(residuals) * residuals
        values = self.loss.dual_value(dual, self.targets)
        if values is None:
            return None
        return (shares * values).sum() - bias_part(shares @ dual, self.lambda_b)

    def lower_bound_at(self, logits: Tensor) -> Tensor:
        """Compute a lower bound on the minimum from logits of the groups, ``(M, K)`` with the bias.

        If the conjugate of the loss is not known, its value ``<z, u> - l(z)`` at the gradient u of the loss is used,
        and its convexity between u and 0.
        """
        bound = self.lower_bound(self.loss.residual(logits, self.targets))
        if bound is not None:
            return bound
        if self.lambda_b == 0:
            logits = logits + self.best_bias(logits, torch.zeros_like(logits[0]))
        residuals = self.loss.residual(logits, self.targets)
        factor = self._admissible(residuals)
        values = self.loss.value(logits, self.targets) - (logits * residuals).sum(dim=1)
        return (
            factor * (self.shares * values).sum()
            + (1 - factor) * self.loss.lower_bound
            - bias_part(self.shares @ (factor * residuals), self.lambda_b)
        )

    def excess(self, factors: Factors) -> tuple[float, float]:
        """Bound how far the value of a point is above the minimum, without subtracting two nearly equal values.

        This is the value minus the bound of :meth:`lower_bound_at` by convexity, subtracted term by term. With very
        weak penalties the minimum is within the rounding of the loss. Only this bound then shows whether a point is
        optimal.

        Args:
            factors: The point. A free bias must be the best one.

        Returns:
            The bound, and the error in it that rounding of the logits may cause.
        """
        logits, bias = self.logits(factors.scaled_logits, factors.bias), factors.bias
        residuals = self.loss.residual(logits, self.targets)
        factor = float(self._admissible(residuals))
        least = self.loss.dual_value(torch.zeros_like(residuals), self.targets)
        lowest = self.loss.lower_bound if least is None else float((self.shares * least).sum())
        excess = (1 - factor) * (float(self.mean_loss(logits)) - lowest)
        along = (factors.left * (self.scaled(residuals) @ factors.right)).sum(dim=0)
        excess += float(((self.strength + factor * along) * factors.singular).sum())
        if bias is not None and self.lambda_b:
            pull = factor * (self.shares @ residuals)
            excess += float((self.lambda_b * bias + pull).square().sum()) / (2 * self.lambda_b)
        product = (logits * self.loss.curvature(logits, self.targets, logits)).sum(dim=1)
        return excess, 64 * torch.finfo(logits.dtype).eps * float((self.shares * product).sum())

    def _admissible(self, residuals: Tensor) -> Tensor:
        """Return the largest factor up to 1 that makes the norm of the scaled residuals at most the strength."""
        matrix = self.scaled(residuals)
        # Enlarged by its rounding error, which must not raise the lower bound.
        norm = torch.linalg.matrix_norm(matrix, 2) * (1 + 4 * torch.finfo(matrix.dtype).eps)
        factor: Tensor = (self.strength / norm).clamp(max=1)
        return factor


def bias_part(mean: Tensor, lambda_b: float | None) -> Tensor | float:
    """Compute the part of a lower bound due to a penalized bias, from the mean of the dual rows ``(K,)``."""
    return mean.square().sum() / (2 * lambda_b) if lambda_b else 0.0
