"""What the curvature of F at the optimal set implies: error bound, steps, rates.

Legend in :mod:`nclightning.theory.problem`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nclightning.theory import rates
from nclightning.theory.constants import UFMConstants
from nclightning.theory.rates import DecayRates
from nclightning.theory.spectrum import Eigenvalue, spectrum

__all__ = ["UFMLandscape"]


@dataclass(frozen=True)
class UFMLandscape(UFMConstants):
    """The Hessian of F at the optimal set and what follows from it.

    Arguments and errors as in :class:`nclightning.theory.UFMProblem`.
    """

    def spectrum(self) -> tuple[Eigenvalue, ...]:
        """List the eigenvalues of the Hessian of F at the optimal set, the same at each of its points.

        Returns:
            Entries ``(value, multiplicity, sector)`` by value; multiplicities sum to the number of free variables. The
            zeros number :attr:`dimension`: F is flat along the optimal set and nowhere else. At the threshold
            ``K q = 1`` the optimum is a point and F is flat to second order, not to fourth, along ``d (K - 1)``
            directions, which are zeros, too.
        """
        return spectrum(self)

    @property
    def mu(self) -> float:
        r"""Least curvature of F across the optimal set, the least nonzero eigenvalue; 0.0 at the threshold.

        Towards the threshold it goes like :math:`4 (1 - Kq) \lambda_W\lambda_H / (\lambda_W + \lambda_H)`.
        """
        if self.slack == 0:
            return 0.0
        return next(e.value for e in self.spectrum() if e.value > 0)

    @property
    def smoothness(self) -> float:
        """Largest eigenvalue L of the Hessian at the optimal set; fixed steps below 2/L are stable near it."""
        return self.spectrum()[-1].value

    @property
    def error_bound_constant(self) -> float:
        r"""Limit of the least :math:`\kappa` with :math:`\mathrm{dist} \le \kappa \|\nabla F\|` near the optimal set.

        It is :math:`1/\mu`, approached from points along the slowest mode; infinite at the threshold, where no such
        bound holds. Paper: Eq. (4), Theorems 2 and 4, erratum E5.
        """
        return 1 / self.mu if self.mu > 0 else math.inf

    @property
    def best_step(self) -> float:
        r"""Fixed step :math:`2/(\mu + L)` of the fastest local convergence."""
        return 2 / (self.mu + self.smoothness)

    def contraction(self, step: float) -> float:
        r"""Predict the factor of the distance per iteration of gradient descent near the optimal set.

        .. math:: \max(|1 - t\mu|, |1 - tL|)

        From generic starts; the gap falls by its square. At least 1 from a step of 2/L on, and at the threshold.

        Args:
            step: Fixed step t, in the unit of 1/F.

        Returns:
            Dimensionless factor.

        Raises:
            ValueError: If the step is not positive and finite.
        """
        rates.check_step(step)
        return max(abs(1 - step * self.mu), abs(1 - step * self.smoothness))

    def iterations_per_decade(self, step: float) -> float:
        """Predict the iterations of gradient descent for a factor of ten of the gap, as :meth:`contraction` has it.

        Args:
            step: Fixed step.

        Returns:
            Number of iterations; infinite where the factor is not below 1.

        Raises:
            ValueError: If the step is not positive and finite.
        """
        rates.check_step(step)
        return rates.per_decade(self.mu, self.smoothness, step)

    def decay_rates(self) -> DecayRates:
        r"""Predict exponents of gradient flow near the optimal set.

        A quantity goes like :math:`e^{-\mathrm{rate}\cdot\mathrm{time}}`, where time is the sum of the steps. Gap and
        distance follow from the spectrum. The rates of NC1-NC3 are **heuristic**: the least sum of the eigenvalues of
        modes whose product a quantity contains, for a generic start, found from symmetries and checked in descents in
        33 digits, not proven. It is the exponent in the limit. A faster product of larger amplitude can hide it until
        round-off: in float64 for MSE in a quarter to a third of the cases tried, seldom for CE.
        They are ``nan`` where the metric is not defined (an optimum at zero; NC1 with ``n = 1``) or tends to another
        value than zero (NC2 and NC3 with ``d < K - 1``).

        Returns:
            Exponents in the unit of F.
        """
        return rates.decay_rates(self, self.mu)

    def decay_factors(self, step: float) -> DecayRates:
        """Predict factors per iteration at a fixed step, for the quantities of :meth:`decay_rates`.

        Those of NC1-NC3 are heuristic and for steps of at most 1/L, at which no mode alternates.

        Args:
            step: Fixed step.

        Returns:
            Dimensionless factors.

        Raises:
            ValueError: If the step is not positive and finite.
        """
        return rates.decay_factors(self, step, self.contraction(step))
