"""Neural collapse of features and head as one streaming metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nclightning.errors import UserError
from nclightning.functional import ClassStatistics, StatisticsBuffer
from nclightning.functional.statistics import BetweenWeights, GlobalMean
from nclightning.heads import HeadSource, weight_shape
from nclightning.metrics.base import StreamingMetric, without_autocast
from nclightning.metrics.borrowed import Borrowed
from nclightning.metrics.choice import (
    check_conventions,
    choose_measures,
    need_scatter,
    read_measures,
    reading_of,
)
from nclightning.metrics.groups import stand_apart
from nclightning.metrics.measures import Reading, per_class_values
from nclightning.metrics.states import states_of, statistics_of

__all__ = ["NeuralCollapse"]


class NeuralCollapse(StreamingMetric):
    """Neural collapse of the features seen since the last reset, and of the head on top of them.

    ``update`` accepts ``features (B, d)`` of any floating dtype and ``labels (B,)`` int64; ``compute`` returns a dict
    of scalars by name: ``nc1``, ``nc2`` and ``nc3``, or those in ``measures``. Formulas, sources and values at
    degenerate points are in :mod:`nclightning.functional`. Batches, their order and their split over processes do not
    matter beyond round-off. ``update`` stays on the device: it makes no transfer to the host.

    Args:
        num_classes: K, at least 2.
        feature_dim: d, at least 1.
        head: The head: a module with a weight ``(K, d)``, a convolution with kernels of size 1, a weight, or a pair
            ``(weight, bias)``; read at ``compute`` in eval mode, sharded by ``fully_shard`` or not. None leaves out
            what needs it. Of a cosine head pass the normalised weight, and update with normalised features.
        measures: Names out of :data:`nclightning.metrics.MEASURES`, or ``("all",)``. None takes ``nc1``, ``nc2``,
            ``nc3``. If none of them needs the ``(d, d)`` scatter it is not kept; for ``feature_dim`` above 12288
            the default leaves it out, too, with a warning, and reads ``nc1_ratio`` and ``nc1_cdnv`` for ``nc1``.
        global_mean: Of ``"class"`` means or of ``"sample"``, in ``nc1`` and ``nc1_ratio``.
        between_weights: ``"uniform"`` or ``"count"``, in the same.
        ignore_index: Label of samples to leave out.
        groups: Whether labels say groups of samples with the same target, such as mixed ones, and no classes that rows
            of the head belong to. ``num_classes`` then counts the groups, and what takes a label for a class is left
            out: ``nc3``, and ``nc1``, as group means need not spread in a direction each. None for ``measures`` takes
            ``nc1_ratio``, ``nc1_cdnv`` and ``nc2``.
        dtype: Dtype of the statistics. Float64 by default whatever the features: near collapse float32 sums lose
            the within-class scatter. Trainer precision does not change it.
        **kwargs: Passed to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If an argument is out of range or the head does not fit; at ``compute``, if a label was outside
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
    num_invalid: Tensor
    kept: list[Tensor]

    def __init__(
        self,
        num_classes: int,
        feature_dim: int,
        head: HeadSource | None = None,
        measures: Sequence[str] | None = None,
        global_mean: GlobalMean = "class",
        between_weights: BetweenWeights = "uniform",
        ignore_index: int | None = None,
        groups: bool = False,
        dtype: torch.dtype = torch.float64,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("compute_with_cache", False)  # The head may change without an update.
        super().__init__(**kwargs)
        if num_classes < 2 or feature_dim < 1:
            raise UserError(
                f"num_classes must be at least 2 and feature_dim at least 1, got {num_classes} and {feature_dim}."
            )
        self.num_classes = num_classes
        self.feature_dim = feature_dim
        self.global_mean = global_mean
        self.between_weights = between_weights
        self.ignore_index = ignore_index
        self.groups = groups
        self._head = Borrowed(head)  # Kept out of this module's parameters, too.
        shape = None if head is None else weight_shape(head)
        expected = (shape[0] if groups and shape is not None else num_classes, feature_dim)
        if shape not in (None, expected):
            raise UserError(f"head must have a weight of shape {expected}, got {shape}.")
        self.measures = choose_measures(measures, feature_dim, 0 if shape is None else shape[0], groups)
        self.keeps_scatter = need_scatter(self.measures)
        empty = ClassStatistics.empty(num_classes, feature_dim, dtype=dtype, scatter=self.keeps_scatter)
        check_conventions(global_mean, between_weights)
        states = states_of(empty)
        self._names = tuple(states)
        for name, value in states.items():
            # Stacked over processes, then merged in compute: a sum of centred moments would be wrong.
            self.add_state(name, default=value, dist_reduce_fx=None)
        stand_apart(self, ignore_index, dtype)

    @property
    def statistics(self) -> ClassStatistics:
        """Statistics of everything seen, over all processes while the states are synchronised."""
        return statistics_of({name: getattr(self, name) for name in self._names})

    @without_autocast
    def update(self, features: Tensor, labels: Tensor, *, copy: bool = True) -> None:
        """Add a batch.

        Args:
            features: ``(B, d)``.
            labels: ``(B,)`` int64.
            copy: As for :meth:`nclightning.functional.StatisticsBuffer.add`.
        """
        buffer = StatisticsBuffer(self.statistics)
        buffer.add(features, labels, self.ignore_index, copy=copy)
        self._set(buffer.statistics)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Add a batch and read it alone; see :meth:`update`."""
        self._fold()  # The states are copied each time.
        return super().forward(*args, **kwargs)

    def prepare_sync(self) -> None:
        """Give the states the same shapes on all processes."""
        self._fold()

    def compute(self) -> dict[str, Tensor]:
        """Read the measures, of the head as it is now.

        Returns:
            Scalars by name, in the dtype of the statistics.
        """
        return self.read(self.checked_statistics())

    def checked_statistics(self) -> ClassStatistics:
        """Return the statistics, with one transfer to the host.

        Raises:
            ValueError: If a label was outside ``0..K-1``.
        """
        stats = self.statistics
        if int(stats.num_invalid) > 0:
            raise UserError(
                f"{int(stats.num_invalid)} labels were outside 0..{self.num_classes - 1}. "
                "Set ignore_index if a label marks samples to leave out; else map labels to these classes, before "
                "update or in batch_fn, or measure a head with an output for each class."
            )
        return stats

    def gathered(self) -> ClassStatistics:
        """Return the statistics over all processes, which must all call this.

        Raises:
            ValueError: As :meth:`checked_statistics`.
        """
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, distributed_available=self.distributed_available_fn):
            return self.checked_statistics()

    @without_autocast
    def read(self, stats: ClassStatistics) -> dict[str, Tensor]:
        """Evaluate the measures on statistics, without a transfer to the host.

        Args:
            stats: Statistics of the features.

        Returns:
            As :meth:`compute`.
        """
        return read_measures(self.measures, self._reading(stats))

    @without_autocast
    def per_class(self) -> dict[str, Tensor]:
        """Read what can be told class by class of everything seen by this process, or by all while synchronised.

        Returns:
            Vectors ``(K,)``, ``nan`` for absent classes: ``count``; ``variance``, the mean squared distance from the
            class mean; ``mean_norm`` of the centred mean; ``cdnv`` and ``equiangularity``, means over the other
            classes; with a head ``head_norm`` and ``nc3_cosine``. Of groups what their features tell alone.
        """
        reading = self._reading(self.checked_statistics())
        if not self.groups:
            return per_class_values(reading)
        values = per_class_values(reading._replace(weight=None))
        del values["equiangularity"]
        return values

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw values on a logarithmic axis.

        Args:
            val: Result of ``compute`` or ``forward``, or a sequence of them; None computes.
            ax: Matplotlib axis; None makes one.

        Returns:
            Figure and axis.
        """
        figure, axis = super().plot(val, ax)
        for each in np.ravel(np.asarray(axis)):
            each.set_yscale("log")
        return figure, axis

    def _reading(self, stats: ClassStatistics) -> Reading:
        return reading_of(stats, self._head.get(), self.global_mean, self.between_weights)

    def set_dtype(self, dst_type: Any) -> NeuralCollapse:
        """Change the dtype of the statistics; counts of labels stay integers."""
        self._fold()
        super().set_dtype(dst_type)
        self.num_invalid = self.num_invalid.long()
        self.change_default("num_invalid", torch.zeros_like(self.num_invalid))
        return self

    def _fold(self) -> None:
        self._set(self.statistics.folded)

    def _set(self, stats: ClassStatistics) -> None:
        for name, value in states_of(stats).items():
            if value is not getattr(self, name):  # Of most updates only a few states are new.
                setattr(self, name, value)

    def merge_states(self, earlier: dict[str, Any]) -> None:
        """Merge states exactly, where torchmetrics would stack them."""
        states = statistics_of({name: earlier[name] for name in self._names})
        self._set(states.merge(self.statistics))
