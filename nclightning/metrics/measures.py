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

__all__ = ["MEASURES", "Measure", "MeasureInput", "per_class_values", "select_measures"]


class MeasureInput(NamedTuple):
    """The input of a measure.

    Attributes:
        stats: Statistics of the features.
        weight: Weight of the head ``(K, d)`` in the dtype of the statistics; None without a head.
        bias: Bias of the head ``(K,)``; None without one.
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
        """The weight of the head. Only measures with ``needs_head`` use it."""
        assert self.weight is not None
        return self.weight

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """Centred class means, and which of them are present."""
        return self.stats.centred_means, self.stats.present

    @property
    def alignment(self) -> Tensor:
        """Cosines between head and class means: zero for absent classes, ``nan`` where the cosine is undefined."""
        return torch.where(self.stats.present, F.class_alignment(self.stats, self.head), 0)

    @property
    def conventions(self) -> tuple[GlobalMean, BetweenWeights]:
        """The conventions of the between-class covariance."""
        return self.global_mean, self.between_weights


class Measure(NamedTuple):
    """A measure and what it needs.

    Attributes:
        read: Function that evaluates the measure to a scalar.
        needs_head: Whether it needs the head.
        needs_scatter: Whether it needs the ``(d, d)`` scatter.
        needs_classes: Whether labels must be classes, each with its own row of the head or direction of the mean.
    """

    read: Callable[[MeasureInput], Tensor]
    needs_head: bool = False
    needs_scatter: bool = False
    needs_classes: bool = False


def _worst(alignment: Tensor, present: Tensor) -> Tensor:
    """Return the least cosine among the present classes."""
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
        names: Names; ``("all",)`` stands for all of them.
        further: Further names that the caller accepts; they are only mentioned in the error.

    Returns:
        The names.

    Raises:
        ValueError: If a name is unknown or occurs twice, or if there are no names.
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


def per_class_values(given: MeasureInput, pairs: bool = True) -> dict[str, Tensor]:
    """Evaluate the measures that have a value for each class.

    Args:
        given: Statistics and head.
        pairs: Whether to include ``cdnv`` and ``equiangularity``, which need all pairs of classes.

    Returns:
        As for :meth:`nclightning.metrics.NeuralCollapse.per_class`.
    """
    stats = given.stats
    values = {
        "count": stats.counts,
        "variance": stats.spreads / stats.counts,
        "mean_norm": torch.where(stats.present, norm(stats.mean_offsets, dim=1), torch.nan),
    }
    if pairs:
        values["cdnv"] = F.class_distance_normalized_variance(stats, "none")
        values["equiangularity"] = F.equiangularity(*given.means, reduction="none")
    if given.weight is not None:
        values["head_norm"] = norm(given.weight, dim=1)
        values["nc3_cosine"] = F.class_alignment(stats, given.weight)
    return values
