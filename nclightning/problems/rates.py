"""Rates of descent near the optimal set, with and without momentum, from the curvature there."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nclightning.errors import UserError

__all__ = ["Momentum", "Rates", "decay_exponent"]


@dataclass(frozen=True)
class Momentum:
    """A fixed step with momentum, and its rate near the optimal set.

    The iteration is that of ``torch.optim.SGD(params, lr=step, momentum=momentum, nesterov=nesterov)``.

    Attributes:
        step: Fixed step t.
        momentum: Factor beta of the last displacement, in [0, 1).
        nesterov: Whether gradients are evaluated at the extrapolated points. torch stores these points as parameters.
        contraction: Factor c of the distance per iteration. It is a double root: after k iterations the distance is
            about k c^k.
        iterations_per_decade: Iterations in which the gap falls by a factor of ten, in the limit of many iterations.

    Example:
        >>> from nclightning.problems import Rates
        >>> momentum = Rates(mu=0.01, smoothness=1.0).heavy_ball()
        >>> round(momentum.step, 4), round(momentum.momentum, 4), round(momentum.contraction, 4)
        (3.3058, 0.6694, 0.8182)
    """

    step: float
    momentum: float
    nesterov: bool
    contraction: float
    iterations_per_decade: float


@dataclass(frozen=True)
class Rates:
    r"""Error bound and rates of descent near the optimal set.

    Consider gradient descent with step t and momentum :math:`\beta`, as in :class:`torch.optim.SGD`. The deviation
    along an eigenvector of the Hessian with eigenvalue :math:`\lambda` obeys a recurrence of two terms. Its factor per
    iteration is the root z of larger absolute value of

    .. math::
        z^2 - (1 + \beta - t\lambda) z + \beta = 0, \qquad
        z^2 - (1 + \beta)(1 - t\lambda) z + \beta (1 - t\lambda) = 0,

    where the second equation is that of Nesterov's momentum. In both the root is largest at one end of the spectrum, so
    that ``mu`` and ``smoothness`` determine the rate. Motion along the optimal set has the roots 1 and
    :math:`\beta`; it comes to rest and does not affect the distance. Polyak (1964); Lessard, Recht and Packard (2016).

    Attributes:
        mu: Least nonzero eigenvalue of the Hessian at the optimal set; 0.0 at a threshold.
        smoothness: Largest eigenvalue L of the Hessian there.

    Raises:
        ValueError: If they are not in this order, or not finite.

    Example:
        >>> from nclightning.problems import Rates
        >>> rates = Rates(mu=0.01, smoothness=1.0)
        >>> [round(each.contraction, 4) for each in (rates.nesterov(), rates.heavy_ball())]
        [0.8847, 0.8182]
        >>> round(rates.contraction(), 4), round(rates.contraction(1.0, momentum=0.9), 4)
        (0.9802, 0.9487)
    """

    mu: float
    smoothness: float

    def __post_init__(self) -> None:
        """Check the eigenvalues."""
        if not (0 <= self.mu <= self.smoothness < math.inf and self.smoothness > 0):
            raise UserError(
                "mu and smoothness must be the least nonzero and the largest eigenvalue of the Hessian at a minimum, "
                f"0 <= mu <= smoothness, got {self.mu!r} and {self.smoothness!r}."
            )

    @property
    def error_bound_constant(self) -> float:
        r"""Least kappa with :math:`\mathrm{dist} \le \kappa\|\nabla F\|`, :math:`1/\mu` in the limit."""
        return 1 / self.mu if self.mu > 0 else math.inf

    @property
    def best_step(self) -> float:
        r"""The fixed step with the fastest local convergence without momentum, :math:`2/(\mu + L)`."""
        return 2 / (self.mu + self.smoothness)

    def contraction(self, step: float | None = None, momentum: float = 0.0, nesterov: bool = False) -> float:
        r"""Predict the factor of the distance per iteration; without momentum :math:`\max(|1 - t\mu|, |1 - tL|)`.

        Args:
            step: Fixed step t; None takes the best one without momentum.
            momentum: Factor of the last displacement, in [0, 1).
            nesterov: Whether the momentum is Nesterov's.

        Returns:
            Dimensionless factor. The gap falls by its square.

        Raises:
            ValueError: If the step is not positive and finite, the momentum is out of range, or a momentum is given
                without a step.
        """
        return math.exp(-self.exponent(step, momentum, nesterov))

    def iterations_per_decade(self, step: float | None = None, momentum: float = 0.0, nesterov: bool = False) -> float:
        """Predict the number of iterations in which the gap falls by a factor of ten.

        Arguments and errors as for :meth:`contraction`.

        Returns:
            Number of iterations; infinite if the contraction is not below 1.
        """
        return _decade(self.exponent(step, momentum, nesterov))

    def exponent(self, step: float | None = None, momentum: float = 0.0, nesterov: bool = False) -> float:
        """Compute minus the logarithm of :meth:`contraction`, accurately also for a factor near 1.

        Arguments and errors as for :meth:`contraction`.

        Returns:
            Exponent per iteration; negative where descent diverges.
        """
        if not 0 <= momentum < 1:
            raise UserError(f"momentum must be at least 0 and below 1, got {momentum!r}.")
        if step is None and momentum:
            raise UserError(
                "step is missing: give it together with the momentum, or use heavy_ball() or nesterov(), whose results "
                "include their contraction."
            )
        step = self.best_step if step is None else step
        if not (math.isfinite(step) and step > 0):
            raise UserError(f"step must be positive and finite, got {step!r}. The best one is best_step.")
        ends = step * self.mu, step * self.smoothness
        return min(decay_exponent(curvature, momentum, nesterov) for curvature in ends)

    def heavy_ball(self, step: float | None = None) -> Momentum:
        r"""Compute the step and momentum of the heavy-ball method with the fastest local convergence.

        .. math::
            t = \frac4{(\sqrt L + \sqrt\mu)^2}, \quad
            \beta = \Big(\frac{\sqrt L - \sqrt\mu}{\sqrt L + \sqrt\mu}\Big)^2, \quad
            \mathrm{factor} = \sqrt\beta

        No method that uses gradients only has a better factor for all quadratics. Far from the optimal set it may
        diverge where gradient descent does not.

        Args:
            step: A shorter step t; its best momentum is :math:`(1 - \sqrt{t\mu})^2`, the factor
                :math:`1 - \sqrt{t\mu}`.

        Returns:
            Step, momentum and rate.

        Raises:
            ValueError: If the step is longer than the best one or not positive, or at a threshold.
        """
        return self._critical(False, step, 4 / (math.sqrt(self.smoothness) + math.sqrt(self.mu)) ** 2)

    def nesterov(self, step: float | None = None) -> Momentum:
        r"""Compute the step and constant momentum of Nesterov's method with the fastest local convergence.

        .. math::
            t = \frac4{3L + \mu}, \quad \beta = \frac{1 - \sqrt{t\mu}}{1 + \sqrt{t\mu}}, \quad
            \mathrm{factor} = 1 - \sqrt{t\mu}

        Args:
            step: A shorter step t, with the same formula for the momentum. The textbook step 1/L has the factor
                :math:`1 - \sqrt{\mu/L}`, and converges on every convex function whose curvature is between mu and L.

        Returns:
            Step, momentum and rate.

        Raises:
            ValueError: If the step is longer than the best one or not positive, or at a threshold.
        """
        return self._critical(True, step, 4 / (3 * self.smoothness + self.mu))

    def _critical(self, nesterov: bool, step: float | None, longest: float) -> Momentum:
        """Compute the momentum for which the slowest mode has a double root."""
        if not self.mu > 0:
            raise UserError("mu is 0: at a threshold nothing falls linearly, and no momentum is the best one.")
        step = longest if step is None else step
        if not 0 < step <= longest:
            raise UserError(f"step must be positive and at most the best one, {longest:.7g}, got {step!r}.")
        root = min(1.0, math.sqrt(step) * math.sqrt(self.mu))
        momentum = (1 - root) / (1 + root) if nesterov else (1 - root) ** 2
        exponent = -math.log1p(-root) if root < 1 else math.inf
        return Momentum(step, momentum, nesterov and momentum > 0, 1 - root, _decade(exponent))


def decay_exponent(curvature: float, momentum: float = 0.0, nesterov: bool = False) -> float:
    """Compute the exponent with which a mode decays per iteration, accurately also for slow modes.

    Args:
        curvature: Step times eigenvalue, at least 0.
        momentum: In [0, 1).
        nesterov: Whether the momentum is Nesterov's.

    Returns:
        ``-log |z|`` of the larger root z; negative where the mode grows.
    """
    # With w = 1 - z both equations are w^2 - middle w + curvature = 0. Their roots are complex between low and high.
    if nesterov:
        low, high, scale = ((1 - momentum) / (1 + momentum)) ** 2, 1.0, 1 + momentum
        total, middle = (1 + momentum) * (1 - curvature), 1 - momentum + (1 + momentum) * curvature
    else:
        root = math.sqrt(momentum)
        low, high, scale = ((1 - momentum) / (1 + root)) ** 2, (1 + root) ** 2, 1.0
        total, middle = 1 + momentum - curvature, 1 - momentum + curvature
    if low < curvature < high:
        return -(math.log(momentum) + (math.log1p(-curvature) if nesterov else 0.0)) / 2
    separation = scale * math.sqrt(abs(low - curvature)) * math.sqrt(abs(high - curvature))
    if total < 0:
        return -math.log((separation - total) / 2)
    nearest = 2 * curvature / (middle + separation)  # The smaller w. Computed as 1 - z it would lose digits.
    return -math.log1p(-nearest) if nearest < 1 else math.inf


def _decade(exponent: float) -> float:
    """Number of iterations in which the square of the distance falls by a factor of ten."""
    return math.log(10) / 2 / exponent if exponent > 0 else math.inf
