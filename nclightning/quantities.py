r"""The registry of measured quantities: their tags, labels, meanings, values at collapse, axes and charts.

A tag such as ``nc/train/nc1`` has three parts: the group (``nc``), the place (a stage, a data set, a loader or a layer;
most groups have none) and the name. Quantities that fall over many decades are logged a second time as
``log10/<tag>``, because the axis of TensorBoard is linear.

A new measure needs an entry here, and its function in :data:`nclightning.metrics.MEASURES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

__all__ = [
    "ANGLES",
    "BALANCE",
    "BALANCE_RESIDUAL",
    "BIAS_SUM",
    "CERTIFIED_GAP",
    "CONVERGING",
    "DECISION_NAMES",
    "DEFAULT_MEASURES",
    "DEFAULT_MEASURES_OF_GROUPS",
    "DISTANCE",
    "ERROR_BOUND_RATIO",
    "EVALUATIONS",
    "GAP",
    "GRAD_NORM",
    "GROUPS",
    "HEAD_SUM",
    "LAWS",
    "LINE_SEARCH",
    "LOSS",
    "MEASURE_NAMES",
    "NC",
    "NC0",
    "NC1",
    "NC2",
    "NC3",
    "NC5",
    "NRC",
    "OPTIMALITY",
    "PREDICTED_DECAY",
    "QUANTITIES",
    "REGRESSION",
    "RELATIVE_DISTANCE",
    "SHARPNESS",
    "SHARPNESS_OVER_LIMIT",
    "STEP_SIZE",
    "Collapsed",
    "Quantity",
    "Tag",
    "log10_tag",
    "measure_named",
    "mirrored_tags",
    "parse_tag",
    "quantity_of",
    "tag_of",
    "tagged",
]

# Groups of tags.
NC, NRC, OPTIMALITY, LINE_SEARCH, LAWS = "nc", "nrc", "optimality", "line_search", "laws"
GROUPS = (NC, NRC, OPTIMALITY, LINE_SEARCH, LAWS)
_LOG10 = "log10"

# A number, or a function of the numbers of classes and features; None if the value is not known.
Collapsed = float | Callable[[int, int], float | None] | None
Axis = Literal["log", "linear"]
Value = TypeVar("Value")


def tag_of(group: str, *path: str) -> str:
    """Return the tag of a group, a place and a name.

    Args:
        group: The group.
        *path: Place and name. Empty parts are left out.
    """
    return "/".join(filter(None, (group, *path)))


@dataclass(frozen=True)
class Quantity:
    """A measured quantity.

    Attributes:
        name: Last part of its tag.
        group: First part of its tag; empty for ``loss``, whose tag is its name.
        meaning: Its meaning in a few words.
        label: Label in tables and legends; empty for the name.
        latex: Label in figures of the paper; empty for ``label``.
        formula: Formula that follows the label if there is space for it.
        collapsed: Its value at neural collapse; for optimality, laws and regression its value at the optimum.
        axis: Scale of the axis on which it is drawn.
        signed: Whether it can be negative.
        unit: Its unit; empty for plain numbers.
        mirrored: Whether its logarithm is logged, too, in runs that log at iterates. If labels number groups of
            samples, this holds for ``DEFAULT_MEASURES_OF_GROUPS``.
        chart: Title of the panel in which it is drawn with others.
        maker: Source of the value. ``"measure"`` and ``"decision"`` are chosen by name in ``measures=``.
    """

    name: str
    group: str
    meaning: str = ""
    label: str = ""
    latex: str = ""
    formula: str = ""
    collapsed: Collapsed = None
    axis: Axis = "log"
    signed: bool = False
    unit: str = ""
    mirrored: bool = False
    chart: str = ""
    maker: str = ""

    def tag(self, *place: str) -> str:
        """Return the tag, such as ``nc/train/nc1``.

        Args:
            *place: Stage or data set; if there are several, also the loader or layer. Empty parts are left out.
        """
        return tag_of(self.group, *place, self.name)

    @property
    def text(self) -> str:
        """The label, or the name if there is none."""
        return self.label or self.name

    @property
    def text_with_formula(self) -> str:
        """The label, followed by the formula."""
        return f"{self.text} {self.formula}".rstrip()

    def at_collapse(self, num_classes: int, feature_dim: int) -> float | None:
        """Return the value at collapse for these numbers of classes and features; None if it is not known."""
        return self.collapsed(num_classes, feature_dim) if callable(self.collapsed) else self.collapsed


def _of_an_etf(value: Callable[[int], float]) -> Collapsed:
    """Return a function that gives a value at a simplex ETF, and None if there are fewer than K - 1 dimensions."""
    return lambda num_classes, feature_dim: value(num_classes) if 2 <= num_classes <= feature_dim + 1 else None


_ZERO_OF_AN_ETF = _of_an_etf(lambda _: 0.0)
_COLLAPSE = "Neural collapse"

# Measures that are evaluated if the user names none.
DEFAULT_MEASURES = ("nc1", "nc2", "nc3")
DEFAULT_MEASURES_OF_GROUPS = ("nc1_ratio", "nc1_cdnv", "nc2")  # Used if labels number groups of samples.


def _measure(
    name: str,
    meaning: str,
    collapsed: Collapsed = 0.0,
    *,
    axis: Axis = "log",
    signed: bool = False,
    unit: str = "",
) -> Quantity:
    """Return the entry of a measure. NC0 to NC3 get a label."""
    number = name.removeprefix("nc")
    label, latex = (f"NC{number}", rf"$\mathcal{{NC}}_{number}$") if number.isdigit() else ("", "")
    return Quantity(
        name,
        NC,
        meaning,
        label,
        latex,
        collapsed=collapsed,
        axis=axis,
        signed=signed,
        unit=unit,
        mirrored=name in DEFAULT_MEASURES,
        chart=_COLLAPSE,
        maker="measure",
    )


def _decision(
    name: str, meaning: str, collapsed: Collapsed, *, axis: Axis = "linear", signed: bool = False
) -> Quantity:
    """Return the entry of a measure of decisions."""
    return Quantity(
        name, NC, meaning, collapsed=collapsed, axis=axis, signed=signed, chart="Decisions", maker="decision"
    )


_MEASURES = (
    _measure("nc0", "norm of the sum of the head's rows"),
    _measure("nc1", "within-class relative to between-class variability, tr(S_W S_B^+)/K"),
    _measure(
        "nc1_rank",
        "rank of the between-class covariance",
        lambda num_classes, feature_dim: min(num_classes - 1, feature_dim),
        axis="linear",
        unit="directions",
    ),
    _measure("nc1_ratio", "within-class relative to between-class variability, tr(S_W)/tr(S_B)"),
    _measure("nc1_cdnv", "class-distance normalized variance (CDNV), mean over pairs of classes"),
    _measure("nc1_cdnv_worst", "class-distance normalized variance (CDNV), worst pair of classes"),
    _measure("nc1_vci", "share of the total covariance that the class means do not explain (VCI)"),
    _measure("nc2", "distance of the head from a simplex ETF", _ZERO_OF_AN_ETF),
    _measure("nc2_centred", "distance of the head, with its mean row subtracted, from a simplex ETF", _ZERO_OF_AN_ETF),
    _measure("nc2_means", "distance of the class means from a simplex ETF", _ZERO_OF_AN_ETF),
    _measure("nc2_equinorm_head", "coefficient of variation of the norms of the head's rows"),
    _measure("nc2_equinorm_means", "coefficient of variation of the norms of the centred class means"),
    _measure(
        "nc2_equiangularity_head",
        "mean absolute deviation of cosines between the head's rows from -1/(K-1)",
        _ZERO_OF_AN_ETF,
    ),
    _measure(
        "nc2_equiangularity_means",
        "mean absolute deviation of cosines between class means from -1/(K-1)",
        _ZERO_OF_AN_ETF,
    ),
    _measure(
        "nc2_equiangularity_worst",
        "largest absolute deviation of cosines between class means from -1/(K-1)",
        _ZERO_OF_AN_ETF,
    ),
    _measure(
        "gnc2_energy",
        "mean of log(1/distance) over pairs of normalized class means",
        _of_an_etf(lambda num_classes: -math.log(2 * num_classes / (num_classes - 1)) / 2),
        axis="linear",
        signed=True,
    ),
    _measure(
        "gnc2_energy_variance", "variance of log(1/distance) over pairs of normalized class means", _ZERO_OF_AN_ETF
    ),
    _measure("nc3", "distance of the product of head and class means from a simplex ETF", _ZERO_OF_AN_ETF),
    _measure("nc3_difference", "squared distance between head and class means, each divided by its norm"),
    _measure(
        "nc3_cosine",
        "cosine between class mean and row of the head, mean over classes",
        1.0,
        axis="linear",
        signed=True,
    ),
    _measure(
        "nc3_cosine_worst",
        "cosine between class mean and row of the head, worst class",
        1.0,
        axis="linear",
        signed=True,
    ),
    _measure("nc3_uniform", "variance over classes of the cosine between class mean and row of the head"),
    _measure("bias_collapse", "norm of the logits at the mean feature"),
    _measure("nc_distance", "relative distance of features and head from collapse"),
    _measure("mse_nc1", "squared error of the optimal head that is due to within-class variability"),
    _measure("mse_nc2_nc3", "squared error of the optimal head at class means; at collapse 0 with a bias", None),
    _measure("mse_perpendicular", "squared error of the head minus that of the optimal head", None),
)
# Measures of decisions, which need the class means and then each sample.
_DECISIONS = (
    _decision("ncc_accuracy", "share of samples whose nearest class mean is that of their own class", 1.0),
    _decision(
        "ncc_mismatch", "share of samples on which network and nearest class mean disagree (NC4)", 0.0, axis="log"
    ),
    _decision("accuracy", "share of samples that the network classifies correctly", 1.0),
    _decision(
        "cosine_margin",
        "cosine to the row of the true class minus the largest to another row, mean",
        _of_an_etf(lambda num_classes: num_classes / (num_classes - 1)),
        signed=True,
    ),
)
NC5 = Quantity(
    "nc5",
    NC,
    "mean |cosine| between class means and the mean out-of-distribution feature",
    label="NC5",
    latex=r"$\mathcal{NC}_5$",
    collapsed=0.0,
    chart=_COLLAPSE,
    maker="out-of-distribution set",
)
# A picture, not a number.
ANGLES = Quantity("angles", NC, "picture of the cosines between class means and rows of the head", maker="picture")


def _optimality(
    name: str,
    meaning: str,
    label: str,
    collapsed: float | None = 0.0,
    *,
    latex: str = "",
    formula: str = "",
    axis: Axis = "log",
    signed: bool = False,
    mirrored: bool = False,
    chart: str = "Optimality",
) -> Quantity:
    """Return the entry of a quantity of the optimality monitor."""
    return Quantity(
        name,
        OPTIMALITY,
        meaning,
        label,
        latex,
        formula,
        collapsed,
        axis,
        signed,
        mirrored=mirrored,
        chart=chart,
        maker="OptimalityMonitor",
    )


LOSS = Quantity("loss", "", "the training objective", "F", axis="linear", chart="Objective", maker="OptimalityMonitor")
GAP = _optimality("gap", "objective minus its minimum", "gap", latex="$F^k - F^*$", formula="F - F*", mirrored=True)
CERTIFIED_GAP = _optimality(
    "certified_gap",
    "objective minus a certified lower bound on its minimum",
    "certified gap",
    latex="$F^k - F^*$, certified",
    mirrored=True,
)
DISTANCE = _optimality("distance", "distance of head and features from the set of optima", "distance", mirrored=True)
GRAD_NORM = _optimality("grad_norm", "norm of the gradient over all parameters", "gradient norm", mirrored=True)
ERROR_BOUND_RATIO = _optimality(
    "error_bound_ratio",
    "distance divided by gradient norm; at most kappa near the optimum",
    "error-bound ratio",
    None,
    formula="distance / gradient norm",
    axis="linear",
    chart="Error bound",
)
PREDICTED_DECAY = _optimality(
    "predicted_decay",
    "decay of the gap's slowest mode that the theory predicts; 1 at the start",
    "predicted decay",
    mirrored=True,
)
RELATIVE_DISTANCE = _optimality("relative_distance", "distance divided by the norm of the optimum", "relative distance")
_BOUND_AND_PENALTIES = (
    _optimality(
        *("certified_bound", "certified lower bound on the minimum of F", "certified bound", None),
        axis="linear",
        signed=True,
        chart="Objective",
    ),
    _optimality(
        "lambda_w",
        "penalty on the head at which the scales of head and features are optimal",
        "lambda_w",
        None,
        chart="Penalties",
    ),
    _optimality(
        "lambda_h",
        "penalty on the features at which the scales of head and features are optimal",
        "lambda_h",
        None,
        chart="Penalties",
    ),
)


def _search(name: str, meaning: str, label: str, axis: Axis = "log", unit: str = "") -> Quantity:
    """Return the entry of a quantity of the line search."""
    return Quantity(
        name, LINE_SEARCH, meaning, label, axis=axis, unit=unit, chart="Line search", maker="OptimalityMonitor"
    )


STEP_SIZE = _search("step_size", "step size that led to the iterate", "step size")
EVALUATIONS = _search(
    "evaluations", "evaluations of F and its gradient since the start", "evaluations", "linear", "evaluations"
)


def _law(name: str, meaning: str, collapsed: float | None = None, *, mirrored: bool = False) -> Quantity:
    """Return the entry of a quantity of the optimizer's laws."""
    return Quantity(
        name,
        LAWS,
        meaning,
        collapsed=collapsed,
        mirrored=mirrored,
        chart="Laws of the optimizer",
        maker="OptimizerLaws",
    )


# For each sum: its norm, its prediction, the distance of the two, and the contribution of a step of Adam. Logarithms of
# predictions are not logged, because predictions fall far below rounding and would stretch the axis.
HEAD_SUM = (
    _law("nc0_norm", "norm of the sum of the head's rows", mirrored=True),
    _law("nc0_predicted", "predicted norm of the sum of the head's rows, if its law holds"),
    _law("nc0_residual", "relative deviation of the rows' sum from its law since the last reading", 0.0),
    _law("nc0_forcing", "what Adam's steps add to the sum of the head's rows, per unit of step length"),
)
BIAS_SUM = (
    _law("bias_sum", "absolute value of the sum of the head's biases"),
    _law("bias_sum_predicted", "predicted absolute value of the sum of the head's biases, if its law holds"),
    _law("bias_sum_residual", "relative deviation of the biases' sum from its law since the last reading", 0.0),
    _law("bias_sum_forcing", "what Adam's steps add to the sum of the head's biases, per unit of step length"),
)
BALANCE = _law("balance", "relative difference between lambda_w W^T W and lambda_h H^T H", 0.0, mirrored=True)
BALANCE_RESIDUAL = _law("balance_residual", "relative deviation of the balance from its law in the last step", 0.0)
SHARPNESS = _law("sharpness", "largest eigenvalue of the Hessian of the training objective")
SHARPNESS_OVER_LIMIT = _law(
    "sharpness_over_limit", "sharpness divided by the largest one at which the optimizer is stable"
)


def _regression(name: str, meaning: str, label: str, collapsed: float | None = 0.0, axis: Axis = "log") -> Quantity:
    """Return the entry of a measure of regression collapse."""
    return Quantity(
        name,
        NRC,
        meaning,
        label,
        collapsed=collapsed,
        axis=axis,
        mirrored=collapsed is not None,
        chart="Regression collapse",
        maker="RegressionCollapseMonitor",
    )


REGRESSION = (
    _regression("nrc1", "share of the features' variance outside their leading principal components", "NRC1"),
    _regression("nrc2", "share of the features' variance outside the row space of the head", "NRC2"),
    _regression("nrc3", "squared distance of the head's Gram matrix from its form at collapse", "NRC3"),
    _regression("gamma", "gamma at which the form at collapse fits the head's Gram matrix best", "gamma", None),
    _regression("rank", "dimension of the span of the centred targets", "rank of the targets", None, "linear"),
)

# All of them, by tag without the place: "nc/nc1", "optimality/gap", "loss".
QUANTITIES = {
    each.tag(): each
    for each in (
        *(LOSS, GAP, CERTIFIED_GAP, DISTANCE, GRAD_NORM, ERROR_BOUND_RATIO, PREDICTED_DECAY, RELATIVE_DISTANCE),
        *_BOUND_AND_PENALTIES,
        *_MEASURES,
        *_DECISIONS,
        NC5,
        ANGLES,
        *(STEP_SIZE, EVALUATIONS),
        *(*HEAD_SUM, *BIAS_SUM, BALANCE, BALANCE_RESIDUAL, SHARPNESS, SHARPNESS_OVER_LIMIT),
        *REGRESSION,
    )
}
MEASURE_NAMES = tuple(each.name for each in _MEASURES)
DECISION_NAMES = tuple(each.name for each in _DECISIONS)
NC0, NC1, NC2, NC3 = (QUANTITIES[f"{NC}/nc{number}"] for number in range(4))


def tagged(values: Mapping[str, Value], group: str, *place: str) -> dict[str, Value]:
    """Return values by tag, with group and place before their names.

    Args:
        values: Values by name, or by place and name with a slash between them.
        group: The group.
        *place: Stage or data set.

    Returns:
        Values by tag.
    """
    return {tag_of(group, *place, name): value for name, value in values.items()}


def log10_tag(tag: str) -> str:
    """Return the tag of the logarithm of a value."""
    return f"{_LOG10}/{tag}"


def mirrored_tags(group: str, *place: str) -> frozenset[str]:
    """Return the tags of a group whose logarithms are logged, too.

    Args:
        group: The group.
        *place: Stage or data set.
    """
    return frozenset(each.tag(*place) for each in QUANTITIES.values() if each.mirrored and each.group == group)


class Tag(NamedTuple):
    """The parts of a tag.

    Attributes:
        group: One of ``GROUPS``, or empty.
        place: Stage or data set, loader and layer, with slashes between them; empty for most groups.
        name: Name of the quantity.
        is_log10: Whether it is the tag of a logarithm.
    """

    group: str
    place: str
    name: str
    is_log10: bool = False


def parse_tag(tag: str) -> Tag:
    """Split a tag into its parts. A tag that does not begin with one of ``GROUPS`` has only place and name.

    Args:
        tag: Any tag.

    Example:
        >>> parse_tag("log10/nc/train/nc1")
        Tag(group='nc', place='train', name='nc1', is_log10=True)
    """
    is_log10 = tag.startswith(f"{_LOG10}/")
    place, _, name = tag.removeprefix(f"{_LOG10}/").rpartition("/")
    first, _, rest = place.partition("/")
    return Tag(first, rest, name, is_log10) if first in GROUPS else Tag("", place, name, is_log10)


def quantity_of(tag: str) -> Quantity | None:
    """Return the quantity of a tag, for any place; None if the tag is not in the registry.

    Args:
        tag: The tag as loggers have it, perhaps that of a logarithm.

    Example:
        >>> quantity_of("nc/val/layer4/nc1").meaning
        'within-class relative to between-class variability, tr(S_W S_B^+)/K'
    """
    group, place, name, _ = parse_tag(tag)
    # Only these groups have places. A tag such as "train/loss" is the user's own.
    return None if place and group not in (NC, NRC) else QUANTITIES.get(tag_of(group, name))


def measure_named(name: str) -> Quantity:
    """Return a measure or decision by its name. An unknown one has no meaning and no value at collapse.

    Args:
        name: The name without stage or layer.
    """
    return QUANTITIES.get(tag_of(NC, name), Quantity(name, NC))


# Quantities that converge to zero in a run of the unconstrained feature model, by tag, in the order of tables and
# legends.
CONVERGING = {each.tag(): each for each in (GAP, CERTIFIED_GAP, DISTANCE, GRAD_NORM)} | {
    each.tag("train"): each for each in (NC1, NC2, NC3)
}
