"""Measurements of data sets by evaluation passes over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Collection as Names
from functools import cached_property, partial, reduce
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor

from nclightning.functional import ClassStatistics
from nclightning.heads import Head
from nclightning.probe.collection import Centres, Collection, Decisions, Measuring, orthogonality
from nclightning.probe.evaluation import Gatherer, evaluate
from nclightning.probe.host import Host
from nclightning.probe.reader import PairReader

__all__ = [
    "DataSet",
    "DecisionsGatherer",
    "Gather",
    "Measured",
    "SetReader",
    "StatisticsGatherer",
    "gather_alone",
    "together",
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
    """Makes an evaluation pass over a data set."""

    def __call__(self, host: Host, data: DataSet, make: Callable[[], AnyGatherer]) -> AnyGatherer:
        """Make a gatherer and return it when it has seen the data."""


def gather_alone(host: Host, data: DataSet, make: Callable[[], AnyGatherer]) -> AnyGatherer:
    """Make a pass for one gatherer."""
    gatherer = make()
    evaluate(host, data.loader, [gatherer], data.limit)
    return gatherer


class Measured(NamedTuple):
    """What was measured at one state of the weights.

    Attributes:
        values: By ``<set>/<measure>``; the training set is ``train``, several loaders of it ``train/<loader>``.
        centres: Statistics of all training loaders together; None if nothing needed them.
        head: The head then.
    """

    values: dict[str, Tensor]
    centres: Centres | None
    head: Head


class StatisticsGatherer:
    """Gathers statistics of a data set.

    Args:
        reader: Of features and labels.
        measuring: What is wanted.
        labelled: Whether labels mean anything.
        last: A collection that is done with, taken again where it can be.
    """

    def __init__(
        self, reader: PairReader, measuring: Measuring, labelled: bool = True, last: Collection | None = None
    ) -> None:
        self.reader, self.labelled, self._measuring, self._last = reader, labelled, measuring, last
        self._collection: Collection | None = None

    @property
    def collection(self) -> Collection:
        """What was gathered."""
        assert self._collection is not None
        return self._collection

    @cached_property
    def statistics(self) -> Centres:
        """Statistics by name, over all processes, which must all ask."""
        return self.collection.statistics()

    def begin(self, host: Host, others: Sequence[Gatherer]) -> None:
        """Make the collection for the head."""
        self._collection = self._measuring.collection(self.reader.head_of(host.module), self._last)

    def add(self, features: dict[str, Tensor], labels: Tensor) -> None:
        """Take a batch."""
        own = features
        if len(features) > 1 + len(self.reader.layers):  # The others are those of other gatherers.
            own = {name: features[name] for name in ("", *self.reader.layers)}
        self.collection.add(*((own, labels) if self.labelled else self._measuring.unlabelled(own)))


class DecisionsGatherer:
    """Gathers decisions about a data set."""

    def __init__(self, reader: PairReader, decisions: Decisions) -> None:
        self.reader, self._decisions = reader, decisions

    def begin(self, host: Host, others: Sequence[Gatherer]) -> None:
        """Nothing is to be made."""

    def add(self, features: dict[str, Tensor], labels: Tensor) -> None:
        """Take a batch."""
        self._decisions.add(features, labels)


class SetReader:
    """Measures data sets at the weights of the moment. No value is kept from one measurement to the next.

    Args:
        reader: Of features and labels.
        measuring: What to measure.
    """

    def __init__(self, reader: PairReader, measuring: Measuring) -> None:
        self._reader, self._measuring = reader, measuring
        self._last: Collection | None = None  # Of the last pass.

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_last": None}

    def gatherer(self, labelled: bool = True) -> StatisticsGatherer:
        """Start gathering statistics of a data set."""
        last, self._last = self._last, None
        return StatisticsGatherer(self._reader, self._measuring, labelled, last)

    def trained(self, host: Host, data: DataSet, gather: Gather = gather_alone) -> Centres:
        """Gather the statistics of a training set."""
        return self._statistics(gather(host, data, self.gatherer))

    def _statistics(self, gatherer: StatisticsGatherer) -> Centres:
        self._last = gatherer.collection
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
        means = {name: self.trained(host, data, gather) for name, data in trained.items()}
        centres = together(means) if means else None
        sets = {name: (trained[name], stats) for name, stats in means.items()} if training else {}
        for name, data in others.items():
            sets[name] = data, self._statistics(gather_alone(host, data, partial(self.gatherer, name not in ood)))
        head, values = self._reader.whole_head_of(host.module), {}
        for name, (data, stats) in sets.items():
            if name in ood:
                assert centres is not None
                values[f"{name}/nc5"] = orthogonality(centres[""], stats[""])
                continue
            assert self._last is not None
            read = self._last.read(stats)
            if centres is not None and self._measuring.decides(centres):
                read |= self._decide(host, data, head, centres)
            values |= {f"{name}/{tag}": value for tag, value in read.items()}
        return Measured(values, centres, head)

    def _decide(self, host: Host, data: DataSet, head: Head, centres: Centres) -> dict[str, Tensor]:
        decisions = self._measuring.decisions(head, centres)
        gather_alone(host, data, lambda: DecisionsGatherer(self._reader, decisions))
        return decisions.read()


def together(parts: Mapping[str, Centres]) -> Centres:
    """Merge the statistics of several sets."""
    first = next(iter(parts.values()))
    return {name: reduce(ClassStatistics.merge, (stats[name] for stats in parts.values())) for name in first}
