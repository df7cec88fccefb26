"""Optimality gap and distance to the optimal set of any network as a streaming metric."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nclightning.errors import UserError
from nclightning.functional import ClassStatistics
from nclightning.heads import Head, HeadReader, HeadSource, read_head, weight_shape
from nclightning.metrics.base import without_autocast
from nclightning.metrics.groups import stand_apart
from nclightning.metrics.neural_collapse import NeuralCollapse
from nclightning.theory import UFMProblem

__all__ = ["Optimality"]

_AFFINE = tuple(layer.forward for layer in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))


class Optimality(NeuralCollapse):
    """How far features and head are from the optimum of an unconstrained feature model.

    ``update`` accepts ``features (B, d)`` and ``labels (B,)``; ``compute`` returns float64 scalars ``gap``, F - F*
    without cancellation, ``distance`` to the optimal set, and ``relative_distance``, that divided by the norm of the
    optimum. F is Problem (2) on the features seen; for a network, whose features are not free, F* is a lower bound. No
    feature is kept.

    Args:
        problem: Sizes, loss and penalties; every class must come exactly ``samples_per_class`` times.
        head: The head, as for :class:`nclightning.metrics.NeuralCollapse`, not to change between ``update`` and
            ``compute``. For CE its bias is taken as free.
        **kwargs: Passed to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If the head does not fit, MSE comes without a bias, or ``d < K - 1``; at ``compute``, if classes
            are not balanced.
    """

    divergence: Tensor

    def __init__(self, problem: UFMProblem, head: HeadSource, **kwargs: Any) -> None:
        check_linear(problem.loss, head)
        super().__init__(problem.num_classes, problem.feature_dim, head, measures=("nc1_ratio",), **kwargs)
        self.problem = problem
        self.add_state("divergence", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        stand_apart(self)

    @without_autocast
    def update(self, features: Tensor, labels: Tensor, *, copy: bool = True) -> None:
        """Add a batch.

        Args:
            features: ``(B, d)``.
            labels: ``(B,)`` int64.
            copy: As for :meth:`nclightning.functional.StatisticsBuffer.add`.
        """
        super().update(features, labels, copy=copy)
        reading = self._reading(self.statistics)
        valid = (labels >= 0) & (labels < self.num_classes)
        logits = nn.functional.linear(features.detach().double(), reading.head, reading.bias)
        values = self.problem.divergence(logits, torch.where(valid, labels, 0))
        self.divergence = self.divergence + torch.where(valid, values, 0).sum()

    def compute(self) -> dict[str, Tensor]:
        """Read gap and distance.

        Returns:
            Float64 scalars by name.
        """
        stats = self.checked_statistics()
        check_counts(stats.counts, self.problem.samples_per_class)
        return self.read(stats)

    @without_autocast
    def read(self, stats: ClassStatistics) -> dict[str, Tensor]:
        """Evaluate gap and distance.

        Args:
            stats: Statistics of all features seen.

        Returns:
            As :meth:`compute`.
        """
        reading, spread = self._reading(stats), stats.spreads.sum()
        distance = self.problem.distance_from_moments(reading.head, stats.means, spread, reading.bias)
        mean = self.divergence / self.problem.num_samples
        return {
            "gap": self.problem.gap_from_moments(reading.head, stats.means, spread, mean),
            "distance": distance,
            "relative_distance": distance / self.problem.optimum_norm,
        }

    def merge_states(self, earlier: dict[str, Any]) -> None:
        """Merge states exactly, where torchmetrics would stack them."""
        super().merge_states(earlier)
        self.divergence = self.divergence + earlier["divergence"]


def check_linear(loss: str, head: HeadSource) -> None:
    """Raise unless the optimum of the unconstrained feature model with a head like this can be measured against.

    Args:
        loss: ``"mse"`` or ``"ce"``.
        head: Any, as for :class:`nclightning.metrics.NeuralCollapse`.

    Raises:
        ValueError: With the reason.
    """
    if isinstance(head, nn.Module) and (type(head).forward not in _AFFINE or "forward" in vars(head)):
        raise UserError(
            f"head must be linear, got a {type(head).__name__} with a forward of its own: no optimum is known for it."
        )
    if isinstance(head, HeadReader) and head.form == "probed":
        raise UserError(
            f"head must be linear, got a {type(head.source).__name__} that makes its weight in a forward of its own: "
            "no optimum is known for it."
        )
    if isinstance(head, Head | HeadReader) and head.normalizes:
        raise UserError(f"head must be linear, got the cosine head {head.name!r}: no optimum is known for it.")
    if loss == "mse" and read_head(head).bias is None:
        raise UserError(
            "head must have a bias for loss='mse', whose known optimum has the bias 1/K: take nn.Linear(..., "
            "bias=True), or measure nc_distance, which needs none."
        )
    num_classes, feature_dim = weight_shape(head)
    if feature_dim < num_classes - 1:
        raise UserError(
            f"feature_dim must be at least num_classes - 1 = {num_classes - 1}, got {feature_dim}: with "
            "fewer inputs of the head the optimum is not known, or the gap needs all features at once."
        )


def check_counts(counts: Tensor, samples_per_class: int) -> None:
    """Raise unless classes are balanced.

    Args:
        counts: Samples of each class, ``(K,)``. Transfers to the host.
        samples_per_class: n.

    Raises:
        ValueError: Naming the least and the most.
    """
    if not bool((counts == samples_per_class).all()):
        raise UserError(
            f"every class must come exactly {samples_per_class} times, got between {int(counts.min())} and "
            f"{int(counts.max())}: the closed forms are those of balanced data. The measure nc_distance needs no "
            "balance."
        )
