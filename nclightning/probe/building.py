"""Construction of the user's :class:`~nclightning.probe.results.Measurement` from statistics and decisions."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nclightning.functional import ClassStatistics, between_class_rank
from nclightning.functional.linear import unit_rows
from nclightning.functional.statistics import BetweenWeights, GlobalMean
from nclightning.heads import Head
from nclightning.metrics.measures import MeasureInput, per_class_values
from nclightning.probe.results import Measurement

__all__ = ["Conventions", "build", "build_unlabelled"]

# Measures of all pairs of classes are part of the table up to this number of classes. With a vocabulary of 50000 words
# they would take an hour.
_MAX_PAIRED = 2048
_PAIR_MEASURES = {"nc1_cdnv", "nc1_cdnv_worst", "nc2_equiangularity_means", "nc2_equiangularity_worst"}
_MAX_DRAWN = 1024  # Number of classes whose cosines are kept for the picture, in at most 4 MiB.


class Conventions(NamedTuple):
    """Conventions of NC1 on unbalanced data; see :func:`nclightning.functional.within_class_variability`."""

    global_mean: GlobalMean
    between_weights: BetweenWeights


def build(
    statistics: Mapping[str, ClassStatistics],
    values: Mapping[str, Tensor],
    of_classes: Mapping[str, Mapping[str, Tensor]],
    head: Head | None,
    conventions: Conventions,
    start: float,
    left_out: tuple[str, ...] = (),
) -> Measurement:
    """Transfer the results to the host, and return them as a measurement.

    Args:
        statistics: Class statistics of the head's input under ``""``, and of further layers under their names.
        values: Values of the measures by name.
        of_classes: Measures of decisions for each class, under the same names as ``statistics``.
        head: The head, or None.
        conventions: Conventions of NC1.
        start: Start of the measurement by ``time.perf_counter``.
        left_out: Names of measures that were left out because there is no head.

    Returns:
        The measurement.
    """
    stats = statistics[""]
    rank = None
    if not stats.is_light:
        rank = values.get("nc1_rank", between_class_rank(stats, *conventions))
    names = list(values)
    scalars = [values[name] for name in names] + ([] if rank is None else [rank])
    numbers = torch.stack([each.double() for each in scalars]).tolist() if scalars else []
    last = None if rank is None else numbers.pop()
    pairs = len(stats.counts) <= _MAX_PAIRED or not _PAIR_MEASURES.isdisjoint(values)
    classes = _evenly_spaced(len(stats.counts))
    return Measurement(
        dict(zip(names, numbers, strict=True)),
        {
            layer: _table(own, None if layer else head, conventions, of_classes.get(layer, {}), pairs)
            for layer, own in statistics.items()
        },
        num_samples=int(stats.counts.sum()),
        feature_dim=stats.means.shape[1],
        cosines=_cosines(stats, classes),
        cosine_classes=classes,
        head=None if head is None else head.name,
        normalizes=head is not None and head.normalizes,
        rank=None if last is None or math.isnan(last) else int(last),
        left_out=left_out,
        seconds=time.perf_counter() - start,
    )


def build_unlabelled(values: Mapping[str, Tensor], stats: ClassStatistics, head: Head, start: float) -> Measurement:
    """Return a measurement of data without meaningful labels, which therefore has no classes.

    Args:
        values: Values of the measures by name.
        stats: Statistics of all samples.
        head: The head.
        start: Start of the measurement by ``time.perf_counter``.
    """
    none = np.zeros(0, dtype=np.int64)
    return Measurement(
        {name: float(value) for name, value in values.items()},
        {"": {"class": none, "count": none}},
        num_samples=int(stats.counts.sum()),
        feature_dim=stats.means.shape[1],
        head=head.name,
        normalizes=head.normalizes,
        seconds=time.perf_counter() - start,
    )


def _table(
    stats: ClassStatistics,
    head: Head | None,
    conventions: Conventions,
    decisions: Mapping[str, Tensor],
    pairs: bool,
) -> dict[str, NDArray[Any]]:
    """Return the values for each class, as columns of a table."""
    weight = None if head is None else head.weight.to(stats.means)
    columns = per_class_values(MeasureInput(stats, weight, None, *conventions), pairs) | dict(decisions)
    names = list(columns)
    values = torch.stack([columns[name].double() for name in names]).cpu().numpy()
    table: dict[str, NDArray[Any]] = dict(zip(names, values, strict=True))
    return {"class": np.arange(len(stats.counts)), **table, "count": table["count"].astype(np.int64)}


def _evenly_spaced(num_classes: int) -> NDArray[np.int64]:
    step = -(-num_classes // _MAX_DRAWN)
    return np.arange(0, num_classes, step, dtype=np.int64)


def _cosines(stats: ClassStatistics, classes: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the cosines of the centred means of some classes; nan for a class without samples."""
    index = torch.from_numpy(classes).to(stats.means.device)
    rows = unit_rows(stats.centred_means.index_select(0, index))
    rows = torch.where(stats.present.index_select(0, index).unsqueeze(1), rows, torch.nan)
    cosines: NDArray[np.float32] = (rows @ rows.T).clamp(-1, 1).float().cpu().numpy()
    return cosines
