r"""Half the squared error, whose optimum is a soft threshold of singular values."""

from __future__ import annotations

import torch
from torch import Tensor

from nclightning.problems.groups import Factors, Groups
from nclightning.problems.loss import Loss

__all__ = ["SquaredError"]

# Singular values within this number of roundings of the threshold are taken for equal to it.
_ROUNDINGS = 16


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
        """Return half the squared deviation. It does not depend on the target."""
        return self.divergence_along(logits - reference, reference, targets)

    def divergence_along(self, step: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
        """Return half the squared step."""
        return step.square().sum(dim=1) / 2

    def dual_value(self, dual: Tensor, targets: Tensor) -> Tensor:
        r"""Return :math:`-\frac12\|u\|^2 - \langle u, y\rangle`."""
        return -(dual * (dual / 2 + targets)).sum(dim=1)

    def closed_form(self, groups: Groups) -> Factors | None:
        r"""Return the soft threshold of the singular values of the scaled targets.

        Let :math:`\hat Y` be the targets times the square roots of their counts. The scaled optimal logits have its
        singular vectors, and its singular values minus :math:`N\sqrt{\lambda_W\lambda_H}` where this is positive. A
        free bias removes the component of :math:`\hat Y` along the square roots of the counts. A penalized bias reduces
        it; then there is a formula only if this component is orthogonal to the rest, as for balanced classes.
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
            order = torch.cat([singular, singular.new_full((1,), excess)]).argsort(descending=True, stable=True)
            left = torch.cat([left, axis.unsqueeze(1)], dim=1)[:, order]
            right = torch.cat([right, (along / size).unsqueeze(1)], dim=1)[:, order]
            singular = torch.cat([singular, singular.new_full((1,), excess)])[order]
            return Factors(left, singular, right, mean * (damped / float(size)) / (1 + groups.lambda_b))
        return Factors(left, singular, right, mean / (1 + groups.lambda_b))

    def has_low_rank_optimum(self, groups: Groups) -> bool:
        r"""Return whether the largest singular values are optimal for fewer features.

        By the Eckart-Young theorem they are, unless a penalty on the bias gives directions different weights. Let r be
        the direction of the square roots of the counts. The bias removes the fraction :math:`1/(1 + \lambda_b)` of the
        loss along r. With :math:`P = I - r r^\top/(1 + \lambda_b)`, a singular triple :math:`(u, \sigma, v)` of the
        logits then contributes
        :math:`\frac{\sigma^2}{2N} u^\top P u - \frac\sigma N u^\top P \hat Y v + \rho \sigma`. Let y be the largest
        singular value of :math:`\hat Y`. The contribution is least for u orthogonal to r with :math:`\hat Y v = y u`,
        and as many such triples as there are features are optimal. So all singular values of the logits but one must
        be of this kind.
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
    """Reduce the singular values of a matrix by a threshold, and drop those that it exceeds."""
    left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
    rounding = _ROUNDINGS * torch.finfo(singular.dtype).eps * max(float(singular[0]), threshold)
    kept = singular > threshold + rounding
    return left[:, kept], singular[kept] - threshold, right[kept].T
