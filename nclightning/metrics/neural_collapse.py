"""NC1, NC2 and NC3 as one streaming metric."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from nclightning.functional import (
    ClassStatistics,
    class_statistics,
    etf_deviation,
    self_duality,
    within_class_variability,
)

__all__ = ["NeuralCollapse"]

_STATES = tuple(field.name for field in fields(ClassStatistics))


class NeuralCollapse(Metric):
    """Neural collapse of the features seen since the last reset, and of the head on top of them.

    ``update`` accepts ``features (B, d)`` of any floating dtype and ``labels (B,)`` int64; ``compute`` returns a dict
    with ``nc1`` and, if a head is known, ``nc2`` and ``nc3``; formulas and values at degenerate points in
    :mod:`nclightning.functional`. Batches, their order and their split over processes do not matter beyond
    round-off. ``update`` stays on the device: it makes no transfer to the host.

    Args:
        num_classes: K, at least 2.
        feature_dim: d, at least 1.
        head: The linear head, or its weight ``(K, d)``, read at ``compute``. None leaves out ``nc2`` and ``nc3``.
        dtype: Dtype of the statistics. Float64 by default whatever the features: near collapse float32 sums lose
            the within-class scatter. Trainer precision does not change it.
        **kwargs: Passed to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If a size is out of range or the head does not fit; at ``compute``, if a label was outside
            ``0..K-1``.

    Example:
        >>> metric = NeuralCollapse(num_classes=2, feature_dim=2, head=torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        >>> metric.update(torch.tensor([[2.0, 0.1], [2.0, -0.1], [-2.0, 0.0]]), torch.tensor([0, 0, 1]))
        >>> metric.compute()["nc3"]
        tensor(0., dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    counts: Tensor
    means: Tensor
    scatter: Tensor
    num_ignored: Tensor

    def __init__(
        self,
        num_classes: int,
        feature_dim: int,
        head: nn.Linear | Tensor | None = None,
        dtype: torch.dtype = torch.float64,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if num_classes < 2 or feature_dim < 1:
            raise ValueError(
                f"num_classes must be at least 2 and feature_dim at least 1, got {num_classes} and {feature_dim}."
            )
        self.num_classes = num_classes
        self.feature_dim = feature_dim
        # A tuple keeps the head out of this module's parameters: the metric reads it, it does not own it.
        self._head = (head,)
        if head is not None and tuple(self._weight.shape) != (num_classes, feature_dim):
            raise ValueError(
                f"head must have a weight of shape {(num_classes, feature_dim)}, got {tuple(self._weight.shape)}."
            )
        empty = ClassStatistics.empty(num_classes, feature_dim, dtype=dtype)
        for name in _STATES:
            # Stacked over processes, then merged in compute: a sum of centred moments would be wrong.
            self.add_state(name, default=getattr(empty, name), dist_reduce_fx=None)

    @property
    def _weight(self) -> Tensor:
        head = self._head[0]
        assert head is not None
        return head.weight.detach() if isinstance(head, nn.Linear) else head.detach()

    @property
    def statistics(self) -> ClassStatistics:
        """Statistics of everything seen, over all processes while the states are synchronised."""
        states = {name: getattr(self, name) for name in _STATES}
        if states["means"].ndim == 2:
            return ClassStatistics(**states)
        parts = [
            ClassStatistics(**{name: state[rank] for name, state in states.items()})
            for rank in range(len(states["means"]))
        ]
        merged = parts[0]
        for part in parts[1:]:
            merged = merged.merge(part)
        return merged

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            features: ``(B, d)``.
            labels: ``(B,)`` int64.
        """
        if features.ndim != 2 or features.shape[1] != self.feature_dim:
            raise ValueError(f"features must have shape (B, {self.feature_dim}), got {tuple(features.shape)}.")
        self._set(self.statistics.merge(class_statistics(features, labels, self.num_classes, self.means.dtype)))

    def compute(self) -> dict[str, Tensor]:
        """Read the metrics.

        Returns:
            Scalars ``nc1`` (and ``nc2``, ``nc3``) in the dtype of the statistics.
        """
        stats = self.statistics
        if int(stats.num_ignored) > 0:
            raise ValueError(
                f"{int(stats.num_ignored)} labels were outside 0..{self.num_classes - 1}. "
                "Pass the right num_classes, or drop these samples before update."
            )
        return self.read(stats)

    def read(self, stats: ClassStatistics) -> dict[str, Tensor]:
        """Evaluate the metrics on statistics, without a transfer to the host.

        Args:
            stats: Statistics of the features.

        Returns:
            As :meth:`compute`.
        """
        values = {"nc1": within_class_variability(stats)}
        if self._head[0] is not None:
            weight = self._weight.to(stats.means)
            values["nc2"] = etf_deviation(weight)
            values["nc3"] = self_duality(stats, weight)
        return values

    def _set(self, stats: ClassStatistics) -> None:
        for name in _STATES:
            setattr(self, name, getattr(stats, name))

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        """Merge states exactly where torchmetrics would stack them (``forward`` and ``merge_state``)."""
        self._set(ClassStatistics(**{name: incoming_state[name] for name in _STATES}).merge(self.statistics))
