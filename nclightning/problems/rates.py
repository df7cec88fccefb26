"""What the curvature at the optimal set implies for descent."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nclightning.errors import UserError

__all__ = ["Rates"]


@dataclass(frozen=True)
class Rates:
    r"""Error bound and speed of gradient descent near the optimal set.

    Attributes:
        mu: Least nonzero eigenvalue of the Hessian there, 0.0 at a threshold.
        smoothness: Largest eigenvalue L.
    """

    mu: float
    smoothness: float

    @property
    def error_bound_constant(self) -> float:
        r"""Limit :math:`1/\mu` of the least kappa with :math:`\mathrm{dist} \le \kappa\|\nabla F\|`."""
        return 1 / self.mu if self.mu > 0 else math.inf

    @property
    def best_step(self) -> float:
        r"""Fixed step :math:`2/(\mu + L)` of the fastest local convergence."""
        return 2 / (self.mu + self.smoothness)

    def contraction(self, step: float | None = None) -> float:
        r"""Predict the factor of the distance per iteration, :math:`\max(|1 - t\mu|, |1 - tL|)`.

        Args:
            step: Fixed step t; None takes the best one.

        Returns:
            Dimensionless factor; the gap falls by its square.

        Raises:
            ValueError: If the step is not positive and finite.
        """
        step = self.best_step if step is None else step
        if not (math.isfinite(step) and step > 0):
            raise UserError(f"step must be positive and finite, got {step!r}. The best one is best_step.")
        return max(abs(1 - step * self.mu), abs(1 - step * self.smoothness))

    def iterations_per_decade(self, step: float | None = None) -> float:
        """Predict the iterations for a factor of ten of the gap; infinite where the factor is not below 1.

        Args:
            step: Fixed step; None takes the best one.

        Returns:
            Number of iterations.

        Raises:
            ValueError: If the step is not positive and finite.
        """
        step = self.best_step if step is None else step
        factor = self.contraction(step)
        if not self.mu > 0 or step * self.smoothness >= 2:
            return math.inf
        # The digits of a small step * mu would be lost in 1 - step * mu.
        exponents = (_exponent(step * self.mu), _exponent(step * self.smoothness))
        return math.log(10) / 2 / min(exponents) if factor > 0 else 0.0


def _exponent(x: float) -> float:
    """``-log |1 - x|``, with the digits of a small x."""
    if x == 1:
        return math.inf
    return -math.log1p(-x) if x < 1 else -math.log(x - 1)
