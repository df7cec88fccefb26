"""Gap and distance of a module that is not full-batch, from two passes over its training set."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from torch import Tensor

from nclightning.functional import distance_to_collapse
from nclightning.metrics import NeuralCollapse, Optimality
from nclightning.metrics.optimality import check_counts
from nclightning.probe.features import pair_rows
from nclightning.probe.host import Host
from nclightning.probe.reader import PairReader
from nclightning.probe.sets import DataSet, gather_alone
from nclightning.theory import UFMProblem

__all__ = ["sweep_optimality"]

# What is logged with fitted penalties.
_FITTED = ("gap", "distance", "relative_distance", "lambda_w", "lambda_h")


class _Gatherer:
    """Updates a metric."""

    def __init__(self, reader: PairReader, make: Callable[[], NeuralCollapse]) -> None:
        self.reader, self._make = reader, make
        self._metric: NeuralCollapse | None = None  # The head is known from the first batch on.

    @property
    def metric(self) -> NeuralCollapse:
        """The metric after the pass."""
        assert self._metric is not None
        return self._metric

    def add(self, host: Host, features: dict[str, Tensor], labels: Tensor) -> None:
        """Take a batch."""
        if self._metric is None:
            self._metric = self._make().to(host.device)
        self._metric.update(*pair_rows(features[""], labels))


def sweep_optimality(
    host: Host,
    reader: PairReader,
    data: DataSet,
    loss: Literal["mse", "ce"],
    penalties: tuple[float, float] | None,
) -> dict[str, Tensor]:
    """Sweep the training set for its class means, and again for the distance to the optimum.

    Args:
        host: Of the module.
        reader: That found its head.
        data: The training set.
        loss: Of the problem.
        penalties: On head and features; None fits both.

    Returns:
        Values by tag; nan where no penalties make the scales of the features optimal.
    """

    def run(make: Callable[[], NeuralCollapse]) -> NeuralCollapse:
        return gather_alone(host, data, lambda: _Gatherer(reader, make)).metric

    def light() -> NeuralCollapse:
        head = reader.head_of(host.module)
        return NeuralCollapse(head.out_features, head.in_features, head, measures=("nc1_ratio",))

    stats, head = run(light).gathered(), reader.whole_head_of(host.module)
    check_counts(stats.counts, int(stats.counts.max()))
    sizes = loss, head.out_features, int(stats.counts.max()), head.in_features
    if penalties is None:
        fitted = distance_to_collapse(stats, head.weight)
        scales = float(fitted.head_scale), float(fitted.feature_scale)
        if not min(scales) > 0 or (loss == "mse" and scales[0] * scales[1] >= 1):
            return {f"optimality/{name}": stats.spreads.new_tensor(math.nan) for name in _FITTED}
        problem = UFMProblem.at_scale(*sizes, *scales)
    else:
        problem = UFMProblem(*sizes, *penalties)
    values = {f"optimality/{name}": v for name, v in run(lambda: Optimality(problem, head)).compute().items()}
    if penalties is None:
        for name in ("lambda_w", "lambda_h"):
            values[f"optimality/{name}"] = stats.counts.new_tensor(getattr(problem, name))
    return values
