"""How the measures of neural collapse are read; what they tell is in :mod:`nclightning.quantities`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nclightning import functional as F
from nclightning.errors import UserError, listed, nearest
from nclightning.functional.linear import norm
from nclightning.functional.statistics import BetweenWeights, ClassStatistics, GlobalMean

__all__ = ["MEASURES", "Measure", "Reading", "per_class_values", "select_measures"]


class Reading(NamedTuple):
    """What a measure reads.

    Attributes:
        stats: Statistics of the features.
        weight: Head ``(K, d)`` in the dtype of the statistics; None if unknown.
        bias: Its bias ``(K,)``, or None.
        global_mean: Convention of NC1.
        between_weights: Convention of NC1.
    """

    stats: ClassStatistics
    weight: Tensor | None = None
    bias: Tensor | None = None
    global_mean: GlobalMean = "class"
    between_weights: BetweenWeights = "uniform"

    @property
    def head(self) -> Tensor:
        """The weight of the head, known to be there."""
        assert self.weight is not None
        return self.weight

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """Centred class means and which of them are present."""
        return self.stats.centred_means, self.stats.present

    @property
    def alignment(self) -> Tensor:
        """Cosines of head and class means; zero for absent classes, ``nan`` only where one is undefined."""
        return torch.where(self.stats.present, F.class_alignment(self.stats, self.head), 0)

    @property
    def conventions(self) -> tuple[GlobalMean, BetweenWeights]:
        """Of the between-class covariance."""
        return self.global_mean, self.between_weights


class Measure(NamedTuple):
    """How a measure is read, and what it needs.

    Attributes:
        read: Evaluates it to a scalar.
        needs_head: Whether it reads the head.
        needs_scatter: Whether the light statistics are not enough.
        needs_classes: Whether it takes labels for classes, each with a row of the head or a direction of its own.
    """

    read: Callable[[Reading], Tensor]
    needs_head: bool = False
    needs_scatter: bool = False
    needs_classes: bool = False


def _worst(alignment: Tensor, present: Tensor) -> Tensor:
    return torch.where(present.any(), torch.where(present, alignment, 1).amin(), torch.nan)


MEASURES: dict[str, Measure] = {
    "nc0": Measure(lambda r: F.head_sum(r.head), needs_head=True),
    "nc1": Measure(
        lambda r: F.within_class_variability(r.stats, *r.conventions), needs_scatter=True, needs_classes=True
    ),
    "nc1_rank": Measure(
        lambda r: F.between_class_rank(r.stats, *r.conventions), needs_scatter=True, needs_classes=True
    ),
    "nc1_ratio": Measure(lambda r: F.within_between_ratio(r.stats, *r.conventions)),
    "nc1_cdnv": Measure(lambda r: F.class_distance_normalized_variance(r.stats)),
    "nc1_cdnv_worst": Measure(lambda r: F.class_distance_normalized_variance(r.stats, "max")),
    "nc1_vci": Measure(lambda r: F.variability_collapse_index(r.stats), needs_scatter=True, needs_classes=True),
    "nc2": Measure(lambda r: F.etf_deviation(r.head), needs_head=True),
    "nc2_centred": Measure(lambda r: F.etf_deviation(r.head, centred=True), needs_head=True),
    "nc2_means": Measure(lambda r: F.etf_deviation(r.stats.mean_offsets, present=r.stats.present), needs_classes=True),
    "nc2_equinorm_head": Measure(lambda r: F.equinorm(r.head), needs_head=True),
    "nc2_equinorm_means": Measure(lambda r: F.equinorm(r.stats.mean_offsets, r.stats.present), needs_classes=True),
    "nc2_equiangularity_head": Measure(lambda r: F.equiangularity(r.head), needs_head=True),
    "nc2_equiangularity_means": Measure(lambda r: F.equiangularity(*r.means), needs_classes=True),
    "nc2_equiangularity_worst": Measure(lambda r: F.equiangularity(*r.means, reduction="max"), needs_classes=True),
    "gnc2_energy": Measure(lambda r: F.hyperspherical_energy(r.means[0], present=r.means[1]).mean, needs_classes=True),
    "gnc2_energy_variance": Measure(
        lambda r: F.hyperspherical_energy(r.means[0], present=r.means[1]).variance, needs_classes=True
    ),
    "nc3": Measure(lambda r: F.self_duality(r.stats, r.head), needs_head=True, needs_classes=True),
    "nc3_difference": Measure(lambda r: F.duality_difference(r.stats, r.head), needs_head=True, needs_classes=True),
    "nc3_cosine": Measure(lambda r: r.alignment.sum() / r.stats.present.sum(), needs_head=True, needs_classes=True),
    "nc3_cosine_worst": Measure(lambda r: _worst(r.alignment, r.stats.present), needs_head=True, needs_classes=True),
    "nc3_uniform": Measure(lambda r: F.uniform_duality(r.stats, r.head), needs_head=True, needs_classes=True),
    "bias_collapse": Measure(lambda r: F.bias_collapse(r.stats, r.head, r.bias), needs_head=True, needs_classes=True),
    "nc_distance": Measure(
        lambda r: F.distance_to_collapse(r.stats, r.head).distance, needs_head=True, needs_classes=True
    ),
    "mse_nc1": Measure(
        lambda r: F.mse_decomposition(r.stats, r.head, r.bias).nc1,
        needs_head=True,
        needs_scatter=True,
        needs_classes=True,
    ),
    "mse_nc2_nc3": Measure(
        lambda r: F.mse_decomposition(r.stats, r.head, r.bias).nc2_nc3,
        needs_head=True,
        needs_scatter=True,
        needs_classes=True,
    ),
    "mse_perpendicular": Measure(
        lambda r: F.mse_decomposition(r.stats, r.head, r.bias).perpendicular,
        needs_head=True,
        needs_scatter=True,
        needs_classes=True,
    ),
}


def select_measures(names: Sequence[str], further: Sequence[str] = ()) -> tuple[str, ...]:
    """Check names of measures.

    Args:
        names: Names; ``("all",)`` stands for every one.
        further: Names of others, which the caller takes.

    Returns:
        The names.

    Raises:
        ValueError: If a name does not exist, stands twice, or there is none.
    """
    if isinstance(names, str):
        raise UserError(f"measures must be a sequence of names, got the string {names!r}; write ({names!r},).")
    if tuple(names) == ("all",):
        return tuple(MEASURES)
    unknown = [name for name in names if name not in MEASURES]
    if unknown or not names or len(set(names)) < len(names):
        more = f" Further names are {', '.join(further)}." if further else ""
        asked = nearest(unknown[0], (*MEASURES, *further)) if unknown else ""
        raise UserError(
            f"measures must be different names out of {listed(list(MEASURES))}; got {list(names)}.{more}{asked}"
        )
    return tuple(names)


def per_class_values(reading: Reading, pairs: bool = True) -> dict[str, Tensor]:
    """Evaluate what can be told class by class.

    Args:
        reading: Statistics and head.
        pairs: Whether also ``cdnv`` and ``equiangularity``, which look at all pairs of classes.

    Returns:
        As :meth:`nclightning.metrics.NeuralCollapse.per_class`.
    """
    stats = reading.stats
    values = {
        "count": stats.counts,
        "variance": stats.spreads / stats.counts,
        "mean_norm": torch.where(stats.present, norm(stats.mean_offsets, dim=1), torch.nan),
    }
    if pairs:
        values["cdnv"] = F.class_distance_normalized_variance(stats, "none")
        values["equiangularity"] = F.equiangularity(*reading.means, reduction="none")
    if reading.weight is not None:
        values["head_norm"] = norm(reading.weight, dim=1)
        values["nc3_cosine"] = F.class_alignment(stats, reading.weight)
    return values
