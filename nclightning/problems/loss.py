r"""The interface of a loss: everything that a problem needs to know about it.

A loss is convex and smooth in the logits. Everything that :class:`nclightning.problems.Problem` answers is built from
its value, gradient, curvature and Bregman divergence

.. math:: D(z, a) = l(z) - l(a) - \langle \nabla l(a), z - a \rangle \ge 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from nclightning.problems.groups import Factors, Groups
    from nclightning.problems.row_hessians import Peaks

__all__ = ["Loss", "target_rows"]

# The relative error of a difference that is at least this fraction of its terms is about 1e-13.
_SAFE_DIFFERENCE = 1e-3
# Nodes of the Gauss-Legendre rule on [0, 1], and weights for the integral of (1 - s) f(s).
_NODES = (0.046910077030668, 0.230765344947158, 0.5, 0.769234655052842, 0.953089922969332)
_WEIGHTS = (0.118463442528095, 0.239314335249683, 0.284444444444444, 0.239314335249683, 0.118463442528095)


class Loss:
    """A convex, smooth loss of logits and target.

    To define a loss, subclass this and write :meth:`value`, twice differentiable by autograd. All other methods have
    defaults that use :meth:`value` only. Override :meth:`divergence` if its default is not accurate enough, and
    :meth:`dual_value` for a sharper certified bound.

    Attributes:
        short_name: Name in tables and pictures, such as ``"CE"``. If it is empty, the name of the class is used.
        lower_bound: A number that the loss never falls below. The certified bound uses it if there is no
            :meth:`dual_value`.
        shift_invariant: Whether the loss stays the same if one number is added to all logits of a row. A free bias is
            then determined only up to a shift.
        exchangeable: Whether the loss stays the same if the classes of logits and target are permuted together. This
            makes the spectrum of many balanced classes fast to compute.

    Example:
        >>> import torch
        >>> from nclightning.problems import Loss, Problem
        >>> class Huber(Loss):
        ...     def value(self, logits, targets):
        ...         return torch.nn.functional.huber_loss(logits, targets, reduction="none").sum(dim=1)
        >>> problem = Problem(Huber(), "hard", [4, 4], feature_dim=2, lambda_w=0.01, lambda_h=0.01)
        >>> problem.optimum.method, problem.optimum.rank
        ('numerical', 2)
    """

    short_name: str = ""
    lower_bound: float = 0.0
    shift_invariant: bool = False
    exchangeable: bool = False

    def value(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Evaluate the loss of each row.

        Args:
            logits: ``(B, K)``.
            targets: ``(B, K)``.

        Returns:
            ``(B,)``, differentiable in the logits.
        """
        raise NotImplementedError(f"{type(self).__name__} must define value(logits, targets).")

    def check_targets(self, targets: Tensor) -> None:
        """Raise a :class:`nclightning.errors.UserError` if the loss is not defined for targets ``(M, K)``."""

    def residual(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Compute the gradient of each row's loss in its logits, ``(B, K)``."""
        gradient: Tensor = torch.func.grad(lambda z: self.value(z, targets).sum())(logits)
        return gradient

    def mean(self, logits: Tensor, targets: Tensor | None, labels: Tensor) -> Tensor:
        """Evaluate the mean loss of samples that share targets, differentiable; scalar of the logits' dtype.

        Args:
            logits: ``(B, K)``.
            targets: ``(M, K)``; None for hard labels, whose targets are the rows of the identity.
            labels: Row of the targets for each sample, ``(B,)`` int64. A label out of range is an error.
        """
        return self.value(logits, target_rows(logits, targets, labels)).mean()

    def sum_and_residual_(self, logits: Tensor, targets: Tensor | None, labels: Tensor) -> Tensor:
        """Replace logits by :meth:`residual`, in place, and return the sum of the losses in float64.

        Arguments as for :meth:`mean`.
        """
        rows = target_rows(logits, targets, labels)
        losses = self.value(logits, rows).sum(dtype=torch.float64)
        torch.mul(self.residual(logits, rows), 1, out=logits)  # copy_ fails on fake tensors of an absent device.
        return losses

    def curvature(self, logits: Tensor, targets: Tensor, direction: Tensor) -> Tensor:
        """Multiply each row's Hessian with a row of ``direction (B, K)``."""
        # The Hessian is symmetric, so that reverse mode serves. Many of torch's losses have no forward-mode derivative.
        product: Tensor = torch.func.grad(lambda z: (self.residual(z, targets) * direction).sum())(logits)
        return product

    def hessian(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Compute the Hessian of each row's loss in its logits, ``(B, K, K)``."""
        axes = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
        columns = [self.curvature(logits, targets, axis.expand_as(logits)) for axis in axes]
        return torch.stack(columns, dim=2)

    def mean_hessian(self, logits: Tensor, targets: Tensor, shares: Tensor) -> Tensor:
        """Sum the Hessians of all rows with weights ``shares (B,)``, ``(K, K)``."""
        axes = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
        columns = [shares @ self.curvature(logits, targets, axis.expand_as(logits)) for axis in axes]
        return torch.stack(columns, dim=1)

    def curvature_along(self, logits: Tensor, targets: Tensor, axes: Tensor) -> Tensor:
        """Compute the second derivatives of each row's loss along each column of ``axes (K, q)``, ``(B, q)``."""
        rows = [self.curvature(logits, targets, axis.expand_as(logits)) @ axis for axis in axes.T]
        return torch.stack(rows, dim=1)

    def peaks(self, logits: Tensor, targets: Tensor) -> Peaks | None:
        """Split each row's Hessian into a rank-one peak, which may be much the largest part, and the rest.

        The default returns None: no such split is known.
        """
        return None

    def divergence(self, logits: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
        r"""Compute the Bregman divergence of each row from its reference.

        The default is the plain difference where this is at least a thousandth of its terms; its relative error is then
        1e-12. Otherwise it is the integral :math:`\int_0^1 (1 - s) \langle t, \nabla^2 l(a + s t)\, t\rangle ds` over
        the deviation t, by Gauss quadrature with five nodes. Its relative error is 1e-10 if the third derivative is
        bounded and t is small, but some percent if the Hessian jumps between the two points.

        Args:
            logits: ``(B, K)``.
            reference: ``(B, K)``.
            targets: ``(B, K)``.

        Returns:
            Non-negative ``(B,)``, zero where both are equal.
        """
        step = logits - reference
        now, before = self.value(logits, targets), self.value(reference, targets)
        slope = (self.residual(reference, targets) * step).sum(dim=1)
        plain = now - before - slope
        integral = torch.zeros_like(plain)
        for node, weight in zip(_NODES, _WEIGHTS, strict=True):
            product = self.curvature(reference + node * step, targets, step)
            integral = integral + weight * (1 - node) * (product * step).sum(dim=1)
        safe = plain > _SAFE_DIFFERENCE * torch.maximum(now.abs(), torch.maximum(before.abs(), slope.abs()))
        return torch.where(safe, plain, integral.clamp(min=0))

    def divergence_along(self, step: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
        """Compute the Bregman divergence of ``reference + step`` from the reference.

        The default calls :meth:`divergence`. An override can use the step itself, which does not have the rounding
        error of the sum.
        """
        return self.divergence(reference + step, reference, targets)

    def dual_value(self, dual: Tensor, targets: Tensor) -> Tensor | None:
        """Compute minus the conjugate of the loss, the minimum over z of ``loss(z) - <z, u>``, for each row u.

        Returns:
            ``(B,)``, ``-inf`` outside of the conjugate's domain. The default returns None: no formula is known.
        """
        return None

    def balance(self, dual: Tensor, targets: Tensor, shares: Tensor) -> Tensor:
        """Change the dual rows so that their sum weighted by ``shares (B,)`` is zero, as a free bias requires.

        If the sum is zero already, nothing changes. The rows must stay in the domain of :meth:`dual_value`.
        """
        return dual - (shares.unsqueeze(1) * dual).sum(dim=0) / shares.sum()

    def unattained(self, targets: Tensor) -> str | None:
        """Return one clause that says why a free bias grows without bound for these targets; None if it does not."""
        return None

    def closed_form(self, groups: Groups) -> Factors | None:
        """Compute the optimum of the group problem by a formula; None, the default, if there is none."""
        return None

    def has_low_rank_optimum(self, groups: Groups) -> bool:
        """Whether an optimum with fewer features than the rank keeps the largest singular values of the closed form."""
        return False


def target_rows(logits: Tensor, targets: Tensor | None, labels: Tensor) -> Tensor:
    """Return the target of each sample. A label out of range is an error, also -100, which torch's losses skip."""
    if targets is not None:
        return targets.index_select(0, labels)
    return torch.zeros_like(logits).scatter_(1, labels.unsqueeze(1), 1.0)
