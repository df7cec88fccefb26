"""Choosing and evaluating measures. This module does not need torchmetrics."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import Tensor

from nclightning.errors import UserError
from nclightning.functional import ClassStatistics
from nclightning.functional.statistics import BetweenWeights, GlobalMean
from nclightning.heads import HeadSource, read_head
from nclightning.metrics.measures import (
    MEASURES,
    MeasureInput,
    select_measures,
)
from nclightning.quantities import DEFAULT_MEASURES, DEFAULT_MEASURES_OF_GROUPS

__all__ = ["check_conventions", "choose_measures", "evaluate_measures", "measure_input", "need_scatter"]

# With more features than this the scatter takes more than a GiB in float64, and is not a default.
_LARGEST_DEFAULT_DIM = 2**13 * 3 // 2
_LIGHT_DEFAULT = ("nc1_ratio", "nc1_cdnv", "nc2", "nc3")


def check_conventions(global_mean: GlobalMean, between_weights: BetweenWeights) -> None:
    """Raise an error for an unknown convention.

    Args:
        global_mean: As for :class:`nclightning.metrics.NeuralCollapse`.
        between_weights: As for :class:`nclightning.metrics.NeuralCollapse`.

    Raises:
        ValueError: If one of them is unknown.
    """
    ClassStatistics.empty(2, 1, scatter=False).between_root(global_mean, between_weights)


def choose_measures(
    measures: Sequence[str] | None, feature_dim: int, head_rows: int = 0, groups: bool = False
) -> tuple[str, ...]:
    """Return the names of the measures to evaluate.

    Args:
        measures: Names, ``("all",)``, or None for the default.
        feature_dim: d.
        head_rows: Number of rows of the head; 0 without a head.
        groups: Whether labels number groups of samples with the same target instead of classes.

    Raises:
        ValueError: If a name is unknown, or the measure needs a head or classes that are not given.
    """

    def needs_head(name: str) -> bool:
        return MEASURES[name].needs_head and head_rows < 2

    def needs_classes(name: str) -> bool:
        return MEASURES[name].needs_classes and groups

    def read(names: Sequence[str]) -> tuple[str, ...]:
        return tuple(name for name in names if not needs_head(name) and not needs_classes(name))

    if measures is None:
        measures = DEFAULT_MEASURES_OF_GROUPS if groups else DEFAULT_MEASURES
        if feature_dim > _LARGEST_DEFAULT_DIM and not groups:
            measures = _LIGHT_DEFAULT
            warnings.warn(
                f"feature_dim={feature_dim} would need {8 * feature_dim**2 / 2**30:.1f} GiB for the "
                "within-class scatter: measuring nc1_ratio and nc1_cdnv instead of nc1. Pass measures to choose.",
                stacklevel=3,
            )
        return read(measures)
    chosen = select_measures(measures)
    if tuple(measures) == ("all",):
        return read(chosen)
    if missing := [name for name in chosen if needs_classes(name)]:
        raise UserError(
            f"measures {missing} need labels that are classes, and the labels here number groups of samples with the "
            "same target: leave them out."
        )
    if missing := [name for name in chosen if needs_head(name)]:
        raise UserError(
            f"measures {missing} need the head: pass head=..., or leave them out."
            if head_rows == 0
            else f"measures {missing} compare rows of the head, which has only one: leave them out."
        )
    return chosen


def need_scatter(measures: Sequence[str]) -> bool:
    """Whether at least one measure needs the ``(d, d)`` scatter.

    Args:
        measures: Names of measures.
    """
    return any(MEASURES[name].needs_scatter for name in measures)


def measure_input(
    stats: ClassStatistics, head: HeadSource | None, global_mean: GlobalMean, between_weights: BetweenWeights
) -> MeasureInput:
    """Make the input of measures from statistics and the current values of the head.

    Args:
        stats: Statistics of the features.
        head: The head, or None.
        global_mean: Convention of NC1.
        between_weights: Convention of NC1.
    """
    if head is None:
        return MeasureInput(stats, None, None, global_mean, between_weights)
    read, like = read_head(head), stats.totals.means
    bias = None if read.bias is None else read.bias.to(like)
    return MeasureInput(stats, read.weight.to(like), bias, global_mean, between_weights)


def evaluate_measures(measures: Sequence[str], given: MeasureInput) -> dict[str, Tensor]:
    """Evaluate measures, without a transfer to the host.

    Args:
        measures: Names of measures.
        given: Their input.

    Returns:
        Scalars by name, in the dtype of the statistics.
    """
    return {name: MEASURES[name].read(given) for name in measures}
