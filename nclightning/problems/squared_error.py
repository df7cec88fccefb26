r"""Half the squared error, whose optimum is a soft threshold of singular values."""

from __future__ import annotations

import torch
from torch import Tensor

from nclightning.problems.groups import Factors, Groups
from nclightning.problems.loss import Loss

__all__ = ["SquaredError"]

# Singular values this close to the threshold, in units of the largest one's rounding, count as at it.
_ROUNDINGS = 16


class SquaredError(Loss):
    r"""Half the squared distance of logits and target, :math:`\frac12\|z - y\|^2`, any real targets."""

    short_name = "MSE"
    exchangeable = True

    def value(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Evaluate the loss of each row."""
        return (logits - targets).square().sum(dim=1) / 2

    def residual(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return ``z - y``."""
        return logits - targets

    def mean(self, logits: Tensor, targets: Tensor | None, labels: Tensor) -> Tensor:
        """Evaluate the mean loss of samples that share targets."""
        if targets is None:
            index = labels.unsqueeze(1)
            residual = logits.scatter_add(1, index, logits.new_full((1, 1), -1.0).expand_as(index))
        else:
            residual = logits - targets.index_select(0, labels)
        return residual.square().sum() / (2 * len(logits))

    def sum_and_residual_(self, logits: Tensor, targets: Tensor | None, labels: Tensor) -> Tensor:
        """Replace logits by the residual; return the sum of the losses."""
        if targets is None:
            logits.scatter_(1, labels.unsqueeze(1), -1.0, reduce="add")
        else:
            logits.sub_(targets.index_select(0, labels))
        flat = logits.reshape(-1).double()
        return torch.dot(flat, flat).mul_(0.5)

    def curvature(self, logits: Tensor, targets: Tensor, direction: Tensor) -> Tensor:
        """Return the direction: the Hessian is the identity."""
        return direction

    def divergence(self, logits: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
        """Half the squared deviation, whatever the target."""
        return (logits - reference).square().sum(dim=1) / 2

    def dual_value(self, dual: Tensor, targets: Tensor) -> Tensor:
        r"""Return :math:`-\frac12\|u\|^2 - \langle u, y\rangle`."""
        return -(dual * (dual / 2 + targets)).sum(dim=1)

    def closed_form(self, groups: Groups) -> Factors | None:
        r"""Soft-threshold the singular values of the targets.

        With :math:`\hat Y` the targets times the roots of their counts, the optimal logits have its singular vectors,
        and its singular values minus :math:`N\sqrt{\lambda_W\lambda_H}` where that is positive. A free bias removes
        the component of :math:`\hat Y` along the roots of the counts. A penalized one damps it: there is a formula if
        that component is orthogonal to the rest, as for balanced classes.
        """
        roots, N = groups.counts.sqrt(), groups.num_samples
        scaled, threshold = roots.unsqueeze(1) * groups.targets, N * groups.strength
        if groups.lambda_b is None:
            return Factors(*_soft_threshold(scaled, threshold), None)
        axis = roots / roots.norm()
        along = axis @ scaled
        rest = scaled - torch.outer(axis, along)
        mean = along / roots.norm()
        if groups.lambda_b == 0:
            return Factors(*_soft_threshold(rest, threshold), mean)
        size = along.norm()
        if float((rest @ along).norm()) > 1e-13 * float(scaled.norm() * size):
            return None
        left, singular, right = _soft_threshold(rest, threshold)
        if not size > 0:
            return Factors(left, singular, right, torch.zeros_like(along))
        damped = threshold * (1 + groups.lambda_b) / groups.lambda_b
        excess = float(size) - damped
        if excess > _ROUNDINGS * torch.finfo(size.dtype).eps * max(float(size), damped):
            left = torch.cat([axis.unsqueeze(1), left], dim=1)
            right = torch.cat([(along / size).unsqueeze(1), right], dim=1)
            singular = torch.cat([singular.new_full((1,), excess), singular])
            return Factors(left, singular, right, mean * (damped / float(size)) / (1 + groups.lambda_b))
        return Factors(left, singular, right, mean / (1 + groups.lambda_b))

    def has_low_rank_optimum(self, groups: Groups) -> bool:
        """By the theorem of Eckart and Young, unless a penalty on the bias weighs directions differently."""
        return not groups.lambda_b


def _soft_threshold(matrix: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
    rounding = _ROUNDINGS * torch.finfo(singular.dtype).eps * max(float(singular[0]), threshold)
    kept = singular > threshold + rounding
    return left[:, kept], singular[kept] - threshold, right[kept].T
