"""Collectors that turn the features of a data set into measures: one for statistics, one for decisions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

from torch import Tensor

from nclightning import metrics
from nclightning.functional import ClassStatistics, ood_orthogonality
from nclightning.heads import Head, HeadReader, device_of, weight_shape
from nclightning.metrics.measures import (
    MEASURES,
    MeasureInput,
    select_measures,
)
from nclightning.quantities import DECISION_NAMES, DEFAULT_MEASURES, DEFAULT_MEASURES_OF_GROUPS
from nclightning.ranks import gather_tensors, rank_zero_warn, world_size

__all__ = [
    "DecisionsCollector",
    "LayerStatistics",
    "Measuring",
    "StatisticsCollector",
    "merge_over_ranks",
    "orthogonality",
]

_LAYER_MEASURES = ("nc1", "nc1_cdnv")

# Class statistics of the head's input under the empty name, and of further layers under their names.
LayerStatistics = Mapping[str, ClassStatistics]


class Measuring:
    """The measures that a user chose.

    Measures of statistics need one pass over the data. Measures of decisions need a second one, because they compare
    samples with the class means.

    Args:
        measures: Names out of ``MEASURES`` and ``DECISION_NAMES``; None leaves the choice to the metric, ``("all",)``
            takes all.
        ignore_index: Label of samples to leave out.
        **conventions: Further arguments of :class:`nclightning.metrics.NeuralCollapse`.

    Attributes:
        statistics_measures: Chosen measures of statistics; None for the default.
        decision_measures: Chosen measures of decisions.
        num_groups: Number of groups if the labels number groups of samples, and not the classes of the head; else None.

    Raises:
        ValueError: If a name does not exist or occurs twice.
    """

    def __init__(
        self, measures: Sequence[str] | None = None, ignore_index: int | None = None, **conventions: Any
    ) -> None:
        self._ignore_index, self._conventions = ignore_index, conventions
        self._warned: set[str] = set()
        self.num_groups: int | None = None
        self.statistics_measures: tuple[str, ...] | None = None
        self.decision_measures: tuple[str, ...] = ()
        if measures is None:
            return
        if not isinstance(measures, str):
            measures = (*MEASURES, *DECISION_NAMES) if tuple(measures) == ("all",) else tuple(measures)
            self.decision_measures = tuple(name for name in DECISION_NAMES if name in measures)
            if len(set(measures)) == len(measures) == len(self.decision_measures) > 0:
                self.statistics_measures = ()
                return
            measures = tuple(name for name in measures if measures.count(name) > 1 or name not in DECISION_NAMES)
        self.statistics_measures = select_measures(measures, DECISION_NAMES)

    def tags(self, layers: Iterable[str]) -> set[str]:
        """Return the names under which values of a data set are logged; for each further layer only that of NC1."""
        default = DEFAULT_MEASURES if self.num_groups is None else DEFAULT_MEASURES_OF_GROUPS
        statistics_measures = default if self.statistics_measures is None else self.statistics_measures
        return {*statistics_measures, *self.decision_measures, *(f"{layer}/nc1" for layer in layers)}

    def metric(self, head: Head | HeadReader) -> metrics.NeuralCollapse:
        """Construct the metric for the head and its input."""
        measures = ("all",) if self.statistics_measures == tuple(MEASURES) else self.statistics_measures
        return metrics.NeuralCollapse(
            head.out_features if self.num_groups is None else self.num_groups,
            head.in_features,
            head,
            # If only statistics are needed: the measure with the cheapest ones.
            ("nc1_ratio",) if measures == () else measures,
            ignore_index=self._ignore_index,
            groups=self.num_groups is not None,
            **self._conventions,
        ).to(device_of(head))

    def statistics_collector(
        self, head: Head | HeadReader, last: StatisticsCollector | None = None
    ) -> StatisticsCollector:
        """Construct a collector of statistics for a data set.

        Args:
            head: The head.
            last: A collector that is no longer needed. It is restarted and returned if it fits.
        """
        if last is not None and last.restart(head):
            return last
        reads = self.statistics_measures != ()
        return StatisticsCollector(head, self.metric(head), reads, self._ignore_index, self.warn_if_absent)

    def warn_if_absent(self, head: Head | HeadReader, stats: ClassStatistics) -> None:
        """Warn once per head if it has more outputs than there are classes in the labels. Transfers to the host."""
        present, ignored = int(stats.present.sum()), self._ignore_index
        expected = head.out_features - (ignored is not None and 0 <= ignored < head.out_features)
        if present < expected and head.name not in self._warned:
            self._warned.add(head.name)
            rank_zero_warn(
                f"the head {head.name!r} has {head.out_features} outputs, and the labels have {present} classes: the "
                "others have no class mean, and measures of class means leave them out. If this layer is not the one "
                "that the labels belong to, pass head=."
            )

    def decisions_collector(self, head: Head | HeadReader, class_means: LayerStatistics) -> DecisionsCollector:
        """Construct a collector of decisions for a data set."""
        return DecisionsCollector(head, self.decision_measures, class_means, self._ignore_index)

    def decides(self, class_means: LayerStatistics) -> bool:
        """Return whether decisions are measured: if the user chose one, and always if there are further layers."""
        return bool(self.decision_measures) or len(class_means) > 1


class StatisticsCollector:
    """Collects the statistics of the head's input, and of further layers.

    Args:
        head: The head.
        metric: The metric for the head and its input.
        reads: Whether measures are evaluated. If not, only the statistics are needed.
        ignore_index: Label of samples to leave out.
        warn: Function that is called with head and statistics before measures are evaluated.
    """

    def __init__(
        self,
        head: Head | HeadReader,
        metric: metrics.NeuralCollapse,
        reads: bool,
        ignore_index: int | None,
        warn: Callable[[Head | HeadReader, ClassStatistics], None] | None = None,
    ) -> None:
        self._head, self._metrics, self._warn = head, {"": metric}, warn
        self._num_classes, self._reads, self._ignore_index = metric.num_classes, reads, ignore_index

    def add(self, features: Mapping[str, Tensor], labels: Tensor) -> None:
        """Add features ``(N, d)`` by name, which must not be written to afterwards, and their labels ``(N,)``."""
        for name, rows in features.items():
            if name not in self._metrics:
                metric = metrics.NeuralCollapse(
                    self._num_classes, rows.shape[1], measures=_LAYER_MEASURES, ignore_index=self._ignore_index
                )
                self._metrics[name] = metric.to(rows.device)
            self._metrics[name].update(rows, labels, copy=False)

    def restart(self, head: Head | HeadReader) -> bool:
        """Empty the collector for reuse if it fits the head, and return whether it does.

        This takes a tenth of the time of constructing another one.
        """
        metric = self._metrics[""]
        shape = (metric.num_classes, metric.feature_dim)
        if head is not self._head or weight_shape(head) != shape or device_of(head) != metric.means.device:
            return False
        metric.reset()
        self._metrics = {"": metric}  # Further layers may have other sizes on another data set.
        return True

    def statistics(self) -> dict[str, ClassStatistics]:
        """Return class statistics by name, over all processes.

        Raises:
            ValueError: If there were no samples, or labels do not fit the head.
        """
        return {name: metric.gathered() for name, metric in self._metrics.items()}

    def read(self, statistics: LayerStatistics) -> dict[str, Tensor]:
        """Evaluate the measures."""
        if self._warn is not None:
            self._warn(self._head, statistics[""])
        values = self._metrics[""].read(statistics[""]) if self._reads else {}
        for name, stats in statistics.items():
            if name:
                values |= {
                    f"{name}/{measure}": MEASURES[measure].read(MeasureInput(stats)) for measure in _LAYER_MEASURES
                }
        return values


class DecisionsCollector:
    """Collects decisions: of the head and the nearest class mean at its input, of the nearest class mean elsewhere.

    Args:
        head: The head.
        measures: Measures of decisions at the head.
        class_means: Statistics of the training set by name of the layer.
        ignore_index: Label of samples to leave out.
    """

    def __init__(
        self, head: Head | HeadReader, measures: Sequence[str], class_means: LayerStatistics, ignore_index: int | None
    ) -> None:
        self._measures = measures
        self._metrics = {
            name: metrics.NearestClassCentre(stats, None if name else head, ignore_index).to(device_of(head))
            for name, stats in class_means.items()
        }

    def add(self, features: Mapping[str, Tensor], labels: Tensor) -> None:
        """Add features ``(N, d)`` by name, and their labels ``(N,)``."""
        for name, rows in features.items():
            self._metrics[name].update(rows, labels)

    def read(self) -> dict[str, Tensor]:
        """Evaluate the measures over all processes."""
        values: dict[str, Tensor] = {}
        for name, metric in self._metrics.items():
            computed = metric.compute()
            if name:
                values[f"{name}/ncc_accuracy"] = computed["ncc_accuracy"]
            else:
                values |= {measure: computed[measure] for measure in self._measures}
        return values

    def per_class(self) -> dict[str, dict[str, Tensor]]:
        """Return the measures for each class over all processes. Call it after :meth:`read`."""
        shares = {}
        for name, metric in self._metrics.items():
            with metric.sync_context(dist_sync_fn=metric.dist_sync_fn):
                of_classes = metric.per_class()
            shares[name] = {measure: of_classes[measure] for measure in (("ncc_accuracy",) if name else self._measures)}
        return shares


def orthogonality(class_means: ClassStatistics, others: ClassStatistics) -> Tensor:
    """Return NC5 of the samples of another data set; their classes do not matter."""
    weights = others.counts / others.counts.sum()
    return ood_orthogonality(class_means, (weights.unsqueeze(1) * others.means).sum(dim=0))


def merge_over_ranks(stats: ClassStatistics) -> ClassStatistics:
    """Merge the statistics of all processes, in the same order on each. All processes must call it.

    Args:
        stats: Statistics of the samples of this process.

    Returns:
        Statistics of all samples.
    """
    if world_size() == 1:
        return stats
    stats = stats.folded
    own = {name: value for name, value in stats.totals._asdict().items() if value is not None}
    parts = []
    for *tensors, num_invalid in gather_tensors([value.double() for value in (*own.values(), stats.num_invalid)]):
        totals = {name: tensor.to(own[name].dtype) for name, tensor in zip(own, tensors, strict=True)}
        parts.append(replace(stats, totals=stats.totals._replace(**totals), num_invalid=num_invalid.long()))
    return reduce(ClassStatistics.merge, parts)
