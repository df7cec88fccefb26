"""Optimality gap and distance to the optimal set of any network as a streaming metric."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from nclightning.errors import UserError
from nclightning.functional import ClassStatistics, ExcessLoss, HeadLoss, StatisticsBuffer, distance_to_collapse
from nclightning.functional.samples import Samples
from nclightning.heads import Head, HeadReader, HeadSource, read_head, weight_shape
from nclightning.metrics.base import without_autocast
from nclightning.metrics.groups import stand_apart
from nclightning.metrics.neural_collapse import NeuralCollapse
from nclightning.theory import UFMProblem

__all__ = ["Optimality", "check_counts", "check_linear", "head_loss", "read_optimality"]

# What is read with fitted penalties.
_FITTED = ("gap", "distance", "relative_distance", "lambda_w", "lambda_h")
_AFFINE = tuple(layer.forward for layer in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))


class Optimality(NeuralCollapse):
    """How far features and head are from the optimum of an unconstrained feature model.

    ``update`` accepts ``features (B, d)`` and ``labels (B,)``; ``compute`` returns float64 scalars ``gap``, F - F*
    without cancellation, ``distance`` to the optimal set, and ``relative_distance``, that divided by the norm of the
    optimum. F is Problem (2) on the features seen; for a network, whose features are not free, F* is a lower bound.
    Nothing that is gathered depends on the penalties, so that they can be fitted to the same features. No feature is
    kept for long.

    Args:
        problem: Sizes, loss and penalties; every class must come exactly ``samples_per_class`` times. Or the loss
            alone, ``"mse"`` or ``"ce"``, which fits the penalties as :func:`read_optimality` does.
        head: The head, as for :class:`nclightning.metrics.NeuralCollapse`; read with the first batch after a reset,
            and not to change before ``compute``. For CE its bias is taken as free.
        **kwargs: Passed to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If the head does not fit, MSE comes without a bias, or ``d < K - 1``; at ``compute``, if classes
            are not balanced.

    Example:
        >>> problem = UFMProblem("ce", num_classes=2, samples_per_class=3, feature_dim=4, lambda_w=0.1, lambda_h=0.1)
        >>> optimum = problem.random_optimum()
        >>> metric = Optimality(problem, optimum.weight)
        >>> metric.update(optimum.features, optimum.labels)
        >>> bool(metric.compute()["relative_distance"] < 1e-14)
        True
    """

    def __init__(self, problem: UFMProblem | Literal["mse", "ce"], head: HeadSource, **kwargs: Any) -> None:
        loss = problem if isinstance(problem, str) else problem.loss
        if loss not in ("mse", "ce"):
            raise UserError(f"problem must be a UFMProblem, 'mse' or 'ce', got {problem!r}.")
        check_linear(loss, head)
        num_classes, dim = weight_shape(head)
        if not isinstance(problem, str):
            num_classes, dim = problem.num_classes, problem.feature_dim
        super().__init__(num_classes, dim, head, measures=("nc1_ratio",), **kwargs)
        self.loss, self.problem = loss, None if isinstance(problem, str) else problem
        self._snapshot: Head | None = None
        for name, value in ExcessLoss.empty(num_classes, dim)._asdict().items():
            # Stacked over processes, then merged: sums around different means cannot be added.
            self.add_state(f"excess_{name}", default=value.clone(), dist_reduce_fx=None)
        stand_apart(self)

    @without_autocast
    def update(self, features: Tensor, labels: Tensor, *, copy: bool = True) -> None:
        """Add a batch.

        Args:
            features: ``(B, d)``.
            labels: ``(B,)`` int64.
            copy: As for :meth:`nclightning.functional.StatisticsBuffer.add`.
        """
        if self._snapshot is None:
            # With the first batch and not when samples are folded, which processes do at different times: to read a
            # head that is spread over them takes all of them.
            self._snapshot = read_head(self._head.get()).snapshot()
        buffer = _Buffer(self.statistics, self._folded_excess, self._head_loss)
        buffer.add(features, labels, self.ignore_index, copy=copy)
        self._set(buffer.statistics)
        self._set_excess(buffer.excess)

    def reset(self) -> None:
        """Forget samples and head."""
        super().reset()
        self._snapshot = None

    def compute(self) -> dict[str, Tensor]:
        """Read gap and distance.

        Returns:
            Float64 scalars by name.
        """
        return self.read(self.checked_statistics())

    @without_autocast
    def read(self, stats: ClassStatistics) -> dict[str, Tensor]:
        """Evaluate gap and distance.

        Args:
            stats: Statistics of all features seen; of several processes only while the states are synchronised.

        Returns:
            As :meth:`compute`.
        """
        return read_optimality(stats, self._excess, self._head_loss(), self.problem)

    def _head_loss(self) -> HeadLoss:
        head = self._snapshot or self._head.get()
        assert head is not None
        return head_loss(self.loss, head, self.means.device)

    @property
    def _folded_excess(self) -> ExcessLoss:
        """Excess loss of the samples that are not kept."""
        return _excess_in(vars(self))

    @property
    def _excess(self) -> ExcessLoss:
        """Excess loss of everything seen, over all processes while the states are synchronised."""
        excess, head = self._folded_excess, self._head_loss()
        if excess.anchors.ndim == 2:
            return _with_kept(excess, self.statistics.kept, head)
        return reduce(lambda one, other: one.merge(other, head), map(ExcessLoss._make, zip(*excess, strict=True)))

    def _set_excess(self, excess: ExcessLoss) -> None:
        for name, value in excess._asdict().items():
            setattr(self, f"excess_{name}", value)

    def _fold(self) -> None:
        excess = self._excess
        super()._fold()
        self._set_excess(excess)

    def merge_states(self, earlier: dict[str, Any]) -> None:
        """Merge states exactly, where torchmetrics would stack them."""
        head, kept = self._head_loss(), earlier["kept"]
        excess = _with_kept(_excess_in(earlier), Samples(tuple(kept[::2]), tuple(kept[1::2])), head)
        excess = excess.merge(self._excess, head)
        super().merge_states(earlier)
        super()._fold()  # They may be folded already.
        self._set_excess(excess)


class _Buffer(StatisticsBuffer):
    """Adds up the excess loss of the samples that are folded."""

    def __init__(self, statistics: ClassStatistics, excess: ExcessLoss, head: Callable[[], HeadLoss]) -> None:
        super().__init__(statistics)
        self.excess, self._head = excess, head

    def fold(self) -> None:
        self.excess = _with_kept(self.excess, self.kept, self._head())
        super().fold()


def _excess_in(states: Mapping[str, Any]) -> ExcessLoss:
    return ExcessLoss(*(states[f"excess_{name}"].double() for name in ExcessLoss._fields))


def _with_kept(excess: ExcessLoss, kept: Samples, head: HeadLoss) -> ExcessLoss:
    for features, labels in zip(kept.features, kept.labels, strict=True):
        excess = excess.add(features, labels, head)
    return excess


def head_loss(loss: Literal["mse", "ce"], head: HeadSource, device: torch.device) -> HeadLoss:
    """Read a head as a loss of features.

    Args:
        loss: ``"mse"`` or ``"ce"``.
        head: As for :class:`nclightning.metrics.NeuralCollapse`.
        device: Of the features.

    Returns:
        Loss and head, float64.
    """
    now = read_head(head)
    bias = None if now.bias is None else now.bias.detach().to(device, torch.float64)
    return HeadLoss(loss, now.weight.detach().to(device, torch.float64), bias)


def read_optimality(
    stats: ClassStatistics, excess: ExcessLoss, head: HeadLoss, problem: UFMProblem | None = None
) -> dict[str, Tensor]:
    """Evaluate gap and distance of balanced classes. Transfers to the host.

    Args:
        stats: Statistics of the features.
        excess: Their loss above that of their class means.
        head: The head.
        problem: With the penalties. None takes those at which the scales of the nearest collapsed configuration
            (:func:`nclightning.functional.distance_to_collapse`) are the optimal ones.

    Returns:
        ``gap``, ``distance`` and ``relative_distance``; with fitted penalties ``lambda_w`` and ``lambda_h``, too, all
        ``nan`` where no penalties make the scales optimal. Float64 scalars.

    Raises:
        ValueError: If classes are not balanced.
    """
    K, n = len(stats.counts), int(stats.counts.max()) if problem is None else problem.samples_per_class
    check_counts(stats.counts, n)
    assert bool((stats.counts == excess.counts).all()), "statistics and excess loss are of different samples"
    values = {}
    if problem is None:
        fitted = distance_to_collapse(stats, head.weight)
        scales = float(fitted.head_scale), float(fitted.feature_scale)
        if not min(scales) > 0 or (head.loss == "mse" and scales[0] * scales[1] >= 1):
            return {name: stats.spreads.new_tensor(math.nan) for name in _FITTED}
        problem = UFMProblem.at_scale(head.loss, K, n, head.weight.shape[1], *scales)
        values = {name: stats.spreads.new_tensor(getattr(problem, name)) for name in ("lambda_w", "lambda_h")}
    logits = linear(stats.means.double(), head.weight, head.bias)
    # Around the optimal logits: around those of the class means, and these around the optimal ones.
    divergence = excess.sums.sum() + n * problem.divergence(logits, torch.arange(K, device=logits.device)).sum()
    spread = stats.spreads.sum()
    distance = problem.distance_from_moments(head.weight, stats.means, spread, head.bias)
    return {
        "gap": problem.gap_from_moments(head.weight, stats.means, spread, divergence / problem.num_samples),
        "distance": distance,
        "relative_distance": distance / problem.optimum_norm,
        **values,
    }


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
