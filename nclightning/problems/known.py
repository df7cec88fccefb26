"""The protocol of a problem with a known optimum, which monitors, commands and figures use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from nclightning.problems.orbit import Solution
    from nclightning.problems.rates import Momentum
    from nclightning.problems.spectrum import Eigenvalue

__all__ = ["KnownProblem"]


class KnownProblem(Protocol):
    """A problem whose optimum is known: :class:`nclightning.problems.Problem`, :class:`nclightning.theory.UFMProblem`.

    A point is a head ``weight (K, d)``, ``features (N, d)``, their ``labels (N,)``, which are the groups of the
    samples, and a ``bias (K,)``. Results about points are float64 on the device of the point. A question without an
    answer raises :class:`nclightning.problems.NoAnswer`.
    """

    @property
    def num_classes(self) -> int:
        """K, the outputs of the head."""

    @property
    def num_groups(self) -> int:
        """M, the number of sets of samples with the same target; for hard labels these are the classes."""

    @property
    def num_samples(self) -> int:
        """N."""

    @property
    def feature_dim(self) -> int:
        """The width d of the features."""

    @property
    def lambda_w(self) -> float:
        """Penalty on the head."""

    @property
    def lambda_h(self) -> float:
        """Penalty on the features."""

    @property
    def has_bias(self) -> bool:
        """Whether the head has a bias."""

    @property
    def optimal_value(self) -> float:
        """Global minimum F*."""

    @property
    def optimum_norm(self) -> float:
        """Norm of head, features and bias together, the same for all optima."""

    @property
    def threshold(self) -> float:
        """Least value of ``lambda_w * lambda_h`` for which the optimal logits are zero, up to a bias."""

    @property
    def dimension(self) -> int:
        """Dimension of the optimal set."""

    @property
    def mu(self) -> float:
        """Least nonzero eigenvalue of the Hessian at the optimal set; 0.0 at a threshold."""

    @property
    def smoothness(self) -> float:
        """Largest eigenvalue L of the Hessian at the optimal set."""

    @property
    def error_bound_constant(self) -> float:
        """Least kappa with ``distance <= kappa * |gradient|`` near the optimal set, ``1 / mu`` in the limit."""

    @property
    def best_step(self) -> float:
        """Fixed step ``2 / (mu + L)`` of the fastest local convergence."""

    def contraction(self, step: float | None = None, momentum: float = 0.0, nesterov: bool = False) -> float:
        """Predict the factor of the distance per iteration near the optimal set; None takes the best step."""

    def iterations_per_decade(self, step: float | None = None, momentum: float = 0.0, nesterov: bool = False) -> float:
        """Predict the iterations for a factor of ten of the gap; None takes the best step."""

    def heavy_ball(self, step: float | None = None) -> Momentum:
        """Compute the step and momentum of the heavy-ball method with the fastest local convergence."""

    def nesterov(self, step: float | None = None) -> Momentum:
        """Compute the step and momentum of Nesterov's method with the fastest local convergence."""

    def spectrum(self) -> tuple[Eigenvalue, ...]:
        """List the eigenvalues of the Hessian at the optimal set, ascending."""

    def labels(self, device: torch.device | str | None = None) -> Tensor:
        """Labels ``(N,)`` of the training set, group after group."""

    def check_labels(self, labels: Tensor) -> None:
        """Raise an error unless each group occurs as often as the problem says, with one transfer to the host."""

    def gap(
        self, weight: Tensor, features: Tensor, labels: Tensor, bias: Tensor | None = None, *, check_labels: bool = True
    ) -> Tensor:
        """Evaluate F - F* without cancellation."""

    def distance(
        self, weight: Tensor, features: Tensor, labels: Tensor, bias: Tensor | None = None, *, check_labels: bool = True
    ) -> Tensor:
        """Measure the distance to the optimal set."""

    def nearest_optimum(self, weight: Tensor, features: Tensor, labels: Tensor, bias: Tensor | None = None) -> Solution:
        """Project a point onto the optimal set."""

    def random_optimum(self, generator: torch.Generator | None = None) -> Solution:
        """Draw a member of the optimal set."""

    def divergence(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Bregman divergence ``(B,)`` of the loss of each sample from the optimal logits of its group."""

    def gap_from_moments(
        self, weight: Tensor, means: Tensor, spread: Tensor, divergence: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """Evaluate F - F* from group means, their spread and the mean divergence."""

    def distance_from_moments(
        self, weight: Tensor, means: Tensor, spread: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """Measure the distance from group means and their spread."""
