r"""Cross-entropy of softmax with a distribution over classes, and binary cross-entropy of independent labels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from nclightning.errors import UserError
from nclightning.problems.groups import Factors, Groups
from nclightning.problems.loss import Loss, target_rows
from nclightning.problems.row_hessians import Flanks, Peaks
from nclightning.problems.simplex import has_exchangeable_classes

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["BinaryCrossEntropy", "CrossEntropy"]

# For smaller |t|, exp(t) - 1 - t is computed from its Taylor series with these coefficients, with a relative error of
# 1e-17. For larger ones the difference loses at most five bits.
_SERIES_BELOW = 0.125
_COEFFICIENTS = (1 / 2, 1 / 6, 1 / 24, 1 / 120, 1 / 720, 1 / 5040, 1 / 40320, 1 / 362880, 1 / 3628800, 1 / 39916800)
# For larger t, p exp(t) is computed as exp(log p + t), since p may underflow. If log p + t exceeds the second number,
# the sum over classes may overflow.
_LARGE_EXPONENT, _LARGEST_EXPONENT = 30.0, 680.0
# Rounding error of K q, a product of two square roots divided by a sum of two numbers: eight roundings of half a unit.
_ROUNDING = 4 * 2.0**-52


@dataclass(frozen=True, eq=False)
class CrossEntropy(Loss):
    r"""Cross-entropy of softmax with a target distribution, as in ``torch.nn.functional.cross_entropy``.

    .. math:: -\sum_k w_k y_k \log \mathrm{softmax}(z + o)_k

    The targets y of hard labels are rows of the identity. Label smoothing and mixup have other distributions.

    Args:
        offset: o, one number for each class, which is added to the logits (logit adjustment).
        class_weights: w, one positive number for each class.

    Example:
        >>> import torch
        >>> from nclightning.problems import CrossEntropy
        >>> loss = CrossEntropy()
        >>> loss.value(torch.zeros(1, 4), torch.eye(4)[:1])
        tensor([1.3863])
    """

    offset: Sequence[float] | Tensor | None = None
    class_weights: Sequence[float] | Tensor | None = None
    short_name = "CE"
    shift_invariant = True

    @property
    def exchangeable(self) -> bool:  # type: ignore[override]
        """Whether classes may be permuted, which holds without offset and weights only."""
        return self.offset is None and self.class_weights is None

    def __post_init__(self) -> None:
        for name in ("offset", "class_weights"):
            given = getattr(self, name)
            if given is not None:
                # Python floats keep all digits, which torch's default dtype would round.
                object.__setattr__(self, name, torch.as_tensor(given, dtype=torch.float64, device="cpu"))

    def check_targets(self, targets: Tensor) -> None:
        """Raise an error unless rows are distributions over as many classes as there are offsets and weights."""
        off = (targets.sum(dim=1) - 1).abs()
        if bool((targets < 0).any()) or bool((off > 1e-6).any()):
            raise UserError(
                "targets must be rows of probabilities for cross-entropy, non-negative and with sum 1, got a row with "
                f"sum {float(targets.sum(dim=1)[off.argmax()]):.6g} and a smallest entry of {float(targets.min()):.6g}."
            )
        classes = targets.shape[1]
        if classes < 2:
            raise UserError("targets must have at least two columns for cross-entropy, got 1.")
        for name, given in (("offset", self.offset), ("class_weights", self.class_weights)):
            if given is not None and tuple(cast(Tensor, given).shape) != (classes,):
                raise UserError(f"{name} must hold a number for each of the {classes} classes, got {given!r}.")
        if self.class_weights is not None and not bool((cast(Tensor, self.class_weights) > 0).all()):
            raise UserError(f"class_weights must be positive, got {self.class_weights!r}.")

    def value(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Evaluate the loss of each row."""
        return -(self._weighted(targets) * torch.log_softmax(self._adjusted(logits), dim=1)).sum(dim=1)

    def residual(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the probabilities minus the target, multiplied by the class weights.

        Rows sum to zero. The entry of the class with the largest target is computed from this sum: where its
        probability is close to 1, the difference would lose digits.
        """
        weighted = self._weighted(targets)
        rest = weighted.sum(dim=1, keepdim=True) * torch.softmax(self._adjusted(logits), dim=1) - weighted
        index = targets.argmax(dim=1, keepdim=True)
        rest = rest.scatter(1, index, 0.0)
        return rest.scatter(1, index, -rest.sum(dim=1, keepdim=True))

    def mean(self, logits: Tensor, targets: Tensor | None, labels: Tensor) -> Tensor:
        """Evaluate the mean loss of samples that share targets."""
        if targets is not None or self.class_weights is not None:
            return super().mean(logits, targets, labels)
        return -torch.log_softmax(self._adjusted(logits), dim=1).gather(1, labels.unsqueeze(1)).mean()

    def sum_and_residual_(self, logits: Tensor, targets: Tensor | None, labels: Tensor) -> Tensor:
        """Replace logits by the probabilities minus the target; return the sum of the losses."""
        log_probability = torch.log_softmax(self._adjusted(logits), dim=1)
        if targets is None and self.class_weights is None:
            index = labels.unsqueeze(1)
            losses = log_probability.gather(1, index).sum(dtype=torch.float64).neg_()
            torch.exp(log_probability, out=logits).scatter_(1, index, -1.0, reduce="add")
            return losses
        weighted = self._weighted(target_rows(logits, targets, labels))
        torch.exp(log_probability, out=logits).mul_(weighted.sum(dim=1, keepdim=True)).sub_(weighted)
        return weighted.mul_(log_probability).sum(dtype=torch.float64).neg_()

    def curvature(self, logits: Tensor, targets: Tensor, direction: Tensor) -> Tensor:
        """Multiply with ``diag(p) - p p^T``.

        Rows of the result sum to zero. The entry of the likeliest class is computed from this sum: where its
        probability is close to 1, the difference would lose digits.
        """
        p = torch.softmax(self._adjusted(logits), dim=1)
        product = p * (direction - (p * direction).sum(dim=1, keepdim=True))
        top = p.argmax(dim=1, keepdim=True)
        product = product.scatter(1, top, 0.0)
        product = product.scatter(1, top, -product.sum(dim=1, keepdim=True))
        return self._weighted(targets).sum(dim=1, keepdim=True) * product

    def mean_hessian(self, logits: Tensor, targets: Tensor, shares: Tensor) -> Tensor:
        """Sum the Hessians by one matrix product. A loop over a thousand classes would take minutes.

        Rows of the result sum to zero, and the diagonal is computed from this sum, as in :meth:`curvature`.
        """
        p = torch.softmax(self._adjusted(logits), dim=1)
        pairs = ((shares * self._weighted(targets).sum(dim=1)).unsqueeze(1) * p).T @ p
        pairs = pairs.fill_diagonal_(0.0)
        return torch.diag(pairs.sum(dim=1)) - pairs

    def curvature_along(self, logits: Tensor, targets: Tensor, axes: Tensor) -> Tensor:
        """Compute the variances of the axes under the probabilities, relative to the entry of the likeliest class."""
        p = torch.softmax(self._adjusted(logits), dim=1)
        top = p.argmax(dim=1, keepdim=True)
        # Where the likeliest class is nearly certain, all remaining probabilities are small. The terms below are then
        # small themselves, so that their difference does not cancel.
        p, start = p.scatter(1, top, 0.0), axes[top.squeeze(1)]
        mass, mean = p.sum(dim=1, keepdim=True), p @ axes
        variance = p @ axes.square() - 2 * start * mean + start.square() * mass - (mean - start * mass).square()
        return self._weighted(targets).sum(dim=1, keepdim=True) * variance.clamp(min=0)

    def peaks(self, logits: Tensor, targets: Tensor) -> Peaks:
        """Split off the direction of the likeliest class against all others."""
        p = torch.softmax(self._adjusted(logits), dim=1)
        top = p.argmax(dim=1, keepdim=True)
        wrong = p.scatter(1, top, 0.0)
        mass = wrong.sum(dim=1, keepdim=True)
        others = wrong / mass.clamp(min=torch.finfo(p.dtype).tiny)
        mass = self._weighted(targets).sum(dim=1, keepdim=True) * mass
        return Peaks(mass * p.gather(1, top), (-others).scatter(1, top, 1.0), Flanks(mass, others))

    def divergence(self, logits: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
        """Return the divergence of log-sum-exp, multiplied by the total weight of the target."""
        return self.divergence_along(logits - reference, reference, targets)

    def divergence_along(self, step: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
        """Return the divergence as a function of the step, without the rounding error of a sum."""
        return self._weighted(targets).sum(dim=1) * _cumulant(torch.log_softmax(self._adjusted(reference), dim=1), step)

    def dual_value(self, dual: Tensor, targets: Tensor) -> Tensor:
        """Return the entropy of the distribution ``u + y``."""
        weighted = self._weighted(targets)
        mass = weighted.sum(dim=1)
        q = (dual + weighted) / mass.unsqueeze(1)
        value = -mass * torch.special.xlogy(q.clamp(min=0), q.clamp(min=0)).sum(dim=1)
        if self.offset is not None:
            value = value + dual @ cast(Tensor, self.offset).to(dual)
        slack = 1e-12  # Rounding error of a sum of probabilities.
        inside = (q.min(dim=1).values >= -slack) & ((q.sum(dim=1) - 1).abs() <= slack * q.shape[1])
        return torch.where(inside, value, -torch.inf)

    def balance(self, dual: Tensor, targets: Tensor, shares: Tensor) -> Tensor:
        """Scale down the classes with too much probability, and distribute the difference to those with too little."""
        weighted, share = self._weighted(targets), shares.unsqueeze(1)
        mass = dual + weighted
        have, want = (share * mass).sum(dim=0), (share * weighted).sum(dim=0)
        kept = mass * torch.where(have > want, want / have, 1)
        lack = (want - have).clamp(min=0)
        freed = (mass - kept).sum(dim=1, keepdim=True)
        return torch.where(lack.sum() > 0, kept + freed * lack / lack.sum() - weighted, dual)

    def _adjusted(self, logits: Tensor) -> Tensor:
        """Add the offset to logits."""
        return logits if self.offset is None else logits + cast(Tensor, self.offset).to(logits)

    def _weighted(self, targets: Tensor) -> Tensor:
        """Multiply targets with the class weights."""
        return targets if self.class_weights is None else targets * cast(Tensor, self.class_weights).to(targets)

    def unattained(self, targets: Tensor) -> str | None:
        """Return a clause about a class without samples, whose bias falls without bound."""
        absent = torch.nonzero(targets.sum(dim=0) == 0).flatten().tolist()
        return f"class {absent[0]} has no samples, and its bias falls without bound" if absent else None

    def closed_form(self, groups: Groups) -> Factors | None:
        r"""Return the simplex ETF for balanced classes with hard or smoothed labels.

        The logits of class k are :math:`s (e_k - 1/K)` with :math:`s = \log(1/q' - K + 1)` where :math:`q' < 1/K`. Here
        :math:`q' = \sqrt{n\lambda_W\lambda_H} + \delta/K` is the probability of each wrong class. Both terms are
        divided by the sum of a row of the targets, which is not exactly 1 for a float32 table.
        """
        targets, K = groups.targets, groups.targets.shape[1]
        if not has_exchangeable_classes(groups):
            return None
        own, off = float(targets[0, 0]), float(targets[0, 1])
        wrong = (off + math.sqrt(float(groups.counts[0])) * groups.strength) / (own + (K - 1) * off)
        slack = 1 - K * wrong
        bias = None if groups.lambda_b is None else targets.new_zeros(K)
        if not slack > _ROUNDING:
            return Factors(targets[:, :0], targets[0, :0], targets[:, :0], bias)
        scale = math.sqrt(float(groups.counts[0])) * math.log1p(slack / wrong)
        frame = _orthogonal_to_ones(targets)
        return Factors(frame, targets.new_full((K - 1,), scale), frame, bias)


class BinaryCrossEntropy(Loss):
    r"""Binary cross-entropy of independent labels with targets in [0, 1], summed over the labels.

    .. math:: \sum_k \log(1 + e^{z_k}) - y_k z_k

    It is ``torch.nn.functional.binary_cross_entropy_with_logits``, summed over classes instead of averaged.

    Example:
        >>> import torch
        >>> from nclightning.problems import BinaryCrossEntropy
        >>> BinaryCrossEntropy().value(torch.zeros(1, 3), torch.tensor([[1.0, 1.0, 0.0]]))  # 3 log 2
        tensor([2.0794])
    """

    short_name = "BCE"
    exchangeable = True

    def unattained(self, targets: Tensor) -> str | None:
        """Return a clause about a label that all samples or none have, whose bias grows without bound."""
        extreme = (targets == 0).all(dim=0) | (targets == 1).all(dim=0)
        labels = torch.nonzero(extreme).flatten().tolist()
        return f"all or no samples have label {labels[0]}, and its bias grows without bound" if labels else None

    def check_targets(self, targets: Tensor) -> None:
        """Raise an error unless targets are in [0, 1]."""
        if bool((targets < 0).any()) or bool((targets > 1).any()):
            raise UserError(
                "targets must lie between 0 and 1 for binary cross-entropy, got values between "
                f"{float(targets.min()):.6g} and {float(targets.max()):.6g}."
            )

    def value(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Evaluate the loss of each row."""
        return (-logsigmoid(-logits) - targets * logits).sum(dim=1)

    def residual(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the probabilities minus the target, in a form that does not cancel for targets 0 and 1."""
        return (1 - targets) * torch.sigmoid(logits) - targets * torch.sigmoid(-logits)

    def curvature(self, logits: Tensor, targets: Tensor, direction: Tensor) -> Tensor:
        """Multiply with ``diag(p (1 - p))``."""
        return torch.sigmoid(logits) * torch.sigmoid(-logits) * direction

    def mean_hessian(self, logits: Tensor, targets: Tensor, shares: Tensor) -> Tensor:
        """Sum the Hessians, which are diagonal."""
        return torch.diag(shares @ (torch.sigmoid(logits) * torch.sigmoid(-logits)))

    def curvature_along(self, logits: Tensor, targets: Tensor, axes: Tensor) -> Tensor:
        """Compute the second derivatives by one matrix product."""
        return torch.sigmoid(logits) * torch.sigmoid(-logits) @ axes.square()

    def divergence(self, logits: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
        """Return the sum over labels of the divergence of a softmax of two classes with logits zero and z."""
        return self.divergence_along(logits - reference, reference, targets)

    def divergence_along(self, step: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
        """Return the divergence as a function of the step, without the rounding error of a sum."""
        flat, change = reference.reshape(-1, 1), step.reshape(-1, 1)
        log_p = torch.cat([logsigmoid(-flat), logsigmoid(flat)], dim=1)
        both = torch.cat([torch.zeros_like(change), change], dim=1)
        return _cumulant(log_p, both).view_as(step).sum(dim=1)

    def dual_value(self, dual: Tensor, targets: Tensor) -> Tensor:
        """Return the sum of the binary entropies of ``u + y``."""
        q = dual + targets
        inside = (q >= -1e-12) & (q <= 1 + 1e-12)
        q = q.clamp(0, 1)
        entropy = -torch.special.xlogy(q, q) - torch.special.xlog1py(1 - q, -q)
        return torch.where(inside, entropy, -torch.inf).sum(dim=1)

    def balance(self, dual: Tensor, targets: Tensor, shares: Tensor) -> Tensor:
        """Scale probabilities towards 0 or 1 where their mean differs from that of the targets."""
        share = shares.unsqueeze(1) / shares.sum()
        q = dual + targets
        have, want = (share * q).sum(dim=0), (share * targets).sum(dim=0)
        down = torch.where(have > want, want / have, 1)
        up = torch.where(have < want, (1 - want) / (1 - have), 1)
        return torch.where(have < want, 1 - (1 - q) * up, q * down) - targets


def _orthogonal_to_ones(like: Tensor) -> Tensor:
    """Make an orthonormal basis ``(K, K - 1)`` of the vectors with sum zero, by a reflection."""
    K = like.shape[1]
    axis = like.new_full((K, 1), K**-0.5)
    axis[0] += 1
    reflection = torch.eye(K, dtype=like.dtype, device=like.device) - axis @ axis.T * (2 / axis.square().sum())
    return reflection[:, 1:]


def _cumulant(log_probability: Tensor, change: Tensor) -> Tensor:
    r"""Compute the logarithm of the mean of :math:`e^t` minus the mean of t, under the probabilities of each row."""
    probability = log_probability.exp()
    t = change - (probability * change).sum(dim=1, keepdim=True)
    # Now the mean of t is zero. The mean of exp(t) is 1 plus a sum of non-negative terms.
    terms = probability * _exponential_excess(t)
    # On another device than the CPU this check costs more than it saves.
    if t.device.type == "cpu" and not bool((t > _LARGE_EXPONENT).any()):
        return torch.log1p(terms.sum(dim=1))
    grown = log_probability + t
    terms = torch.where(t > _LARGE_EXPONENT, grown.clamp(max=_LARGEST_EXPONENT).exp() - probability * (1 + t), terms)
    overflows = (grown > _LARGEST_EXPONENT).any(dim=1)
    return torch.where(overflows, torch.logsumexp(grown, dim=1), torch.log1p(terms.sum(dim=1)))


def _exponential_excess(t: Tensor) -> Tensor:
    """Compute ``exp(t) - 1 - t`` to full relative accuracy, for t up to ``_LARGE_EXPONENT``."""
    series = torch.full_like(t, _COEFFICIENTS[-1])
    for coefficient in reversed(_COEFFICIENTS[:-1]):
        series.mul_(t).add_(coefficient)
    series.mul_(t).mul_(t)
    return torch.where(t.abs() <= _SERIES_BELOW, series, torch.expm1(t.clamp(max=_LARGE_EXPONENT)) - t)
