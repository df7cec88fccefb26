"""Unconstrained feature models with any convex loss, targets and counts: optimum, gap, distance, curvature."""

from nclightning.problems.contract import assert_problem_contract
from nclightning.problems.cross_entropy import BinaryCrossEntropy, CrossEntropy
from nclightning.problems.known import KnownProblem
from nclightning.problems.loss import Loss
from nclightning.problems.members.balanced import balanced_ce, balanced_mse
from nclightning.problems.members.multi_label import multi_label_bce
from nclightning.problems.members.regression import regression, regression_gram
from nclightning.problems.members.soft import label_smoothing, mixup, soft_labels
from nclightning.problems.members.squared import mse_with_penalized_bias, mse_without_bias, unbalanced_mse
from nclightning.problems.members.unbalanced_ce import logit_adjusted_ce, unbalanced_ce, weighted_ce
from nclightning.problems.no_answer import NoAnswer
from nclightning.problems.optimum import Optimum
from nclightning.problems.orbit import Solution
from nclightning.problems.problem import Problem
from nclightning.problems.rates import Momentum, Rates
from nclightning.problems.spectrum import Eigenvalue
from nclightning.problems.squared_error import SquaredError
from nclightning.problems.thresholds import rank_thresholds

__all__ = [
    "BinaryCrossEntropy",
    "CrossEntropy",
    "Eigenvalue",
    "KnownProblem",
    "Loss",
    "Momentum",
    "NoAnswer",
    "Optimum",
    "Problem",
    "Rates",
    "Solution",
    "SquaredError",
    "assert_problem_contract",
    "balanced_ce",
    "balanced_mse",
    "label_smoothing",
    "logit_adjusted_ce",
    "mixup",
    "mse_with_penalized_bias",
    "mse_without_bias",
    "multi_label_bce",
    "rank_thresholds",
    "regression",
    "regression_gram",
    "soft_labels",
    "unbalanced_ce",
    "unbalanced_mse",
    "weighted_ce",
]
