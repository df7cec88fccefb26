"""Gap and distance to the optimum of an unconstrained feature model, collected in an evaluation pass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from nclightning.errors import UserError
from nclightning.functional import ClassStatistics, ExcessLoss
from nclightning.functional.linear import autocast_off
from nclightning.heads import Head
from nclightning.metrics import NeuralCollapse
from nclightning.metrics.gaps import Found, read_optimality
from nclightning.metrics.reference import Reference
from nclightning.probe.evaluation import Gatherer
from nclightning.probe.host import Host
from nclightning.probe.reader import PairReader
from nclightning.probe.sets import StatisticsGatherer
from nclightning.ranks import count_over_ranks, gather_tensors

__all__ = ["OptimalityCollector", "OptimalityGatherer"]


class OptimalityCollector:
    """Collects the statistics of a training set that gap and distance are computed from, in one pass.

    They do not depend on the penalties, which can therefore be fitted to the same features at the end.

    Args:
        reference: The problem whose optimum is the reference.
        head: Weight and bias during the pass.
        own_statistics: Whether to collect class statistics, too. False if another collector of the same pass does;
            :meth:`read` then takes its statistics.

    Raises:
        ValueError: If the head does not fit.
    """

    def __init__(self, reference: Reference, head: Head, *, own_statistics: bool = True) -> None:
        sizes = reference.check_head(head)
        self._reference, self._head = reference, reference.head_loss(head, head.device)
        self._excess = ExcessLoss.empty(*sizes, head.out_features, head.device)
        # Only statistics are needed, so the measure with the cheapest ones is chosen.
        self._metric = NeuralCollapse(*sizes, measures=("nc1_ratio",)).to(head.device) if own_statistics else None
        self._num_seen = 0

    def update(self, features: Tensor, labels: Tensor, *, copy: bool = True) -> None:
        """Add samples. Many at once cost little more than few.

        Args:
            features: ``(N, d)``.
            labels: ``(N,)`` int64. Labels outside ``0..M-1`` are left out here, and :meth:`read` raises an error.
            copy: As for :meth:`nclightning.functional.StatisticsBuffer.add`.
        """
        self._num_seen += len(labels)
        with autocast_off(self._head.weight.device):
            if self._metric is not None:
                self._metric.update(features, labels, copy=copy)
            self._excess = self._excess.add(features, labels, self._head)

    def read(self, stats: ClassStatistics | None = None) -> Found:
        """Evaluate gap and distance over all processes, which must all call it.

        Args:
            stats: Statistics of the same features over all processes; None for those of this collector.

        Returns:
            As :func:`nclightning.metrics.gaps.read_optimality`.

        Raises:
            ValueError: If a label was outside ``0..M-1``, or labels are not those of the problem.
        """
        if stats is None:
            metric = self._metric
            assert metric is not None, "made without statistics of its own"
            with metric.sync_context(
                dist_sync_fn=metric.dist_sync_fn, distributed_available=metric.distributed_available_fn
            ):
                stats = metric.statistics
        if left_out := count_over_ranks(self._num_seen, self._head.weight.device) - int(stats.counts.sum()):
            raise UserError(
                f"{left_out} labels were outside 0..{len(stats.counts) - 1}: map labels to these classes in batch_fn, "
                "or leave samples without a class out there or in the loader."
            )
        with torch.no_grad(), autocast_off(self._head.weight.device):
            parts = [ExcessLoss(*tensors) for tensors in gather_tensors(self._excess)]
            excess = reduce(lambda one, other: one.merge(other, self._head), parts)
            return read_optimality(stats, excess, self._head, self._reference)


class OptimalityGatherer:
    """Collects the statistics for gap and distance in an evaluation pass.

    Args:
        reader: Reader of features and labels.
        reference: As for :class:`OptimalityCollector`.
    """

    labelled = True

    def __init__(self, reader: PairReader, reference: Reference) -> None:
        self.reader, self._reference = reader, reference
        self._collector: OptimalityCollector | None = None
        self._statistics: StatisticsGatherer | None = None  # The gatherer of class statistics in the same pass.

    @property
    def collector(self) -> OptimalityCollector:
        """The collector with what was gathered."""
        assert self._collector is not None
        return self._collector

    def begin(self, host: Host, others: Sequence[Gatherer]) -> None:
        """Construct the collector for the head. Another gatherer of class statistics is used if there is one."""
        statistics = [each for each in others if isinstance(each, StatisticsGatherer)]
        self._statistics = statistics[0] if statistics else None
        head = self.reader.head_snapshot(host.module)
        self._collector = OptimalityCollector(self._reference, head, own_statistics=not statistics)

    def add(self, features: dict[str, Tensor], labels: Tensor) -> None:
        """Add features and labels."""
        self.collector.update(features[""], labels, copy=False)

    def read(self) -> Found:
        """Evaluate gap and distance over all processes, which must all call it; see :class:`OptimalityCollector`."""
        return self.collector.read(None if self._statistics is None else self._statistics.statistics[""])
