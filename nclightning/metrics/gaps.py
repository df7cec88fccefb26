r"""Gap, distance and certified gap from sums over samples, and fitted penalties.

**Certified gap.** Weak duality gives a lower bound on the minimum F* of the unconstrained feature model from the
residuals of any point (:meth:`nclightning.problems.Problem.certified_lower_bound`). With the objective F of the given
features, ``F - bound >= F - F* >= 0``: the certified gap needs no optimum. If d is at least the rank of the optimum,
the certified gap is of first order in the distance from the optimal set, while F - F* is of second order. So it may be
computed by subtraction: it reaches the rounding of F, ``eps F``, only where the distance itself is of the size of
rounding.

**Fitted penalties.** Unknown penalties are fitted to the scales of head and features. Let
:math:`S = \frac1N \sum_i \langle r_i, W h_i\rangle` with residuals r. The derivative of F in the logarithm of the
scale of the head is :math:`S + \lambda_W \|W\|^2`, and in that of the features
:math:`S + \lambda_H \sum_i \|h_i\|^2`. Both are zero only at :math:`\lambda_W = -S/\|W\|^2` and
:math:`\lambda_H = -S/\sum_i\|h_i\|^2`. At an optimum these are the true penalties, for every loss, targets and counts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from nclightning.errors import UserError
from nclightning.functional import ClassStatistics, ExcessLoss, HeadLoss, distance_to_collapse
from nclightning.functional.linear import ELEMENTS_PER_STEP
from nclightning.metrics.reference import Penalties, Reference
from nclightning.objective import Objective
from nclightning.problems import Loss, NoAnswer, Problem
from nclightning.problems.groups import bias_part
from nclightning.theory import UFMProblem

__all__ = ["Found", "SoftSums", "read_optimality", "read_soft"]

_EXACT, _CERTIFIED = ("gap", "distance", "relative_distance"), ("certified_gap", "certified_bound")
_FITTED = ("lambda_w", "lambda_h")


class Found(NamedTuple):
    """Result of :func:`read_optimality`.

    Attributes:
        values: Float64 scalars by name.
        missing: One sentence that says why gap and distance are ``nan``. None if they are not, if they were not
            requested, or if no penalties fit.
    """

    values: dict[str, Tensor]
    missing: str | None


def read_optimality(stats: ClassStatistics, excess: ExcessLoss, head: HeadLoss, reference: Reference) -> Found:
    """Evaluate gap, distance and certified gap, with transfers to the host.

    Args:
        stats: Statistics of the features of each class or group.
        excess: Excess loss of the same samples.
        head: The loss and the head.
        reference: The problem, or the loss whose problem is that of these samples. If it gives no penalties, they are
            fitted. For balanced classes with a closed form, they are chosen so that the scales of the nearest collapsed
            configuration (:func:`nclightning.functional.distance_to_collapse`) are optimal; this depends on features
            and head alone. Otherwise they are chosen so that no other scale of features or head has a smaller F.

    Returns:
        ``gap``, ``distance``, ``relative_distance``, ``certified_gap`` and ``certified_bound``; with fitted penalties
        also ``lambda_w`` and ``lambda_h``. ``nan`` where a value does not exist.

    Raises:
        ValueError: If a problem was given and the counts of the samples differ from its counts.
    """
    assert bool((stats.counts == excess.counts).all()), "statistics and excess loss are of different samples"
    counts = [int(count) for count in stats.counts.tolist()]
    penalties, fitted, none = reference.given, {}, stats.spreads.new_tensor(math.nan)
    if penalties is None:
        penalties = _fitted(stats, excess, head, reference, counts)
        fitted = {name: none if penalties is None else none.new_tensor(getattr(penalties, name)) for name in _FITTED}
    values = dict.fromkeys(_EXACT, none)
    if excess.residuals.shape[1]:
        values |= dict.fromkeys(_CERTIFIED, none)
    if penalties is None:
        return Found(values | fitted, None)
    problem = reference.problem_of(counts, head, penalties)
    point = _Point(stats, excess, head)
    objective = point.objective(problem)
    if excess.residuals.shape[1] and math.isfinite(float(objective)):
        bound = problem.certified_lower_bound_from_residuals(
            excess.residuals / excess.counts.clamp(min=1).unsqueeze(1), point.logits
        )
        assert bound is not None
        values |= {"certified_gap": objective - bound, "certified_bound": none.new_tensor(bound)}
    missing = None
    try:
        solved = reference.to_solve(problem, counts, head)
        values["distance"] = point.distance(solved)
        values["relative_distance"] = values["distance"] / solved.optimum_norm
        values["gap"] = point.gap(solved)
    except NoAnswer as answer:
        missing = None if reference.exact is False else str(answer)
    return Found(values | fitted, missing)


class _Point:
    """A point of the unconstrained feature model, represented by sums over samples and the head."""

    def __init__(self, stats: ClassStatistics, excess: ExcessLoss, head: HeadLoss) -> None:
        self._head, self._excess, self._counts = head, excess.sums.sum(), stats.counts.double()
        self._means, self._spread = stats.means.double(), stats.spreads.sum().double()
        self.logits = head.logits(self._means)

    @property
    def square_norm(self) -> Tensor:
        """Sum of the squared norms of the features."""
        return self._spread + (self._counts * self._means.square().sum(dim=1)).sum()

    def objective(self, problem: Problem) -> Tensor:
        """Evaluate F, with the loss as the loss of the class means plus the excess loss."""
        head = self._head
        losses = self._excess + (self._counts * problem.loss.value(self.logits, head.targets)).sum()
        objective = Objective(problem.loss, problem.lambda_w, problem.lambda_h, problem.lambda_b or 0.0)
        return objective.combine(
            losses=losses,
            num_samples=problem.num_samples,
            weight_square=head.weight.square().sum(),
            features_square=self.square_norm,
            bias_square=None if head.bias is None else head.bias.square().sum(),
        )

    def distance(self, problem: Problem | UFMProblem) -> Tensor:
        """Evaluate the distance to the optimal set."""
        return problem.distance_from_moments(self._head.weight, self._means, self._spread, self._head.bias)

    def gap(self, problem: Problem | UFMProblem) -> Tensor:
        """Evaluate F - F* without cancellation."""
        present = self._counts.nonzero().squeeze(1)
        # Divergence of the samples from the optimal logits: from the class means, plus that of the class means.
        around = problem.divergence(self.logits[present], present)
        divergence = (self._excess + (self._counts[present] * around).sum()) / problem.num_samples
        moments = self._head.weight, self._means, self._spread, divergence
        if isinstance(problem, UFMProblem):
            return problem.gap_from_moments(*moments)  # A bias enters through the divergence only.
        return problem.gap_from_moments(*moments, self._head.bias)


def _fitted(
    stats: ClassStatistics, excess: ExcessLoss, head: HeadLoss, reference: Reference, counts: list[int]
) -> Penalties | None:
    """Fit the penalties at which the scales are optimal; None if there are none."""
    if reference.has_closed_form(counts, head):
        fitted = distance_to_collapse(stats, head.weight)
        try:
            found = UFMProblem.at_scale(
                reference.name,  # type: ignore[arg-type]
                len(counts),
                counts[0],
                head.weight.shape[1],
                float(fitted.head_scale),
                float(fitted.feature_scale),
            )
        except UserError:
            return None
        return Penalties(found.lambda_w, found.lambda_h)
    slope = excess.slopes.sum() / excess.counts.sum()
    return _of_slope(slope, head, _Point(stats, excess, head).square_norm, reference)


def _of_slope(slope: Tensor, head: HeadLoss, square_norm: Tensor, reference: Reference) -> Penalties | None:
    """Fit the penalties at which no change of scale lowers F; None if there are none."""
    found = float(-slope / head.weight.square().sum()), float(-slope / square_norm)
    return Penalties(*found, reference.lambda_b) if all(0 < each < math.inf for each in found) else None


class SoftSums(NamedTuple):
    r"""Sums over samples with individual targets, from which a certified bound follows.

    Each sample is a group by itself. Let R be the residuals ``(N, K)``, :math:`\kappa = \sqrt{\lambda_W\lambda_H}` and
    :math:`t = \min(1, N\kappa/\|R\|_2)`. Weak duality gives :math:`F^* \ge \frac1N \sum_i g_i(t r_i)`, where g is
    minus the conjugate of the loss; for cross-entropy it is the entropy of :math:`y_i + t r_i`. The factor t is known
    only after the last sample. But g is concave, so that :math:`g_i(t r_i) \ge (1 - t) g_i(0) + t g_i(r_i)`, and the
    two sums do not depend on t. At an optimum t is 1, and the inequality is an equality. The norm of R is the square
    root of the largest eigenvalue of its Gram matrix.

    Attributes:
        gram: :math:`R^\top R` ``(K, K)``.
        residuals: Sum of the residuals ``(K,)``.
        totals: Six sums over samples ``(6,)``: their number, the loss, :math:`g_i(0)`, :math:`g_i(r_i)`,
            :math:`\langle r_i, W h_i\rangle` and :math:`\|h_i\|^2`.
    """

    gram: Tensor
    residuals: Tensor
    totals: Tensor

    @classmethod
    def empty(cls, num_outputs: int) -> SoftSums:
        """Make the sums over no samples, float64."""
        return cls(*(torch.zeros(*size, dtype=torch.float64) for size in ((num_outputs,) * 2, (num_outputs,), (6,))))

    def add(self, features: Tensor, targets: Tensor, loss: Loss, head: HeadLoss) -> SoftSums:
        """Add samples, on their device and without a transfer to the host.

        Args:
            features: ``(B, d)`` of any floating dtype.
            targets: ``(B, K)`` of any floating dtype.
            loss: The loss.
            head: The head.

        Returns:
            The sums over all samples so far, a new object.
        """
        total, size = self, max(ELEMENTS_PER_STEP // features.shape[1], 1)
        for rows, own in zip(torch.split(features.detach(), size), torch.split(targets.detach(), size), strict=True):
            total = total._add(rows.to(head.weight), own.to(head.weight), loss, head)
        return total

    def _add(self, features: Tensor, targets: Tensor, loss: Loss, head: HeadLoss) -> SoftSums:
        """Add one block of samples."""
        logits = head.logits(features)
        residuals, losses = loss.residual(logits, targets), loss.value(logits, targets)
        free, bound = loss.dual_value(torch.zeros_like(targets), targets), loss.dual_value(residuals, targets)
        if free is None or bound is None:
            free, bound = torch.full_like(losses, loss.lower_bound), losses - (logits * residuals).sum(dim=1)
        own = logits if head.bias is None else logits - head.bias
        slopes, squares = (residuals * own).sum(dim=1), features.square().sum(dim=1)
        sums = torch.stack([torch.ones_like(losses), losses, free, bound, slopes, squares]).sum(dim=1)
        return SoftSums(self.gram + residuals.T @ residuals, self.residuals + residuals.sum(dim=0), self.totals + sums)


def read_soft(sums: SoftSums, head: HeadLoss, reference: Reference) -> dict[str, Tensor]:
    """Evaluate the certified gap of samples with individual targets, with transfers to the host.

    Args:
        sums: Sums over the samples.
        head: The head. If it has a bias, the bias has a penalty.
        reference: Loss and penalties. Penalties that it does not give are fitted so that no change of scale lowers F.

    Returns:
        ``certified_gap`` and ``certified_bound``; with fitted penalties also ``lambda_w`` and ``lambda_h``. ``nan``
        where a value does not exist.

    Raises:
        ValueError: If there are no samples, or the loss is not defined for a target.
    """
    count, loss, free, bound, slope, squares = sums.totals.double().tolist()
    if not count:
        raise UserError("there are no samples: call update before compute.")
    if free == -math.inf:
        raise UserError(
            "targets must be rows for which the loss is defined: for 'ce' not negative and not all zero, for 'bce' "
            "between 0 and 1. Got a row that is not."
        )
    none = sums.totals.new_tensor(math.nan, dtype=torch.float64)
    penalties, fitted = reference.given, {}
    if penalties is None:
        penalties = _of_slope(none.new_tensor(slope / count), head, none.new_tensor(squares), reference)
        fitted = {name: none if penalties is None else none.new_tensor(getattr(penalties, name)) for name in _FITTED}
    if penalties is None or not math.isfinite(loss + squares):
        return dict.fromkeys(_CERTIFIED, none) | fitted
    objective = Objective(reference.loss, *penalties).combine(
        losses=loss,
        num_samples=int(count),
        weight_square=float(head.weight.square().sum()),
        features_square=squares,
        bias_square=None if head.bias is None else float(head.bias.square().sum()),
    )
    # The factor makes sure that rounding of the Gram matrix does not raise the bound.
    norm = math.sqrt(max(float(torch.linalg.eigvalsh(sums.gram.double())[-1]), 0.0)) * (1 + 1e-14)
    share = min(1.0, count * penalties.strength / norm) if norm > 0 else 1.0
    lower = ((1 - share) * free + share * bound) / count
    if head.bias is not None:
        lower -= float(bias_part(sums.residuals.double() * (share / count), penalties.lambda_b))
    return {
        "certified_gap": none.new_tensor(objective - lower),
        "certified_bound": none.new_tensor(lower),
        **fitted,
    }
