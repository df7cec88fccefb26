"""Measures of neural collapse as pure functions of tensors. They need torch only.

Accuracy for float64 features: values are right to about nine digits, with three limits. Here eps is the machine epsilon
of float64, 2e-16.

- A measure that falls linearly with the distance from an ETF or from self-duality has an absolute error of about eps,
  because the rows themselves are rounded.
- Let the class means differ along one direction by t times as much as along another, with t < 1. The smaller
  difference enters with a relative error of eps / t.
- Let the spread within classes orthogonal to the class means be c times as large as the class means. Rounding then
  turns the directions of the class means by about c eps, which affects every measure along these directions.
"""

from nclightning.functional.buffer import StatisticsBuffer, class_statistics
from nclightning.functional.curvature import (
    ExtremeEigenvalues,
    dense_hessian,
    dense_spectrum,
    extreme_eigenvalues,
    hessian_vector_product,
)
from nclightning.functional.decisions import (
    accuracy,
    bias_collapse,
    cosine_margin,
    ncc_accuracy,
    ncc_mismatch,
    nearest_class_centre,
)
from nclightning.functional.distance import CollapseDistance, distance_to_collapse
from nclightning.functional.duality import class_alignment, duality_difference, self_duality, uniform_duality
from nclightning.functional.excess import ExcessLoss, HeadLoss
from nclightning.functional.geometry import equiangularity, equinorm, etf_deviation, head_sum
from nclightning.functional.laws import GradientStep, balance_deviation, balance_residual, predict_row_sum
from nclightning.functional.mse import MSEDecomposition, mse_decomposition
from nclightning.functional.ood import ood_orthogonality
from nclightning.functional.regression import (
    GramDeviation,
    UnitResiduals,
    gram_deviation,
    principal_residual,
    row_space_residual,
    sample_statistics,
    target_rank,
    unit_residuals,
)
from nclightning.functional.statistics import ClassStatistics
from nclightning.functional.uniformity import PairEnergy, hyperspherical_energy, one_vs_rest_distance
from nclightning.functional.variability import (
    between_class_rank,
    class_distance_normalized_variance,
    variability_collapse_index,
    within_between_ratio,
    within_class_variability,
)

__all__ = [
    "ClassStatistics",
    "CollapseDistance",
    "ExcessLoss",
    "ExtremeEigenvalues",
    "GradientStep",
    "GramDeviation",
    "HeadLoss",
    "MSEDecomposition",
    "PairEnergy",
    "StatisticsBuffer",
    "UnitResiduals",
    "accuracy",
    "balance_deviation",
    "balance_residual",
    "between_class_rank",
    "bias_collapse",
    "class_alignment",
    "class_distance_normalized_variance",
    "class_statistics",
    "cosine_margin",
    "dense_hessian",
    "dense_spectrum",
    "distance_to_collapse",
    "duality_difference",
    "equiangularity",
    "equinorm",
    "etf_deviation",
    "extreme_eigenvalues",
    "gram_deviation",
    "head_sum",
    "hessian_vector_product",
    "hyperspherical_energy",
    "mse_decomposition",
    "ncc_accuracy",
    "ncc_mismatch",
    "nearest_class_centre",
    "one_vs_rest_distance",
    "ood_orthogonality",
    "predict_row_sum",
    "principal_residual",
    "row_space_residual",
    "sample_statistics",
    "self_duality",
    "target_rank",
    "uniform_duality",
    "unit_residuals",
    "variability_collapse_index",
    "within_between_ratio",
    "within_class_variability",
]
