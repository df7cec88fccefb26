"""An unconstrained feature model with any convex, smooth loss, any targets and any counts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from nclightning.problems.answers import answers
from nclightning.problems.checks import check_arguments, check_groups, check_point, checked_point, rows_are_classes
from nclightning.problems.description import ARGUMENTS, describe, from_description
from nclightning.problems.frames import one_hot
from nclightning.problems.groups import Groups
from nclightning.problems.loss import Loss
from nclightning.problems.low_rank import find_optimal_set, optimum_for
from nclightning.problems.no_answer import NoAnswer
from nclightning.problems.optimal_set import OptimalSet
from nclightning.problems.optimum import Optimum, find_optimum, multipliers_at_zero
from nclightning.problems.orbit import Orbit, Solution
from nclightning.problems.spectrum import Eigenvalue, spectrum
from nclightning.problems.with_optimum import WithOptimum
from nclightning.problems.wording import one_line

__all__ = ["Problem"]


class Problem(WithOptimum):
    r"""An unconstrained feature model: its optimum, and the distance and gap of any point from it.

    .. math::
        F = \frac1N \sum_i l(W h_i + b, y_{m(i)}) + \frac{\lambda_W}2 \|W\|^2 + \frac{\lambda_H}2 \sum_i \|h_i\|^2
            + \frac{\lambda_b}2 \|b\|^2

    Samples with the same target form a group. A point is given as head ``weight (K, d)``, ``features (N, d)``,
    ``labels (N,)``, the group of each sample (for hard labels its class), and ``bias (K,)``. Results are float64. A
    question without an answer raises :class:`nclightning.problems.NoAnswer`, which says why; :meth:`answers` lists how
    each question is answered.

    Args:
        loss: The loss, a :class:`nclightning.problems.Loss`.
        targets: ``(M, K)``, one row for each group; None or ``"hard"`` for hard labels, where the groups are the
            classes.
        counts: ``(M,)``, the number of samples of each group, 0 or more.
        feature_dim: d, at least 1.
        lambda_w: Penalty on the head, positive.
        lambda_h: Penalty on the features, positive; on the sum over samples, not on their mean.
        bias: ``"none"``, ``"free"``, or a positive number, the penalty :math:`\lambda_b` on the bias.
        tolerance: Largest certified gap of a numerical optimum, relative to the minimum.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import torch
        >>> from nclightning.problems import CrossEntropy, Problem
        >>> problem = Problem(CrossEntropy(), torch.eye(3), [50, 10, 2], feature_dim=4, lambda_w=0.01, lambda_h=0.001)
        >>> optimum = problem.random_optimum()
        >>> bool(problem.gap(*optimum) < 1e-25)
        True
        >>> round(problem.optimal_value, 6)
        0.137515
    """

    def __init__(
        self,
        loss: Loss,
        targets: Tensor | Sequence[Sequence[float]] | Literal["hard"] | None,
        counts: Tensor | Sequence[int],
        feature_dim: int,
        lambda_w: float,
        lambda_h: float,
        bias: Literal["none", "free"] | float = "none",
        tolerance: float = 1e-10,
    ) -> None:
        self.loss = loss
        self.targets, self.counts = check_groups(targets, counts, loss)
        self.feature_dim, self.lambda_w, self.lambda_h = feature_dim, lambda_w, lambda_h
        self.bias, self.tolerance = bias, tolerance
        check_arguments(self)
        self._is_made = True

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse changes: stored results, such as the optimum, would belong to another problem."""
        if getattr(self, "_is_made", False):
            raise AttributeError(f"a Problem does not change: use problem.replace({name}=...).")
        super().__setattr__(name, value)

    def replace(self, **changes: Any) -> Problem:
        """Make a new problem with some arguments changed.

        Args:
            **changes: New values by the names of the arguments.

        Returns:
            The new problem.
        """
        return type(self)(**{name: getattr(self, name) for name in ARGUMENTS} | changes)

    def __repr__(self) -> str:
        """Return one line, for any number of classes."""
        return f"Problem({self.summary()})"

    def summary(self) -> str:
        """Write loss, sizes and penalties on one line."""
        return one_line(self)

    @property
    def num_classes(self) -> int:
        """K, the outputs of the head."""
        return self.targets.shape[1]

    @property
    def num_groups(self) -> int:
        """M, the rows of the targets."""
        return self.targets.shape[0]

    @cached_property
    def has_hard_labels(self) -> bool:
        """Whether the target of group m is row m of the identity."""
        return self.num_groups == self.num_classes and torch.equal(self.targets, one_hot(self.num_classes))

    @cached_property
    def groups_are_classes(self) -> bool:
        """Whether each class has exactly one group, and is the largest entry of its target (hard, smoothed labels)."""
        return rows_are_classes(self.targets)

    @cached_property
    def num_samples(self) -> int:
        """N."""
        return int(self.counts.sum())

    @property
    def lambda_b(self) -> float | None:
        """Penalty on the bias, which is 0.0 for a free bias and None without a bias."""
        return {"none": None, "free": 0.0}[self.bias] if isinstance(self.bias, str) else float(self.bias)

    @property
    def has_bias(self) -> bool:
        """Whether the head has a bias."""
        return self.bias != "none"

    @property
    def strength(self) -> float:
        r""":math:`\rho = \sqrt{\lambda_W \lambda_H}`. The optimal logits depend on the penalties through it only."""
        return math.sqrt(self.lambda_w) * math.sqrt(self.lambda_h)

    @property
    def dimension(self) -> int:
        """Dimension of the optimal set."""
        return self.optimal_set.dimension + self._groups.shift_is_free

    @property
    def samples_per_group(self) -> Tensor:
        """The counts ``(M,)``."""
        return self.counts

    @property
    def bias_argument(self) -> str:
        """The argument ``bias``."""
        return f"bias={self.bias!r}"

    @property
    def rank_in_words(self) -> str:
        """The rank of the optimal logits."""
        return f"{self.convex_optimum.rank}, the rank of the optimal logits,"

    def describe(self) -> dict[str, Any]:
        """Describe the problem by plain values, from which :meth:`from_description` makes it again."""
        return describe(self)

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> Problem:
        """Make a problem from the result of :meth:`describe`, or from the ``class_path`` of a configuration."""
        return from_description(cls, description)

    def value(self, weight: Tensor, features: Tensor, labels: Tensor, bias: Tensor | None = None) -> Tensor:
        """Evaluate F in the dtype of the inputs; differentiable.

        Args:
            weight: Head ``(K, d)``.
            features: ``(N, d)``.
            labels: ``(N,)`` int64, the group of each sample.
            bias: ``(K,)``; None without a bias.

        Returns:
            Scalar.

        Raises:
            ValueError: If a shape does not fit.
        """
        check_point(self, weight, features, labels, bias, labels_too=False)
        logits = Solution(weight, features, labels, bias).logits
        targets = self.targets.to(logits).index_select(0, labels)
        value = self.loss.value(logits, targets).mean()
        value = value + self.lambda_w / 2 * weight.square().sum() + self.lambda_h / 2 * features.square().sum()
        return value + self.lambda_b / 2 * bias.square().sum() if self.lambda_b and bias is not None else value

    @property
    def convex_optimum(self) -> Optimum:
        """The optimum for any number of features that is at least its rank; errors as for :attr:`optimum`."""
        if isinstance(self._found, NoAnswer):
            raise NoAnswer(self._found.question, self._found.reason)
        return self._found

    @cached_property
    def _found(self) -> Optimum | NoAnswer:
        """The optimum, or the reason why there is none. It is kept, since finding it may take long."""
        # Tensors made in inference mode could not be used outside of it later.
        with torch.inference_mode(False):
            try:
                return find_optimum(self._groups, self.tolerance)
            except NoAnswer as missing:
                return missing

    @property
    def optimum(self) -> Optimum:
        """Optimal logits of the groups that have samples, with their certificate. They are computed once.

        Raises:
            NoAnswer: If they cannot be certified, or there are fewer features than their rank and no theorem is known.
        """
        return optimum_for(self.convex_optimum, self.feature_dim)

    @cached_property
    def optimal_value(self) -> float:
        """Global minimum F*."""
        return self.optimum.value

    @property
    def optimum_norm(self) -> float:
        """Euclidean norm of head, features and bias together. It is the same for all optima."""
        factors = self.optimum.factors
        ratio = math.sqrt(self.lambda_h / self.lambda_w)
        square = float(factors.singular.sum()) * (ratio + 1 / ratio)
        return math.sqrt(square + (0.0 if factors.bias is None else float(factors.bias.square().sum())))

    @cached_property
    def optimal_set(self) -> OptimalSet:
        """The set of all optima, which is one orbit of rotations of the feature space."""
        return find_optimal_set(self.convex_optimum, self.feature_dim, self.lambda_w, self.lambda_h)

    @property
    def threshold(self) -> float:
        r"""Least value of :math:`\lambda_W\lambda_H` for which the optimal logits are zero, up to a bias."""
        return float(torch.linalg.matrix_norm(multipliers_at_zero(self._groups)[0], 2)) ** 2

    def certified_lower_bound(
        self, weight: Tensor, features: Tensor, labels: Tensor, bias: Tensor | None = None
    ) -> float:
        """Compute a lower bound on F* by weak duality, from any point and for every feature dimension.

        The optimum is not needed. If d is at least the rank of the optimum, the bound tends to F* as the point tends to
        an optimum. It is valid up to the rounding of F. Arguments as for :meth:`gap`.
        """
        logits = checked_point(self, weight, features, labels, bias).logits
        residuals = self.loss.residual(logits, self.targets.to(logits).index_select(0, labels))
        means = (self._group_means(rows, labels) for rows in (residuals, logits))
        bound = self.certified_lower_bound_from_residuals(*means)
        assert bound is not None
        return bound

    def certified_lower_bound_from_residuals(self, residuals: Tensor, logits: Tensor | None = None) -> float | None:
        """Compute a lower bound on F* from predictions alone.

        Args:
            residuals: ``(M, K)``: for each group the mean over its samples of the loss's gradient in the logits (for
                cross-entropy, probabilities minus target). It can be accumulated batch by batch.
            logits: ``(M, K)``: for each group the mean logits, bias included. Only a loss without a ``dual_value``
                needs them.

        Returns:
            The bound; None for a loss without a ``dual_value`` if no logits are given.
        """
        bound = self.lower_bound_from_means(residuals.cpu(), None if logits is None else logits.cpu())
        return None if bound is None else float(bound)

    def lower_bound_from_means(self, residuals: Tensor, logits: Tensor | None = None) -> Tensor | None:
        """Compute the bound of :meth:`certified_lower_bound_from_residuals` without a transfer to the host.

        The exception is a loss without a ``dual_value`` and with a free bias: it needs transfers.

        Returns:
            Float64 scalar on the device of ``residuals``, or None.
        """
        index = self._present_index.to(residuals.device)
        groups = self._groups.to(residuals.device)
        bound = groups.lower_bound(residuals.detach().double().index_select(0, index))
        if bound is not None or logits is None:
            return bound
        return groups.lower_bound_at(logits.detach().double().index_select(0, index))

    def spectrum(self) -> tuple[Eigenvalue, ...]:
        """List the eigenvalues of the Hessian of F at the optimal set.

        Returns:
            Entries ``(value, multiplicity, sector)`` in ascending order. The multiplicities sum to the number of
            variables. The number of zeros is :attr:`dimension`, except at a threshold, where F is flat to second order
            along more directions.

        Raises:
            NoAnswer: If the optimum is not known, or the problem is too large.
        """
        return self._spectrum

    @cached_property
    def _spectrum(self) -> tuple[Eigenvalue, ...]:
        with torch.inference_mode(False):
            return spectrum(self.optimal_set)

    def orbit(self, device: torch.device) -> Orbit:
        """Return the optimal set for points on a device. It is moved there once."""
        found = self._orbits.get(device)
        if found is None:
            found = self._orbit.to(device)
            # Tensors of a FakeTensorMode cannot be used outside of it.
            if not found.is_fake:
                self._orbits[device] = found
        return found

    @cached_property
    def _orbit(self) -> Orbit:
        # Tensors made in inference mode could not be used outside of it later.
        with torch.inference_mode(False):
            return self.optimal_set.orbit(self.present)

    @cached_property
    def _orbits(self) -> dict[torch.device, Orbit]:
        return {}

    def __getstate__(self) -> dict[str, Any]:
        """Pickle everything except the copies of the optimal set on devices."""
        return {name: value for name, value in vars(self).items() if name != "_orbits"}

    def answers(self) -> dict[str, str | NoAnswer]:
        """List how each question is answered.

        For each question the value is ``"closed form"``, ``"numerical"`` (to round-off, with a certificate),
        ``"bound"``, or the :class:`NoAnswer` that would be raised.
        """
        return answers(self)

    @cached_property
    def present(self) -> Tensor:
        """Bool ``(M,)``: True for the groups that have samples. The optimum concerns these groups only."""
        return self.counts > 0

    @cached_property
    def _present_index(self) -> Tensor:
        return torch.nonzero(self.present).flatten()

    @cached_property
    def _groups(self) -> Groups:
        present = self.present
        return Groups(
            self.loss,
            self.targets[present],
            self.counts[present].double(),
            self.strength,
            self.lambda_b,
        )

    def _group_means(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Compute the mean of the rows of each group ``(M, ..)``; zero for a group without samples."""
        counts = self.counts.to(rows).clamp(min=1).unsqueeze(1)
        return rows.new_zeros(self.num_groups, rows.shape[1]).index_add_(0, labels, rows) / counts
