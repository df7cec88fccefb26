"""From the features of one data set to its measures: collectors of statistics, and of decisions."""

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
    Reading,
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

_OF_A_LAYER = ("nc1", "nc1_cdnv")

# Statistics of the input of the head, under the empty name, and of further layers.
LayerStatistics = Mapping[str, ClassStatistics]


class Measuring:
    """The measures that a user chose: those of statistics, and those of decisions, which need the class means first.

    Args:
        measures: Names out of ``MEASURES`` and ``DECISION_NAMES``; None leaves the choice to the metric, ``("all",)``
            takes all.
        ignore_index: Label of samples to leave out.
        conventions: Further arguments of :class:`nclightning.metrics.NeuralCollapse`.

    Attributes:
        num_groups: How many groups of samples the labels say, where they say groups and not the classes of the head.

    Raises:
        ValueError: If a name does not exist or stands twice.
    """

    def __init__(
        self, measures: Sequence[str] | None = None, ignore_index: int | None = None, **conventions: Any
    ) -> None:
        self._ignore_index, self._conventions = ignore_index, conventions
        self._told: set[str] = set()
        self.num_groups: int | None = None
        self.of_statistics: tuple[str, ...] | None = None
        self.of_decisions: tuple[str, ...] = ()
        if measures is None:
            return
        if not isinstance(measures, str):
            measures = (*MEASURES, *DECISION_NAMES) if tuple(measures) == ("all",) else tuple(measures)
            self.of_decisions = tuple(name for name in DECISION_NAMES if name in measures)
            if len(set(measures)) == len(measures) == len(self.of_decisions) > 0:
                self.of_statistics = ()
                return
            measures = tuple(name for name in measures if measures.count(name) > 1 or name not in DECISION_NAMES)
        self.of_statistics = select_measures(measures, DECISION_NAMES)

    def tags(self, layers: Iterable[str]) -> set[str]:
        """Return the names of the measures of a data set, and one name for each further layer."""
        default = DEFAULT_MEASURES if self.num_groups is None else DEFAULT_MEASURES_OF_GROUPS
        of_statistics = default if self.of_statistics is None else self.of_statistics
        return {*of_statistics, *self.of_decisions, *(f"{layer}/nc1" for layer in layers)}

    def metric(self, head: Head | HeadReader) -> metrics.NeuralCollapse:
        """Make the metric of the head and its input."""
        measures = ("all",) if self.of_statistics == tuple(MEASURES) else self.of_statistics
        return metrics.NeuralCollapse(
            head.out_features if self.num_groups is None else self.num_groups,
            head.in_features,
            head,
            # The lightest measure where only statistics are wanted.
            ("nc1_ratio",) if measures == () else measures,
            ignore_index=self._ignore_index,
            groups=self.num_groups is not None,
            **self._conventions,
        ).to(device_of(head))

    def statistics_collector(
        self, head: Head | HeadReader, last: StatisticsCollector | None = None
    ) -> StatisticsCollector:
        """Make a collector for a data set; a last one that is done with is taken again where it can be."""
        if last is not None and last.restart(head):
            return last
        reads = self.of_statistics != ()
        return StatisticsCollector(head, self.metric(head), reads, self._ignore_index, self.tell_absent)

    def tell_absent(self, head: Head | HeadReader, stats: ClassStatistics) -> None:
        """Say once for each head that it has more outputs than classes were seen. Transfers to the host."""
        present, ignored = int(stats.present.sum()), self._ignore_index
        expected = head.out_features - (ignored is not None and 0 <= ignored < head.out_features)
        if present < expected and head.name not in self._told:
            self._told.add(head.name)
            rank_zero_warn(
                f"the head {head.name!r} has {head.out_features} outputs, and the labels hold {present} classes: the "
                "others have no class mean, and measures of class means leave them out. If this layer is not the one "
                "that the labels belong to, pass head=."
            )

    def decisions_collector(self, head: Head | HeadReader, class_means: LayerStatistics) -> DecisionsCollector:
        """Make a collector of the decisions about a data set."""
        return DecisionsCollector(head, self.of_decisions, class_means, self._ignore_index)

    def decides(self, class_means: LayerStatistics) -> bool:
        """Whether decisions are measured: when chosen, and for further layers always."""
        return bool(self.of_decisions) or len(class_means) > 1


class StatisticsCollector:
    """Collects the statistics of the head's input, and of further layers.

    Args:
        head: The head.
        metric: Of its input.
        reads: Whether its measures are wanted, or only its statistics.
        ignore_index: Label of samples to leave out.
        tell: Is told head and statistics before measures are read.
    """

    def __init__(
        self,
        head: Head | HeadReader,
        metric: metrics.NeuralCollapse,
        reads: bool,
        ignore_index: int | None,
        tell: Callable[[Head | HeadReader, ClassStatistics], None] | None = None,
    ) -> None:
        self._head, self._metrics, self._tell = head, {"": metric}, tell
        self._num_classes, self._reads, self._ignore_index = metric.num_classes, reads, ignore_index

    def add(self, features: Mapping[str, Tensor], labels: Tensor) -> None:
        """Take rows ``(N, d)`` by name, which do not change any more, and their labels ``(N,)``."""
        for name, rows in features.items():
            if name not in self._metrics:
                metric = metrics.NeuralCollapse(
                    self._num_classes, rows.shape[1], measures=_OF_A_LAYER, ignore_index=self._ignore_index
                )
                self._metrics[name] = metric.to(rows.device)
            self._metrics[name].update(rows, labels, copy=False)

    def restart(self, head: Head | HeadReader) -> bool:
        """Begin anew if this is of the head as it is now, at a tenth of what another collector costs; say whether."""
        metric = self._metrics[""]
        shape = (metric.num_classes, metric.feature_dim)
        if head is not self._head or weight_shape(head) != shape or device_of(head) != metric.means.device:
            return False
        metric.reset()
        self._metrics = {"": metric}  # Further layers may have other sizes on another data set.
        return True

    def statistics(self) -> dict[str, ClassStatistics]:
        """Statistics by name, over all processes.

        Raises:
            ValueError: If there were no samples, or labels do not fit the head.
        """
        return {name: metric.gathered() for name, metric in self._metrics.items()}

    def read(self, statistics: LayerStatistics) -> dict[str, Tensor]:
        """Evaluate the measures."""
        if self._tell is not None:
            self._tell(self._head, statistics[""])
        values = self._metrics[""].read(statistics[""]) if self._reads else {}
        for name, stats in statistics.items():
            if name:
                values |= {f"{name}/{measure}": MEASURES[measure].read(Reading(stats)) for measure in _OF_A_LAYER}
        return values


class DecisionsCollector:
    """Collects decisions of the head and of the nearest class mean; for further layers of the latter.

    Args:
        head: The head.
        measures: Of the head's decisions.
        class_means: Statistics of the training set by name.
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
        """Take rows ``(N, d)`` by name, and their labels ``(N,)``."""
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
        """Read the measures class by class over all processes, after :meth:`read`."""
        shares = {}
        for name, metric in self._metrics.items():
            with metric.sync_context(dist_sync_fn=metric.dist_sync_fn):
                of_classes = metric.per_class()
            shares[name] = {measure: of_classes[measure] for measure in (("ncc_accuracy",) if name else self._measures)}
        return shares


def orthogonality(class_means: ClassStatistics, others: ClassStatistics) -> Tensor:
    """NC5 of the samples of another set, whatever their classes."""
    weights = others.counts / others.counts.sum()
    return ood_orthogonality(class_means, (weights.unsqueeze(1) * others.means).sum(dim=0))


def merge_over_ranks(stats: ClassStatistics) -> ClassStatistics:
    """Merge the statistics of all processes, in the same order on each. All must come here.

    Args:
        stats: Of the samples of this process.

    Returns:
        Of all samples.
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
