"""The measures of neural collapse by the names under which they are logged."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nclightning import functional as F
from nclightning.errors import UserError, listed, nearest
from nclightning.functional.linear import norm
from nclightning.functional.statistics import BetweenWeights, ClassStatistics, GlobalMean

__all__ = [
    "DEFAULT_MEASURES",
    "DEFAULT_MEASURES_OF_GROUPS",
    "MEASURES",
    "Meaning",
    "Measure",
    "MeasureInput",
    "meaning_of",
    "per_class_values",
    "select_measures",
]


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


# Value at collapse: a number, or a function of K and d; None where it is not known.
Collapsed = float | Callable[[int, int], float | None] | None


class Meaning(NamedTuple):
    """The meaning of a value.

    Attributes:
        text: The meaning in a few words.
        collapsed: The value at neural collapse.
    """

    text: str = ""
    collapsed: Collapsed = 0.0

    def at_collapse(self, num_classes: int, feature_dim: int) -> float | None:
        """Return the value at collapse for given sizes; None if it is not known."""
        return self.collapsed(num_classes, feature_dim) if callable(self.collapsed) else self.collapsed


class Measure(NamedTuple):
    """A measure and what it needs.

    Attributes:
        read: Function that evaluates the measure to a scalar.
        text: Its meaning in a few words.
        collapsed: Its value at neural collapse.
        needs_head: Whether it needs the head.
        needs_scatter: Whether it needs the ``(d, d)`` scatter.
        needs_classes: Whether labels must be classes, each with its own row of the head or direction of the mean.
    """

    read: Callable[[MeasureInput], Tensor]
    text: str = ""
    collapsed: Collapsed = 0.0
    needs_head: bool = False
    needs_scatter: bool = False
    needs_classes: bool = False


def _worst(alignment: Tensor, present: Tensor) -> Tensor:
    """Return the least cosine among the present classes."""
    return torch.where(present.any(), torch.where(present, alignment, 1).amin(), torch.nan)


def _of_an_etf(value: Callable[[int], float]) -> Collapsed:
    """Return a value for the sizes for which a simplex ETF exists, K <= d + 1, and None for others."""
    return lambda num_classes, feature_dim: value(num_classes) if 2 <= num_classes <= feature_dim + 1 else None


_ZERO_OF_AN_ETF = _of_an_etf(lambda _: 0.0)

MEASURES: dict[str, Measure] = {
    "nc0": Measure(lambda r: F.head_sum(r.head), "norm of the sum of the head's rows", needs_head=True),
    "nc1": Measure(
        lambda r: F.within_class_variability(r.stats, *r.conventions),
        "spread within over between classes, tr(S_W S_B^+)/K",
        needs_scatter=True,
        needs_classes=True,
    ),
    "nc1_rank": Measure(
        lambda r: F.between_class_rank(r.stats, *r.conventions),
        "directions along which class means spread",
        lambda num_classes, feature_dim: min(num_classes - 1, feature_dim),
        needs_scatter=True,
        needs_classes=True,
    ),
    "nc1_ratio": Measure(
        lambda r: F.within_between_ratio(r.stats, *r.conventions),
        "spread within over between classes, tr(S_W)/tr(S_B)",
    ),
    "nc1_cdnv": Measure(
        lambda r: F.class_distance_normalized_variance(r.stats),
        "variance over squared distance, mean over pairs of classes",
    ),
    "nc1_cdnv_worst": Measure(
        lambda r: F.class_distance_normalized_variance(r.stats, "max"),
        "variance over squared distance, worst pair of classes",
    ),
    "nc1_vci": Measure(
        lambda r: F.variability_collapse_index(r.stats),
        "share of the covariance that class means do not explain",
        needs_scatter=True,
        needs_classes=True,
    ),
    "nc2": Measure(
        lambda r: F.etf_deviation(r.head), "distance of the head from a simplex ETF", _ZERO_OF_AN_ETF, needs_head=True
    ),
    "nc2_centred": Measure(
        lambda r: F.etf_deviation(r.head, centred=True),
        "distance of the head minus its mean row from a simplex ETF",
        _ZERO_OF_AN_ETF,
        needs_head=True,
    ),
    "nc2_means": Measure(
        lambda r: F.etf_deviation(r.stats.mean_offsets, present=r.stats.present),
        "distance of the class means from a simplex ETF",
        _ZERO_OF_AN_ETF,
        needs_classes=True,
    ),
    "nc2_equinorm_head": Measure(
        lambda r: F.equinorm(r.head), "how much norms of the head's rows vary", needs_head=True
    ),
    "nc2_equinorm_means": Measure(
        lambda r: F.equinorm(r.stats.mean_offsets, r.stats.present),
        "how much norms of class means vary",
        needs_classes=True,
    ),
    "nc2_equiangularity_head": Measure(
        lambda r: F.equiangularity(r.head),
        "how far cosines of the head's rows are from -1/(K-1), mean",
        _ZERO_OF_AN_ETF,
        needs_head=True,
    ),
    "nc2_equiangularity_means": Measure(
        lambda r: F.equiangularity(*r.means),
        "how far cosines of class means are from -1/(K-1), mean",
        _ZERO_OF_AN_ETF,
        needs_classes=True,
    ),
    "nc2_equiangularity_worst": Measure(
        lambda r: F.equiangularity(*r.means, reduction="max"),
        "how far cosines of class means are from -1/(K-1), worst",
        _ZERO_OF_AN_ETF,
        needs_classes=True,
    ),
    "gnc2_energy": Measure(
        lambda r: F.hyperspherical_energy(r.means[0], present=r.means[1]).mean,
        "mean of log(1/distance) between directions of class means",
        _of_an_etf(lambda num_classes: -math.log(2 * num_classes / (num_classes - 1)) / 2),
        needs_classes=True,
    ),
    "gnc2_energy_variance": Measure(
        lambda r: F.hyperspherical_energy(r.means[0], present=r.means[1]).variance,
        "variance of log(1/distance) between directions of class means",
        _ZERO_OF_AN_ETF,
        needs_classes=True,
    ),
    "nc3": Measure(
        lambda r: F.self_duality(r.stats, r.head),
        "distance of head times class means from a simplex ETF",
        _ZERO_OF_AN_ETF,
        needs_head=True,
        needs_classes=True,
    ),
    "nc3_difference": Measure(
        lambda r: F.duality_difference(r.stats, r.head),
        "squared distance of head and class means, both of norm 1",
        needs_head=True,
        needs_classes=True,
    ),
    "nc3_cosine": Measure(
        lambda r: r.alignment.sum() / r.stats.present.sum(),
        "cosine of class mean and row of the head, mean",
        1.0,
        needs_head=True,
        needs_classes=True,
    ),
    "nc3_cosine_worst": Measure(
        lambda r: _worst(r.alignment, r.stats.present),
        "cosine of class mean and row of the head, worst class",
        1.0,
        needs_head=True,
        needs_classes=True,
    ),
    "nc3_uniform": Measure(
        lambda r: F.uniform_duality(r.stats, r.head),
        "variance over classes of the cosine of mean and row",
        needs_head=True,
        needs_classes=True,
    ),
    "bias_collapse": Measure(
        lambda r: F.bias_collapse(r.stats, r.head, r.bias),
        "norm of the logits of the mean feature",
        needs_head=True,
        needs_classes=True,
    ),
    "nc_distance": Measure(
        lambda r: F.distance_to_collapse(r.stats, r.head).distance,
        "relative distance of features and head from collapse",
        needs_head=True,
        needs_classes=True,
    ),
    "mse_nc1": Measure(
        lambda r: F.mse_decomposition(r.stats, r.head, r.bias).nc1,
        "squared error of the best head from spread within classes",
        needs_head=True,
        needs_scatter=True,
        needs_classes=True,
    ),
    "mse_nc2_nc3": Measure(
        lambda r: F.mse_decomposition(r.stats, r.head, r.bias).nc2_nc3,
        "squared error of the best head on class means; 0 with a bias",
        None,
        needs_head=True,
        needs_scatter=True,
        needs_classes=True,
    ),
    "mse_perpendicular": Measure(
        lambda r: F.mse_decomposition(r.stats, r.head, r.bias).perpendicular,
        "squared error that the head has more than the best one",
        None,
        needs_head=True,
        needs_scatter=True,
        needs_classes=True,
    ),
}
# Measures that need single samples or two data sets, and not the statistics alone.
_FURTHER_MEANINGS = {
    "ncc_accuracy": Meaning("share of samples whose nearest class mean is their own", 1.0),
    "ncc_mismatch": Meaning("share of samples on which network and nearest class mean differ (NC4)"),
    "accuracy": Meaning("share of samples that the network decides rightly", 1.0),
    "cosine_margin": Meaning(
        "cosine with the own row of the head minus that with the next best, mean",
        _of_an_etf(lambda num_classes: num_classes / (num_classes - 1)),
    ),
    "nc5": Meaning("mean |cosine| of class means and the mean of out-of-distribution features"),
}


def meaning_of(name: str) -> Meaning:
    """Return the meaning of a logged value.

    Args:
        name: Its name without the data set or layer in front of it. Unknown names have an empty meaning.
    """
    if name in MEASURES:
        return Meaning(MEASURES[name].text, MEASURES[name].collapsed)
    return _FURTHER_MEANINGS.get(name, Meaning(collapsed=None))


DEFAULT_MEASURES = ("nc1", "nc2", "nc3")
DEFAULT_MEASURES_OF_GROUPS = ("nc1_ratio", "nc1_cdnv", "nc2")


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
