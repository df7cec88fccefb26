"""Measurement of data sets by evaluation passes: one for statistics, and a second one for decisions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Collection as Names
from functools import cached_property, partial, reduce
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor

from nclightning.functional import ClassStatistics
from nclightning.heads import Head
from nclightning.probe.collectors import (
    DecisionsCollector,
    LayerStatistics,
    Measuring,
    StatisticsCollector,
    orthogonality,
)
from nclightning.probe.evaluation import Gatherer, evaluate
from nclightning.probe.host import Host
from nclightning.probe.reader import PairReader
from nclightning.quantities import NC5

__all__ = [
    "DataSet",
    "DecisionsGatherer",
    "Gather",
    "Measured",
    "SetReader",
    "StatisticsGatherer",
    "gather_alone",
    "merged",
]

AnyGatherer = TypeVar("AnyGatherer", bound=Gatherer)


class DataSet(NamedTuple):
    """A loader of batches, perhaps with a limit.

    Attributes:
        loader: The loader.
        limit: Largest number of batches to read; None for no limit.
    """

    loader: Any
    limit: int | None = None

    def is_same(self, other: DataSet) -> bool:
        """Return whether another data set has the same loader and limit."""
        return self.loader is other.loader and self.limit == other.limit


class Gather(Protocol):
    """A function that makes an evaluation pass: :func:`gather_alone`, or one that shares the pass with others."""

    def __call__(self, host: Host, data: DataSet, make: Callable[[], AnyGatherer]) -> AnyGatherer:
        """Construct a gatherer, let it receive the data, and return it."""


def gather_alone(host: Host, data: DataSet, make: Callable[[], AnyGatherer]) -> AnyGatherer:
    """Make an evaluation pass for one gatherer."""
    gatherer = make()
    evaluate(host, data.loader, [gatherer], data.limit)
    return gatherer


class Measured(NamedTuple):
    """Results at one state of the weights.

    Attributes:
        values: Values by ``<set>/<measure>``. The training set is ``train``; several loaders of it are
            ``train/<loader>``.
        class_means: Class statistics of all training loaders together; None if they were not needed.
        head: A copy of the head.
    """

    values: dict[str, Tensor]
    class_means: LayerStatistics | None
    head: Head


class StatisticsGatherer:
    """Collects class statistics of a data set in an evaluation pass.

    Args:
        reader: Reader of features and labels.
        measuring: The measures to evaluate.
        labelled: Whether labels have a meaning.
        last: A collector that is no longer needed. It is reused if it fits.
    """

    def __init__(
        self, reader: PairReader, measuring: Measuring, labelled: bool = True, last: StatisticsCollector | None = None
    ) -> None:
        self.reader, self.labelled, self._measuring, self._last = reader, labelled, measuring, last
        self._collector: StatisticsCollector | None = None

    @property
    def collector(self) -> StatisticsCollector:
        """The collector with what was gathered."""
        assert self._collector is not None
        return self._collector

    @cached_property
    def statistics(self) -> LayerStatistics:
        """Class statistics by name, over all processes, which must all call it."""
        return self.collector.statistics()

    def begin(self, host: Host, others: Sequence[Gatherer]) -> None:
        """Construct the collector for the head."""
        self._collector = self._measuring.statistics_collector(self.reader.head_of(host.module), self._last)

    def add(self, features: dict[str, Tensor], labels: Tensor) -> None:
        """Add features and labels."""
        names = ("", *self.reader.layers) if self.labelled else ("",)  # Other names belong to other gatherers.
        self.collector.add({name: features[name] for name in names}, labels)


class DecisionsGatherer:
    """Collects decisions on a data set in an evaluation pass.

    Args:
        reader: Reader of features and labels.
        collector: The collector of decisions.
    """

    labelled = True

    def __init__(self, reader: PairReader, collector: DecisionsCollector) -> None:
        self.reader, self._collector = reader, collector

    def begin(self, host: Host, others: Sequence[Gatherer]) -> None:
        """Do nothing: the collector exists."""

    def add(self, features: dict[str, Tensor], labels: Tensor) -> None:
        """Add features and labels."""
        self._collector.add(features, labels)


class SetReader:
    """Measures data sets at the current weights. No value is kept from one measurement to the next.

    Args:
        reader: Reader of features and labels.
        measuring: The measures to evaluate.
    """

    def __init__(self, reader: PairReader, measuring: Measuring) -> None:
        self._reader, self._measuring = reader, measuring
        self._last: StatisticsCollector | None = None  # The collector of the last pass, for reuse.

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_last": None}

    def gatherer(self, labelled: bool = True) -> StatisticsGatherer:
        """Construct a gatherer of class statistics."""
        last, self._last = self._last, None
        return StatisticsGatherer(self._reader, self._measuring, labelled, last)

    def statistics(self, host: Host, data: DataSet, gather: Gather = gather_alone) -> LayerStatistics:
        """Return the class statistics of a training set."""
        return self._statistics_of(gather(host, data, self.gatherer))

    def _statistics_of(self, gatherer: StatisticsGatherer) -> LayerStatistics:
        self._last = gatherer.collector
        return gatherer.statistics

    def read(
        self,
        host: Host,
        trained: Mapping[str, DataSet],
        others: Mapping[str, DataSet],
        ood: Names[str],
        training: bool,
        gather: Gather = gather_alone,
    ) -> Measured:
        """Measure all data sets at the current weights.

        Args:
            host: The host of the model.
            trained: The training loaders, if class means are needed.
            others: Further data sets.
            ood: Names of out-of-distribution data sets among these.
            training: Whether the training set itself is measured. If not, only its class means are used.
            gather: Function that makes the passes over training sets, which others may share.
        """
        of_training = {name: self.statistics(host, data, gather) for name, data in trained.items()}
        class_means = merged(of_training) if of_training else None
        sets = {name: (trained[name], stats) for name, stats in of_training.items()} if training else {}
        for name, data in others.items():
            sets[name] = data, self._statistics_of(gather_alone(host, data, partial(self.gatherer, name not in ood)))
        head, values = self._reader.head_snapshot(host.module), {}
        for name, (data, stats) in sets.items():
            if name in ood:
                assert class_means is not None
                values[f"{name}/{NC5.name}"] = orthogonality(class_means[""], stats[""])
                continue
            assert self._last is not None
            read = self._last.read(stats)
            if class_means is not None and self._measuring.decides(class_means):
                read |= self._decide(host, data, head, class_means)
            values |= {f"{name}/{tag}": value for tag, value in read.items()}
        return Measured(values, class_means, head)

    def _decide(self, host: Host, data: DataSet, head: Head, class_means: LayerStatistics) -> dict[str, Tensor]:
        """Return the measures of decisions of a data set, by another pass over it."""
        collector = self._measuring.decisions_collector(head, class_means)
        gather_alone(host, data, lambda: DecisionsGatherer(self._reader, collector))
        return collector.read()


def merged(parts: Mapping[str, LayerStatistics]) -> LayerStatistics:
    """Merge the class statistics of several data sets."""
    first = next(iter(parts.values()))
    return {name: reduce(ClassStatistics.merge, (stats[name] for stats in parts.values())) for name in first}
