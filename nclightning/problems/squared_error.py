r"""Half the squared error, whose optimum is a soft threshold of singular values."""

from __future__ import annotations

import torch
from torch import Tensor

from nclightning.problems.groups import Factors, Groups
from nclightning.problems.loss import Loss

__all__ = ["SquaredError"]

# A singular value is treated as equal to the threshold if they differ by at most this many machine epsilons times the
# larger of the threshold and the largest singular value.
_TOLERANCE_IN_EPS = 16


class SquaredError(Loss):
    r"""Half the squared distance between logits and target.

    .. math:: \tfrac12 \|z - y\|^2

    Targets may be any real numbers.

    Example:
        >>> import torch
        >>> from nclightning.problems import SquaredError
        >>> SquaredError().value(torch.zeros(1, 3), torch.tensor([[1.0, 0.0, 2.0]]))
        tensor([2.5000])
    """

    short_name = "MSE"
    exchangeable = True

    def value(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Evaluate the loss of each row."""
        return (logits - targets).square().sum(dim=1) / 2

    def residual(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return ``z - y``."""
        return logits - targets

    def mean(self, logits: Tensor, targets: Tensor | None, labels: Tensor) -> Tensor:
        """Evaluate the mean loss. Labels select rows of the targets, which are one-hot if ``targets`` is None."""
        if targets is None:
            index = labels.unsqueeze(1)
            residual = logits.scatter_add(1, index, logits.new_full((1, 1), -1.0).expand_as(index))
        else:
            residual = logits - targets.index_select(0, labels)
        return residual.square().sum() / (2 * len(logits))

    def sum_and_residual_(self, logits: Tensor, targets: Tensor | None, labels: Tensor) -> Tensor:
        """Replace logits by the residual, in place, and return the sum of the losses in float64."""
        if targets is None:
            logits.scatter_(1, labels.unsqueeze(1), -1.0, reduce="add")
        else:
            logits.sub_(targets.index_select(0, labels))
        flat = logits.reshape(-1).double()
        return torch.dot(flat, flat).mul_(0.5)

    def curvature(self, logits: Tensor, targets: Tensor, direction: Tensor) -> Tensor:
        """Return ``direction``, because the Hessian is the identity."""
        return direction

    def divergence(self, logits: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
        """Return half the squared distance from the reference. It does not depend on the target."""
        return self.divergence_along(logits - reference, reference, targets)

    def divergence_along(self, step: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
        """Return half the squared step."""
        return step.square().sum(dim=1) / 2

    def dual_value(self, dual: Tensor, targets: Tensor) -> Tensor:
        r"""Return minus the conjugate of the loss, :math:`-\frac12\|u\|^2 - \langle u, y\rangle`."""
        return -(dual * (dual / 2 + targets)).sum(dim=1)

    def closed_form(self, groups: Groups) -> Factors | None:
        r"""Compute the optimum by a soft threshold of the singular values of the scaled targets.

        Let :math:`\hat Y` be the targets, each row multiplied by the square root of the count of its group. The optimal
        logits, scaled in the same way, have the singular vectors of :math:`\hat Y`. Their singular values are those of
        :math:`\hat Y` minus :math:`N\sqrt{\lambda_W\lambda_H}`, or 0 if this is negative. A free bias removes the
        component of :math:`\hat Y` along the vector of square roots of the counts. A penalized bias shrinks this
        component. There is then a formula only if the component is orthogonal to the rest, as for balanced classes;
        otherwise the result is None.
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
        axis_threshold = threshold * (1 + groups.lambda_b) / groups.lambda_b
        excess = float(size) - axis_threshold
        if excess > _TOLERANCE_IN_EPS * torch.finfo(size.dtype).eps * max(float(size), axis_threshold):
            order = torch.cat([singular, singular.new_full((1,), excess)]).argsort(descending=True, stable=True)
            left = torch.cat([left, axis.unsqueeze(1)], dim=1)[:, order]
            right = torch.cat([right, (along / size).unsqueeze(1)], dim=1)[:, order]
            singular = torch.cat([singular, singular.new_full((1,), excess)])[order]
            return Factors(left, singular, right, mean * (axis_threshold / float(size)) / (1 + groups.lambda_b))
        return Factors(left, singular, right, mean / (1 + groups.lambda_b))

    def has_low_rank_optimum(self, groups: Groups) -> bool:
        r"""Return whether it is optimal to keep the largest singular values if there are fewer features than the rank.

        By the Eckart-Young theorem it is, unless the bias has a penalty, which gives directions different weights. Let
        r be the unit vector along the square roots of the counts. The bias removes the fraction
        :math:`1/(1 + \lambda_b)` of the loss along r. With :math:`P = I - r r^\top/(1 + \lambda_b)` and
        :math:`\rho = \sqrt{\lambda_W\lambda_H}`, a singular triple :math:`(u, \sigma, v)` of the logits then
        contributes :math:`\frac{\sigma^2}{2N} u^\top P u - \frac\sigma N u^\top P \hat Y v + \rho \sigma` to the
        objective. Let y be the largest singular value of :math:`\hat Y`. The contribution is smallest if u is
        orthogonal to r and :math:`\hat Y v = y u`. If there are enough such triples, one for each feature is optimal.
        The method therefore checks that all singular values of the logits except the last one are of this kind.
        """
        if not groups.lambda_b:
            return True
        factors = self.closed_form(groups)
        if factors is None:
            return False
        roots = groups.counts.sqrt()
        scaled = roots.unsqueeze(1) * groups.targets
        largest = factors.singular[:-1] + groups.num_samples * groups.strength
        inside = (roots @ factors.left[:, :-1]).abs().max() <= 1e-12 * roots.norm() if len(largest) else True
        norm = torch.linalg.matrix_norm(scaled, 2)
        return bool(inside) and bool(((largest - norm).abs() <= 1e-12 * norm).all())


def _soft_threshold(matrix: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Subtract a threshold from the singular values of a matrix, and drop those that do not exceed it.

    Returns:
        Left singular vectors as columns, the remaining singular values, and right singular vectors as columns.
    """
    left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
    rounding = _TOLERANCE_IN_EPS * torch.finfo(singular.dtype).eps * max(float(singular[0]), threshold)
    kept = singular > threshold + rounding
    return left[:, kept], singular[kept] - threshold, right[kept].T
