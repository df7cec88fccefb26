"""Neural collapse of features and head as a torchmetrics class."""

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
    evaluate_measures,
    measure_input,
    need_scatter,
)
from nclightning.metrics.compute_groups import separate_compute_group
from nclightning.metrics.measures import MeasureInput, per_class_values
from nclightning.metrics.states import states_of, statistics_of

__all__ = ["NeuralCollapse"]


class NeuralCollapse(StreamingMetric):
    """Measures of neural collapse for the features since the last reset, and for the current head.

    ``update`` takes ``features (B, d)`` of any floating dtype and ``labels (B,)`` int64. ``compute`` returns a dict of
    scalars by name: ``nc1``, ``nc2`` and ``nc3``, or those in ``measures``. Formulas, sources, ranges and values at
    degenerate points are in :mod:`nclightning.functional`. The split into batches, their order and their split over
    processes change only round-off. ``update`` makes no transfer to the host.

    Args:
        num_classes: K, at least 2.
        feature_dim: d, at least 1.
        head: The head: a module with a weight ``(K, d)``, a convolution with kernels of size 1, a weight, or a pair
            ``(weight, bias)``. ``compute`` uses its current values in eval mode, also if it is sharded by
            ``fully_shard``. None leaves out the measures that need a head. For a cosine head pass the normalised
            weight, and update with normalised features.
        measures: Names out of :data:`nclightning.metrics.MEASURES`, or ``("all",)``. None takes ``nc1``, ``nc2``,
            ``nc3``. The ``(d, d)`` scatter is kept only if one of the measures needs it. For ``feature_dim`` above
            12288 the default is ``nc1_ratio`` and ``nc1_cdnv`` instead of ``nc1``, with a warning.
        global_mean: The mean of ``"class"`` means or of all ``"sample"`` features, in ``nc1`` and ``nc1_ratio``.
        between_weights: ``"uniform"`` or ``"count"`` weights of the classes, in ``nc1`` and ``nc1_ratio``.
        ignore_index: Label of samples to leave out.
        groups: Whether labels number groups of samples with the same target, such as a mixture of classes, instead of
            classes with one row of the head each. ``num_classes`` is then the number of groups. Measures that need
            classes are left out: ``nc3``, which compares each mean with a row of the head, and ``nc1``, since group
            means may be linearly dependent. The default measures are then ``nc1_ratio``, ``nc1_cdnv`` and ``nc2``.
        dtype: Dtype of the statistics. The default is float64 for features of any dtype: near collapse, sums in float32
            lose the within-class scatter. The trainer's precision does not change it.
        **kwargs: Passed to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If an argument is out of range or the head does not fit. Also raised by ``compute``, if a label is
            outside ``0..K-1``.

    Example:
        >>> import torch
        >>> from nclightning.metrics import NeuralCollapse
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
        self._head = Borrowed(head)  # This also keeps the head out of this module's parameters.
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
            # States are stacked over processes and merged in compute. Summing centred moments would be wrong.
            self.add_state(name, default=value, dist_reduce_fx=None)
        separate_compute_group(self, ignore_index, dtype)

    @property
    def statistics(self) -> ClassStatistics:
        """Statistics of all samples since the last reset; of all processes while the states are synchronised."""
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
        """Add a batch, and compute the measures of this batch alone; arguments as for :meth:`update`."""
        self._fold()  # forward copies the states each time, which would be slow with stored samples.
        return super().forward(*args, **kwargs)

    def prepare_sync(self) -> None:
        """Give the states the same shapes on all processes."""
        self._fold()

    def compute(self) -> dict[str, Tensor]:
        """Compute the measures, with the current values of the head.

        Returns:
            Scalars by name, in the dtype of the statistics.
        """
        return self.read(self.checked_statistics())

    def checked_statistics(self) -> ClassStatistics:
        """Return the statistics, with one transfer to the host.

        Raises:
            ValueError: If a label is outside ``0..K-1``.
        """
        stats = self.statistics
        if int(stats.num_invalid) > 0:
            raise UserError(
                f"{int(stats.num_invalid)} labels were outside 0..{self.num_classes - 1}. "
                "Set ignore_index if a label marks samples to leave out. Otherwise map labels to these classes, before "
                "update or in batch_fn, or measure a head with an output for each class."
            )
        return stats

    def gathered(self) -> ClassStatistics:
        """Return the statistics over all processes, which must all call this.

        Raises:
            ValueError: As for :meth:`checked_statistics`.
        """
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, distributed_available=self.distributed_available_fn):
            return self.checked_statistics()

    @without_autocast
    def read(self, stats: ClassStatistics) -> dict[str, Tensor]:
        """Evaluate the measures on statistics, without a transfer to the host.

        Args:
            stats: Statistics of the features.

        Returns:
            As for :meth:`compute`.
        """
        return evaluate_measures(self.measures, self._measure_input(stats))

    @without_autocast
    def per_class(self) -> dict[str, Tensor]:
        """Compute the measures that have a value for each class, for this process, or for all while synchronised.

        Returns:
            Vectors ``(K,)`` by name, ``nan`` for absent classes: ``count``; ``variance``, the mean squared distance
            from the class mean; ``mean_norm``, the norm of the centred class mean; ``cdnv`` and ``equiangularity``,
            means over the pairs of a class; with a head ``head_norm`` and ``nc3_cosine``. For groups only those that
            need neither the head nor classes.
        """
        given = self._measure_input(self.checked_statistics())
        if not self.groups:
            return per_class_values(given)
        values = per_class_values(given._replace(weight=None))
        del values["equiangularity"]
        return values

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw values on a logarithmic axis.

        Args:
            val: Result of ``compute`` or ``forward``, or a sequence of them; None calls ``compute``.
            ax: Matplotlib axis; None makes one.

        Returns:
            Figure and axis.
        """
        figure, axis = super().plot(val, ax)
        for each in np.ravel(np.asarray(axis)):
            each.set_yscale("log")
        return figure, axis

    def _measure_input(self, stats: ClassStatistics) -> MeasureInput:
        """Make the input of the measures, with the current values of the head."""
        return measure_input(stats, self._head.get(), self.global_mean, self.between_weights)

    def set_dtype(self, dst_type: Any) -> NeuralCollapse:
        """Change the dtype of the statistics; counts of labels stay integers."""
        self._fold()
        super().set_dtype(dst_type)
        self.num_invalid = self.num_invalid.long()
        self.change_default("num_invalid", torch.zeros_like(self.num_invalid))
        return self

    def _fold(self) -> None:
        """Fold stored samples into the totals."""
        self._set(self.statistics.folded)

    def _set(self, stats: ClassStatistics) -> None:
        """Set the states to those of statistics."""
        for name, value in states_of(stats).items():
            if value is not getattr(self, name):  # Most updates replace only a few states.
                setattr(self, name, value)

    def merge_states(self, earlier: dict[str, Any]) -> None:
        """Merge states exactly. torchmetrics would stack them."""
        states = statistics_of({name: earlier[name] for name in self._names})
        self._set(states.merge(self.statistics))
