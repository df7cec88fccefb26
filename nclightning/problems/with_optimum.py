"""The base class of problems: gap, distance and rates, from an optimal set and its spectrum."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from nclightning.problems.checks import check_labels, checked_moments, checked_point
from nclightning.problems.no_answer import NoAnswer
from nclightning.problems.orbit import Orbit, Solution
from nclightning.problems.rates import Momentum, Rates, decay_exponent

if TYPE_CHECKING:
    from nclightning.problems.spectrum import Eigenvalue

__all__ = ["WithOptimum"]

# Exponents within this distance are taken for equal: rounding changes a double root by about the square root of eps.
_EQUALLY_SLOW = 1e-7


class WithOptimum(ABC):
    """A problem with a known optimal set: it compares points with the set, and predicts descent near it.

    Results are float64 and on the device of the point.
    """

    # Whether a bias may be given with moments although the problem has none.
    _ignores_bias: ClassVar[bool] = False
    feature_dim: int

    if TYPE_CHECKING:  # Not abstract at run time: a dataclass would use the properties as defaults of its fields.

        @property
        def num_classes(self) -> int:
            """K."""

        @property
        def num_groups(self) -> int:
            """M."""

        @property
        def num_samples(self) -> int:
            """N."""

        @property
        def dimension(self) -> int:
            """Dimension of the optimal set."""

        @property
        def has_bias(self) -> bool:
            """Whether the head has a bias."""

    @property
    @abstractmethod
    def samples_per_group(self) -> int | Tensor:
        """Number of samples of each group: one number for all, or ``(M,)``."""

    @property
    @abstractmethod
    def bias_argument(self) -> str:
        """The argument that decides about the bias, as the user typed it, for messages."""

    @property
    @abstractmethod
    def rank_in_words(self) -> str:
        """Least number of features for which the optimal logits are unique, in words, for messages."""

    @property
    def moments_take_bias(self) -> bool:
        """Whether a bias may be given with moments."""
        return self.has_bias or self._ignores_bias

    @abstractmethod
    def orbit(self, device: torch.device) -> Orbit:
        """Return the optimal set for points on a device."""

    @abstractmethod
    def spectrum(self) -> tuple[Eigenvalue, ...]:
        """List the eigenvalues of the Hessian of F at the optimal set."""

    def labels(self, device: torch.device | str | None = None) -> Tensor:
        """Return the labels ``(N,)`` of the training set, group after group: ``0, .., 0, 1, .., 1, ..``."""
        groups, counts = torch.arange(self.num_groups, device=device), self.samples_per_group
        counts = counts.to(groups.device) if isinstance(counts, Tensor) else counts
        return groups.repeat_interleave(counts, output_size=self.num_samples)

    def check_labels(self, labels: Tensor) -> None:
        """Raise an error unless each group occurs as often as the problem says, with one transfer to the host.

        Args:
            labels: ``(N,)`` int64.

        Raises:
            ValueError: If labels are not int64, out of range, or do not have the counts of the problem.
        """
        check_labels(self, labels)

    def gap(
        self, weight: Tensor, features: Tensor, labels: Tensor, bias: Tensor | None = None, *, check_labels: bool = True
    ) -> Tensor:
        r"""Evaluate :math:`F - F^*` without subtracting the two.

        The gap is computed as a sum of squares and Bregman divergences. Its relative error is about
        :math:`\epsilon\|x\|\sqrt{L/\mathrm{gap}}`. The plain difference would be noise below :math:`\epsilon F`. The
        result is non-negative, except with fewer features than the rank of the optimal logits, where round-off may make
        it negative.

        Args:
            weight: Head ``(K, d)``.
            features: ``(N, d)``.
            labels: ``(N,)`` int64, the group of each sample, in any order. Their counts must be those of the problem.
            bias: ``(K,)``; None for a problem without one.
            check_labels: False skips the check of the counts, which needs a transfer to the host. Use it for labels
                that :meth:`check_labels` has accepted.

        Returns:
            Scalar.

        Raises:
            ValueError: If the point does not fit the problem.
            NoAnswer: If the optimum is not known.
        """
        point = checked_point(self, weight, features, labels, bias, labels_too=check_labels)
        orbit = self.orbit(features.device)
        if orbit.is_cut:
            return orbit.expanded_gap(point)
        return orbit.gap(orbit.moments(point), orbit.divergence(point.logits, labels).mean())

    def distance(
        self, weight: Tensor, features: Tensor, labels: Tensor, bias: Tensor | None = None, *, check_labels: bool = True
    ) -> Tensor:
        r"""Measure the Euclidean distance to the optimal set, from the residual of the projection.

        The relative error is about :math:`\epsilon\|x\|/\mathrm{dist}`. Arguments and errors as for :meth:`gap`.
        """
        point = checked_point(self, weight, features, labels, bias, labels_too=check_labels)
        orbit = self.orbit(features.device)
        return orbit.distance(orbit.moments(point))

    def nearest_optimum(self, weight: Tensor, features: Tensor, labels: Tensor, bias: Tensor | None = None) -> Solution:
        """Project a point onto the optimal set. If several members are nearest, one of them is returned.

        Arguments and errors as for :meth:`gap`.

        Returns:
            Member of the optimal set, with rows in the order of ``labels``.
        """
        point = checked_point(self, weight, features, labels, bias)
        orbit = self.orbit(features.device)
        return self._solution(orbit, *orbit.nearest(orbit.moments(point)), point.labels)

    def random_optimum(self, generator: torch.Generator | None = None) -> Solution:
        """Draw a member of the optimal set, uniformly under rotations of the feature space.

        Args:
            generator: Source of randomness; the result is on its device. None uses torch's global CPU generator.

        Returns:
            Member of the optimal set, with labels in the order of :meth:`labels`.

        Raises:
            NoAnswer: If the optimum is not known.
        """
        size = self.num_classes, self.feature_dim
        device = torch.device("cpu") if generator is None else generator.device
        noise = torch.randn(size, dtype=torch.float64, device=device, generator=generator)
        orbit = self.orbit(noise.device)
        return self._solution(orbit, *orbit.random(noise), self.labels(noise.device))

    def divergence(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the Bregman divergence of each sample's loss from the optimal logits of its group.

        Its mean is the only part of the gap that the moments of the features do not determine.

        Args:
            logits: ``(B, K)``, bias included.
            labels: ``(B,)`` int64, the group of each sample.

        Returns:
            Non-negative ``(B,)``; 0 at the optimal logits. Errors as for :meth:`gap_from_moments`.
        """
        return self._whole_orbit("divergence", logits.device).divergence(logits.detach().double(), labels)

    def gap_from_moments(
        self, weight: Tensor, means: Tensor, spread: Tensor, divergence: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """Evaluate F - F* as :meth:`gap` does, from moments of the features, so that the features need not be stored.

        Args:
            weight: Head ``(K, d)``.
            means: Mean feature of each group ``(M, d)``.
            spread: Sum of the squared distances of all samples from the means of their groups.
            divergence: Mean of :meth:`divergence` over all samples.
            bias: ``(K,)``; needed only if the problem penalizes it. Otherwise it enters through the divergence only.

        Returns:
            Scalar.

        Raises:
            ValueError: If a shape does not fit.
            NoAnswer: If the optimum is not known, or there are so few features that its logits are not unique.
        """
        orbit = self._whole_orbit("gap_from_moments", weight.device)
        point = checked_moments(self, weight, means, spread, bias, needs_bias=orbit.lambda_b > 0)
        return orbit.gap(orbit.only_present(point), divergence.detach().double())

    def distance_from_moments(
        self, weight: Tensor, means: Tensor, spread: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """Measure the distance to the optimal set from moments, with arguments as for :meth:`gap_from_moments`.

        If the problem has a bias, it must be given.
        """
        point = checked_moments(self, weight, means, spread, bias, needs_bias=self.has_bias)
        orbit = self.orbit(weight.device)
        return orbit.distance(orbit.only_present(point))

    @cached_property
    def rates(self) -> Rates:
        """Error bound and rates of gradient descent near the optimal set."""
        entries = self.spectrum()
        # At a threshold there are more flat directions than the dimension of the set.
        at_threshold = sum(each.multiplicity for each in entries if each.value <= 0) > self.dimension
        return Rates(0.0 if at_threshold else next(e.value for e in entries if e.value > 0), entries[-1].value)

    @property
    def mu(self) -> float:
        """Least nonzero eigenvalue of the Hessian at the optimal set; 0.0 at a threshold."""
        return self.rates.mu

    @property
    def smoothness(self) -> float:
        """Largest eigenvalue L of the Hessian at the optimal set. Fixed steps below 2/L are stable near it."""
        return self.rates.smoothness

    @property
    def error_bound_constant(self) -> float:
        r"""Least :math:`\kappa` with :math:`\mathrm{dist} \le \kappa \|\nabla F\|` near the optimal set, in the limit.

        It is :math:`1/\mu`. Points along the slowest mode approach it. It is infinite at a threshold, where there is no
        such bound. Paper: Eq. (4), Theorems 2 and 4, erratum E5.
        """
        return self.rates.error_bound_constant

    @property
    def best_step(self) -> float:
        r"""The fixed step with the fastest local convergence, :math:`2/(\mu + L)`."""
        return self.rates.best_step

    def contraction(self, step: float | None = None, momentum: float = 0.0, nesterov: bool = False) -> float:
        """Predict the factor of the distance per iteration; see :meth:`nclightning.problems.Rates.contraction`."""
        return self.rates.contraction(step, momentum, nesterov)

    def iterations_per_decade(self, step: float | None = None, momentum: float = 0.0, nesterov: bool = False) -> float:
        """Predict the iterations for a factor of ten of the gap; see :class:`nclightning.problems.Rates`."""
        return self.rates.iterations_per_decade(step, momentum, nesterov)

    def heavy_ball(self, step: float | None = None) -> Momentum:
        """Compute best step and momentum of the heavy ball; see :meth:`nclightning.problems.Rates.heavy_ball`."""
        return self.rates.heavy_ball(step)

    def nesterov(self, step: float | None = None) -> Momentum:
        """Compute the best step and momentum of Nesterov's method; see :meth:`nclightning.problems.Rates.nesterov`."""
        return self.rates.nesterov(step)

    def slowest_mode(self, step: float | None = None, momentum: float = 0.0, nesterov: bool = False) -> Eigenvalue:
        """Find the eigenvalue whose modes decay most slowly near the optimal set.

        Args:
            step: As for :meth:`contraction`.
            momentum: As for :meth:`contraction`.
            nesterov: As for :meth:`contraction`.

        Returns:
            The entry of the spectrum. If several are equally slow, the one with the least eigenvalue.
        """
        least = self.rates.exponent(step, momentum, nesterov)
        step = self.best_step if step is None else step
        entries = self.spectrum()
        if self.mu == 0:
            return entries[0]
        slow = least + _EQUALLY_SLOW
        return next(e for e in entries if e.value > 0 and decay_exponent(step * e.value, momentum, nesterov) <= slow)

    def _whole_orbit(self, question: str, device: torch.device) -> Orbit:
        """Return the optimal set; an error if there are too few features to work with moments."""
        orbit = self.orbit(device)
        if orbit.is_cut:
            raise NoAnswer(
                question,
                f"feature_dim must be at least {self.rank_in_words} for a gap from moments, got {self.feature_dim}: "
                "with fewer, the optimal logits are not unique, and the gap needs all samples. Use gap.",
            )
        return orbit

    def _solution(self, orbit: Orbit, weight: Tensor, means: Tensor, labels: Tensor) -> Solution:
        """Make a point from head and mean features of an optimum, and labels."""
        bias = torch.zeros_like(weight[:, 0]) + orbit.bias if self.has_bias and orbit.bias is not None else None
        return Solution(weight, means.index_select(0, orbit.own(labels)), labels, bias)
