r"""Losses of the logits: all that a problem needs to know of them.

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

# A difference that is at least this part of its terms is right to 1e-13 of itself.
_SAFE_DIFFERENCE = 1e-3
# Nodes of the Gauss-Legendre rule on [0, 1], and weights for the integral of (1 - s) f(s).
_NODES = (0.046910077030668, 0.230765344947158, 0.5, 0.769234655052842, 0.953089922969332)
_WEIGHTS = (0.118463442528095, 0.239314335249683, 0.284444444444444, 0.239314335249683, 0.118463442528095)


class Loss:
    """A convex, smooth loss of logits and target.

    A loss of your own is a subclass with :meth:`value`, which autograd must be able to differentiate. Everything else
    has a default that follows from it. Override :meth:`divergence` where its default is not accurate enough, and
    :meth:`dual_value` for a sharper certified bound.

    Attributes:
        short_name: In tables and pictures, such as ``"CE"``; that of the class where it is empty.
        lower_bound: A number that no loss falls below. The certified bound needs it if there is no
            :meth:`dual_value`.
        shift_invariant: Whether adding one number to all logits of a row changes nothing. A free bias is then
            determined only up to a shift.
        exchangeable: Whether permuting the classes of logits and target together changes nothing. It lets the spectrum
            of balanced classes be found for many classes.
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
        """Raise a :class:`nclightning.errors.UserError` unless the loss is defined for these targets ``(M, K)``."""

    def residual(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Gradient of each row's loss in its logits, ``(B, K)``."""
        gradient: Tensor = torch.func.grad(lambda z: self.value(z, targets).sum())(logits)
        return gradient

    def mean(self, logits: Tensor, targets: Tensor | None, labels: Tensor) -> Tensor:
        """Evaluate the mean loss of samples that share targets, differentiable; scalar of the logits' dtype.

        Args:
            logits: ``(B, K)``.
            targets: ``(M, K)``; None for hard labels, whose targets are the rows of the identity.
            labels: Row of the targets for each sample, ``(B,)`` int64. One out of range raises.
        """
        return self.value(logits, target_rows(logits, targets, labels)).mean()

    def sum_and_residual_(self, logits: Tensor, targets: Tensor | None, labels: Tensor) -> Tensor:
        """Replace logits by :meth:`residual`, in place; return the sum of the losses, float64. Arguments as above."""
        rows = target_rows(logits, targets, labels)
        losses = self.value(logits, rows).sum(dtype=torch.float64)
        torch.mul(self.residual(logits, rows), 1, out=logits)  # Unlike copy_ also on fake tensors of an absent device.
        return losses

    def curvature(self, logits: Tensor, targets: Tensor, direction: Tensor) -> Tensor:
        """Product of each row's Hessian with a row of ``direction (B, K)``."""
        # The Hessian is symmetric, so the gradient again: many of torch's losses have no derivative in forward mode.
        product: Tensor = torch.func.grad(lambda z: (self.residual(z, targets) * direction).sum())(logits)
        return product

    def hessian(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Hessian of each row's loss in its logits, ``(B, K, K)``."""
        axes = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
        columns = [self.curvature(logits, targets, axis.expand_as(logits)) for axis in axes]
        return torch.stack(columns, dim=2)

    def mean_hessian(self, logits: Tensor, targets: Tensor, shares: Tensor) -> Tensor:
        """Sum of the Hessians of all rows with weights ``shares (B,)``, ``(K, K)``."""
        axes = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
        columns = [shares @ self.curvature(logits, targets, axis.expand_as(logits)) for axis in axes]
        return torch.stack(columns, dim=1)

    def curvature_along(self, logits: Tensor, targets: Tensor, axes: Tensor) -> Tensor:
        """Second derivatives of each row's loss along each column of ``axes (K, q)``, ``(B, q)``."""
        rows = [self.curvature(logits, targets, axis.expand_as(logits)) @ axis for axis in axes.T]
        return torch.stack(rows, dim=1)

    def peaks(self, logits: Tensor, targets: Tensor) -> Peaks | None:
        """Split off the Hessians the direction of each row in which it may be far the largest; None by default."""
        return None

    def divergence(self, logits: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
        r"""Bregman divergence of each row from its reference, zero where they are equal.

        The default is the plain difference where it is at least a thousandth of its terms, and then right to 1e-12.
        Below that it is the integral :math:`\int_0^1 (1 - s) \langle t, \nabla^2 l(a + s t)\, t\rangle ds` along
        the deviation t by the rule of Gauss with five nodes: right to 1e-10 where the third derivative is bounded and
        t small, but only to some percent where the Hessian jumps between the two points.

        Args:
            logits: ``(B, K)``.
            reference: ``(B, K)``.
            targets: ``(B, K)``.

        Returns:
            Non-negative ``(B,)``.
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
        """Bregman divergence of ``reference + step`` from the reference.

        The default is :meth:`divergence` of that sum, whose rounding a step of its own does not have.
        """
        return self.divergence(reference + step, reference, targets)

    def dual_value(self, dual: Tensor, targets: Tensor) -> Tensor | None:
        """Least value over z of ``loss(z) - <z, u>`` for each row u of ``dual``: minus the conjugate.

        Returns:
            ``(B,)``, ``-inf`` outside of the conjugate's domain; None if no formula is known, the default.
        """
        return None

    def balance(self, dual: Tensor, targets: Tensor, shares: Tensor) -> Tensor:
        """Change the dual rows so that their sum weighted by ``shares (B,)`` is zero, as a free bias needs it.

        A sum that is zero already changes nothing. The rows stay in the domain of :meth:`dual_value`.
        """
        return dual - (shares.unsqueeze(1) * dual).sum(dim=0) / shares.sum()

    def unattained(self, targets: Tensor) -> str | None:
        """Say why a free bias grows without bound for these targets, one clause; None if it does not, the default."""
        return None

    def closed_form(self, groups: Groups) -> Factors | None:
        """Optimum of the problem of the groups if a formula is known for it; None otherwise, the default."""
        return None

    def has_low_rank_optimum(self, groups: Groups) -> bool:
        """Whether fewer features than the rank keep the largest singular values of the closed form; default False."""
        return False


def target_rows(logits: Tensor, targets: Tensor | None, labels: Tensor) -> Tensor:
    """Target of each sample. Both ways raise on a label out of range, where torch's own losses would skip -100."""
    if targets is not None:
        return targets.index_select(0, labels)
    return torch.zeros_like(logits).scatter_(1, labels.unsqueeze(1), 1.0)
