"""Measurements of data sets, each by an evaluation pass or two: first statistics, then decisions."""

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
    """A loader of batches.

    Attributes:
        loader: The loader.
        limit: Number of batches to which reading is held; None if to none.
    """

    loader: Any
    limit: int | None = None

    def is_same(self, other: DataSet) -> bool:
        """Whether another one is of the same loader, held to as many batches."""
        return self.loader is other.loader and self.limit == other.limit


class Gather(Protocol):
    """Makes an evaluation pass over a data set: :func:`gather_alone`, or one that others share."""

    def __call__(self, host: Host, data: DataSet, make: Callable[[], AnyGatherer]) -> AnyGatherer:
        """Make a gatherer and return it when it has seen the data."""


def gather_alone(host: Host, data: DataSet, make: Callable[[], AnyGatherer]) -> AnyGatherer:
    """Make an evaluation pass for one gatherer."""
    gatherer = make()
    evaluate(host, data.loader, [gatherer], data.limit)
    return gatherer


class Measured(NamedTuple):
    """What was measured at one state of the weights.

    Attributes:
        values: By ``<set>/<measure>``; the training set is ``train``, several loaders of it ``train/<loader>``.
        class_means: Statistics of all training loaders together; None if nothing needed them.
        head: The head then.
    """

    values: dict[str, Tensor]
    class_means: LayerStatistics | None
    head: Head


class StatisticsGatherer:
    """Gathers statistics of a data set in an evaluation pass.

    Args:
        reader: Of features and labels.
        measuring: What is wanted.
        labelled: Whether labels mean anything.
        last: A collector that is done with, taken again where it can be.
    """

    def __init__(
        self, reader: PairReader, measuring: Measuring, labelled: bool = True, last: StatisticsCollector | None = None
    ) -> None:
        self.reader, self.labelled, self._measuring, self._last = reader, labelled, measuring, last
        self._collector: StatisticsCollector | None = None

    @property
    def collector(self) -> StatisticsCollector:
        """What was gathered."""
        assert self._collector is not None
        return self._collector

    @cached_property
    def statistics(self) -> LayerStatistics:
        """Statistics by name, over all processes, which must all ask."""
        return self.collector.statistics()

    def begin(self, host: Host, others: Sequence[Gatherer]) -> None:
        """Make the collector for the head."""
        self._collector = self._measuring.statistics_collector(self.reader.head_of(host.module), self._last)

    def add(self, features: dict[str, Tensor], labels: Tensor) -> None:
        """Take rows."""
        names = ("", *self.reader.layers) if self.labelled else ("",)  # Others are those of other gatherers.
        self.collector.add({name: features[name] for name in names}, labels)


class DecisionsGatherer:
    """Gathers decisions about a data set in an evaluation pass.

    Args:
        reader: Of features and labels.
        collector: Takes them.
    """

    labelled = True

    def __init__(self, reader: PairReader, collector: DecisionsCollector) -> None:
        self.reader, self._collector = reader, collector

    def begin(self, host: Host, others: Sequence[Gatherer]) -> None:
        """Nothing is to be made."""

    def add(self, features: dict[str, Tensor], labels: Tensor) -> None:
        """Take rows."""
        self._collector.add(features, labels)


class SetReader:
    """Measures data sets at the weights as they are. No value is kept from one measurement to the next.

    Args:
        reader: Of features and labels.
        measuring: What to measure.
    """

    def __init__(self, reader: PairReader, measuring: Measuring) -> None:
        self._reader, self._measuring = reader, measuring
        self._last: StatisticsCollector | None = None  # Of the last pass.

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_last": None}

    def gatherer(self, labelled: bool = True) -> StatisticsGatherer:
        """Start gathering statistics of a data set."""
        last, self._last = self._last, None
        return StatisticsGatherer(self._reader, self._measuring, labelled, last)

    def statistics(self, host: Host, data: DataSet, gather: Gather = gather_alone) -> LayerStatistics:
        """Gather the statistics of a training set."""
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
        """Measure all sets at the weights as they are.

        Args:
            host: Of the model.
            trained: The training loaders, needed for class means.
            others: Further sets.
            ood: Names of those that are out of distribution.
            training: Whether the training set is measured, and not only its class means where others need them.
            gather: Makes the passes over training sets, which others may share.
        """
        of_training = {name: self.statistics(host, data, gather) for name, data in trained.items()}
        class_means = merged(of_training) if of_training else None
        sets = {name: (trained[name], stats) for name, stats in of_training.items()} if training else {}
        for name, data in others.items():
            sets[name] = data, self._statistics_of(gather_alone(host, data, partial(self.gatherer, name not in ood)))
        head, values = self._reader.whole_head_of(host.module), {}
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
        collector = self._measuring.decisions_collector(head, class_means)
        gather_alone(host, data, lambda: DecisionsGatherer(self._reader, collector))
        return collector.read()


def merged(parts: Mapping[str, LayerStatistics]) -> LayerStatistics:
    """Merge the statistics of several sets."""
    first = next(iter(parts.values()))
    return {name: reduce(ClassStatistics.merge, (stats[name] for stats in parts.values())) for name in first}
