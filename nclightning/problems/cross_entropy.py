r"""Cross-entropy of distributions over classes, and of each class on its own."""

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

# Below this exp(t) - 1 - t is taken from its Taylor series with these coefficients, whose rest is 1e-17 of it. Above it
# the difference loses at most five bits.
_SERIES_BELOW = 0.125
_COEFFICIENTS = (1 / 2, 1 / 6, 1 / 24, 1 / 120, 1 / 720, 1 / 5040, 1 / 40320, 1 / 362880, 1 / 3628800, 1 / 39916800)
# Above the first a probability times exp(t) is taken from its logarithm: the probability may be too small for a number.
# Above the second it is too large for one, and so would be the sum of as many as there are classes.
_LARGE_EXPONENT, _LARGEST_EXPONENT = 30.0, 680.0
# K q is a product of two square roots over a sum of two numbers: eight roundings of half a unit.
_ROUNDING = 4 * 2.0**-52


@dataclass(frozen=True, eq=False)
class CrossEntropy(Loss):
    r"""Cross-entropy of softmax with a distribution y over the classes, ``torch.nn.functional.cross_entropy``.

    .. math:: -\sum_k w_k y_k \log \mathrm{softmax}(z + o)_k

    Hard labels are rows of the identity, label smoothing and mixup are other rows of the simplex.

    Args:
        offset: Added to the logits, one number for each class: logit adjustment.
        class_weights: w, one positive number for each class.

    Example:
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
        """Without offset and weights."""
        return self.offset is None and self.class_weights is None

    def __post_init__(self) -> None:
        for name in ("offset", "class_weights"):
            given = getattr(self, name)
            if given is not None:
                # Numbers of Python are read in full, which torch's default dtype would not do.
                object.__setattr__(self, name, torch.as_tensor(given, dtype=torch.float64, device="cpu"))

    def check_targets(self, targets: Tensor) -> None:
        """Rows must be distributions, and there must be as many classes as offsets and weights."""
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
        """Return the probabilities minus the target, for each class with its weight.

        Rows sum to zero. Of the class with the largest target the sum of the others is taken: where its probability is
        close to 1, the difference would keep few digits.
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
        """Product with ``diag(p) - p p^T``.

        Rows sum to zero, and the entry of the likeliest class is taken from that: where its probability is close to 1,
        the difference would keep few digits.
        """
        p = torch.softmax(self._adjusted(logits), dim=1)
        product = p * (direction - (p * direction).sum(dim=1, keepdim=True))
        top = p.argmax(dim=1, keepdim=True)
        product = product.scatter(1, top, 0.0)
        product = product.scatter(1, top, -product.sum(dim=1, keepdim=True))
        return self._weighted(targets).sum(dim=1, keepdim=True) * product

    def mean_hessian(self, logits: Tensor, targets: Tensor, shares: Tensor) -> Tensor:
        """One product of matrices, where a loop over a thousand classes would take minutes.

        Rows sum to zero, and the diagonal is taken from that, as in :meth:`curvature`.
        """
        p = torch.softmax(self._adjusted(logits), dim=1)
        pairs = ((shares * self._weighted(targets).sum(dim=1)).unsqueeze(1) * p).T @ p
        pairs = pairs.fill_diagonal_(0.0)
        return torch.diag(pairs.sum(dim=1)) - pairs

    def curvature_along(self, logits: Tensor, targets: Tensor, axes: Tensor) -> Tensor:
        """Variances of the axes under the probabilities, from the entry of the likeliest class."""
        p = torch.softmax(self._adjusted(logits), dim=1)
        top = p.argmax(dim=1, keepdim=True)
        # What is left is small where the class is all but sure, and so is all that is subtracted.
        p, start = p.scatter(1, top, 0.0), axes[top.squeeze(1)]
        mass, mean = p.sum(dim=1, keepdim=True), p @ axes
        variance = p @ axes.square() - 2 * start * mean + start.square() * mass - (mean - start * mass).square()
        return self._weighted(targets).sum(dim=1, keepdim=True) * variance.clamp(min=0)

    def peaks(self, logits: Tensor, targets: Tensor) -> Peaks:
        """The likeliest class against the others, and what these have among themselves."""
        p = torch.softmax(self._adjusted(logits), dim=1)
        top = p.argmax(dim=1, keepdim=True)
        wrong = p.scatter(1, top, 0.0)
        mass = wrong.sum(dim=1, keepdim=True)
        others = wrong / mass.clamp(min=torch.finfo(p.dtype).tiny)
        mass = self._weighted(targets).sum(dim=1, keepdim=True) * mass
        return Peaks(mass * p.gather(1, top), (-others).scatter(1, top, 1.0), Flanks(mass, others))

    def divergence(self, logits: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
        """That of the logarithm of the sum of exponentials; of the target only its total weight enters."""
        return self.divergence_along(logits - reference, reference, targets)

    def divergence_along(self, step: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
        """The same of a step, to its last digit."""
        return self._weighted(targets).sum(dim=1) * _cumulant(torch.log_softmax(self._adjusted(reference), dim=1), step)

    def dual_value(self, dual: Tensor, targets: Tensor) -> Tensor:
        """Entropy of the distribution ``u + y``."""
        weighted = self._weighted(targets)
        mass = weighted.sum(dim=1)
        q = (dual + weighted) / mass.unsqueeze(1)
        value = -mass * torch.special.xlogy(q.clamp(min=0), q.clamp(min=0)).sum(dim=1)
        if self.offset is not None:
            value = value + dual @ cast(Tensor, self.offset).to(dual)
        slack = 1e-12  # What the rounding of a sum of probabilities may be.
        inside = (q.min(dim=1).values >= -slack) & ((q.sum(dim=1) - 1).abs() <= slack * q.shape[1])
        return torch.where(inside, value, -torch.inf)

    def balance(self, dual: Tensor, targets: Tensor, shares: Tensor) -> Tensor:
        """Scale down classes with too much probability, and give what is freed to those with too little."""
        weighted, share = self._weighted(targets), shares.unsqueeze(1)
        mass = dual + weighted
        have, want = (share * mass).sum(dim=0), (share * weighted).sum(dim=0)
        kept = mass * torch.where(have > want, want / have, 1)
        lack = (want - have).clamp(min=0)
        freed = (mass - kept).sum(dim=1, keepdim=True)
        return torch.where(lack.sum() > 0, kept + freed * lack / lack.sum() - weighted, dual)

    def _adjusted(self, logits: Tensor) -> Tensor:
        return logits if self.offset is None else logits + cast(Tensor, self.offset).to(logits)

    def _weighted(self, targets: Tensor) -> Tensor:
        return targets if self.class_weights is None else targets * cast(Tensor, self.class_weights).to(targets)

    def unattained(self, targets: Tensor) -> str | None:
        """A class without samples has a logit that falls for ever."""
        absent = torch.nonzero(targets.sum(dim=0) == 0).flatten().tolist()
        return f"class {absent[0]} has no samples, and its bias falls without bound" if absent else None

    def closed_form(self, groups: Groups) -> Factors | None:
        r"""Simplex ETF for balanced classes, with hard or smoothed labels.

        The logits of class k are :math:`s (e_k - 1/K)` with :math:`s = \log(1/q' - K + 1)` where :math:`q' < 1/K`,
        :math:`q' = \sqrt{n\lambda_W\lambda_H} + \delta/K`, the probability of each wrong class. Both terms are divided
        by the sum of a row of the targets, which that of a float32 table misses 1 by.
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
    r"""Sum over the classes of the logistic loss with targets in [0, 1]: each class is a yes or no of its own.

    .. math:: \sum_k \log(1 + e^{z_k}) - y_k z_k

    ``torch.nn.functional.binary_cross_entropy_with_logits`` summed over classes.
    """

    short_name = "BCE"
    exchangeable = True

    def unattained(self, targets: Tensor) -> str | None:
        """A label that every sample has, or none, is the bias's alone."""
        extreme = (targets == 0).all(dim=0) | (targets == 1).all(dim=0)
        labels = torch.nonzero(extreme).flatten().tolist()
        return f"all or no samples have label {labels[0]}, and its bias grows without bound" if labels else None

    def check_targets(self, targets: Tensor) -> None:
        """Targets must lie in [0, 1]."""
        if bool((targets < 0).any()) or bool((targets > 1).any()):
            raise UserError(
                "targets must lie between 0 and 1 for binary cross-entropy, got values between "
                f"{float(targets.min()):.6g} and {float(targets.max()):.6g}."
            )

    def value(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Evaluate the loss of each row."""
        return (-logsigmoid(-logits) - targets * logits).sum(dim=1)

    def residual(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the probabilities minus the target, without the difference of the two where the target is 0 or 1."""
        return (1 - targets) * torch.sigmoid(logits) - targets * torch.sigmoid(-logits)

    def curvature(self, logits: Tensor, targets: Tensor, direction: Tensor) -> Tensor:
        """Product with ``diag(p (1 - p))``."""
        return torch.sigmoid(logits) * torch.sigmoid(-logits) * direction

    def mean_hessian(self, logits: Tensor, targets: Tensor, shares: Tensor) -> Tensor:
        """DiagonalInverse."""
        return torch.diag(shares @ (torch.sigmoid(logits) * torch.sigmoid(-logits)))

    def curvature_along(self, logits: Tensor, targets: Tensor, axes: Tensor) -> Tensor:
        """A product of matrices."""
        return torch.sigmoid(logits) * torch.sigmoid(-logits) @ axes.square()

    def divergence(self, logits: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
        """Sum over the classes of that of two classes, of which one has the logit zero."""
        return self.divergence_along(logits - reference, reference, targets)

    def divergence_along(self, step: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
        """The same of a step, to its last digit."""
        flat, change = reference.reshape(-1, 1), step.reshape(-1, 1)
        log_p = torch.cat([logsigmoid(-flat), logsigmoid(flat)], dim=1)
        both = torch.cat([torch.zeros_like(change), change], dim=1)
        return _cumulant(log_p, both).view_as(step).sum(dim=1)

    def dual_value(self, dual: Tensor, targets: Tensor) -> Tensor:
        """Sum of binary entropies of ``u + y``."""
        q = dual + targets
        inside = (q >= -1e-12) & (q <= 1 + 1e-12)
        q = q.clamp(0, 1)
        entropy = -torch.special.xlogy(q, q) - torch.special.xlog1py(1 - q, -q)
        return torch.where(inside, entropy, -torch.inf).sum(dim=1)

    def balance(self, dual: Tensor, targets: Tensor, shares: Tensor) -> Tensor:
        """Scale probabilities towards 0 or 1 where their mean is not that of the targets."""
        share = shares.unsqueeze(1) / shares.sum()
        q = dual + targets
        have, want = (share * q).sum(dim=0), (share * targets).sum(dim=0)
        down = torch.where(have > want, want / have, 1)
        up = torch.where(have < want, (1 - want) / (1 - have), 1)
        return torch.where(have < want, 1 - (1 - q) * up, q * down) - targets


def _orthogonal_to_ones(like: Tensor) -> Tensor:
    """Orthonormal basis ``(K, K - 1)`` of the vectors with sum zero, by a reflection."""
    K = like.shape[1]
    axis = like.new_full((K, 1), K**-0.5)
    axis[0] += 1
    reflection = torch.eye(K, dtype=like.dtype, device=like.device) - axis @ axis.T * (2 / axis.square().sum())
    return reflection[:, 1:]


def _cumulant(log_probability: Tensor, change: Tensor) -> Tensor:
    r"""Logarithm of the mean of :math:`e^t` without its linear term, under probabilities in the last dimension."""
    probability = log_probability.exp()
    t = change - (probability * change).sum(dim=1, keepdim=True)
    # The mean of t is zero, so that this is the logarithm of the mean, and every term is non-negative.
    terms = probability * _exponential_excess(t)
    if t.device.type == "cpu" and not bool((t > _LARGE_EXPONENT).any()):  # To ask another device takes longer.
        return torch.log1p(terms.sum(dim=1))
    grown = log_probability + t
    terms = torch.where(t > _LARGE_EXPONENT, grown.clamp(max=_LARGEST_EXPONENT).exp() - probability * (1 + t), terms)
    overflows = (grown > _LARGEST_EXPONENT).any(dim=1)
    return torch.where(overflows, torch.logsumexp(grown, dim=1), torch.log1p(terms.sum(dim=1)))


def _exponential_excess(t: Tensor) -> Tensor:
    """``exp(t) - 1 - t`` to full relative accuracy, of t that is not large."""
    series = torch.full_like(t, _COEFFICIENTS[-1])
    for coefficient in reversed(_COEFFICIENTS[:-1]):
        series.mul_(t).add_(coefficient)
    series.mul_(t).mul_(t)
    return torch.where(t.abs() <= _SERIES_BELOW, series, torch.expm1(t.clamp(max=_LARGE_EXPONENT)) - t)
