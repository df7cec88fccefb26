"""One problem of each kind that is small enough for dense Hessians. Add a case here."""

import sys
from pathlib import Path

import torch

from nclightning import problems as of

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples" / "problems"))
from squared_hinge import one_against_rest

from nclightning.problems import Loss

SOFT = [[0.9, 0.1, 0.0], [0.2, 0.7, 0.1], [1 / 3, 1 / 3, 1 / 3], [0.0, 0.0, 1.0]]
LABELS = [[1, 0, 0], [0, 1, 1], [1, 1, 0], [0, 0, 0]]
ROWS = torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()

CASES = {
    "balanced mse": lambda: of.balanced_mse(3, 2, 4, 0.02, 0.01),
    "balanced ce": lambda: of.balanced_ce(4, 2, 5, 0.02, 0.01),
    "two classes, one sample, one feature": lambda: of.balanced_ce(2, 1, 1, 0.1, 0.1),
    "balanced ce, free bias": lambda: of.balanced_ce(3, 2, 4, 0.02, 0.01, "free"),
    "balanced mse, few features": lambda: of.balanced_mse(5, 2, 2, 0.01, 0.01),
    "mse without bias": lambda: of.mse_without_bias([6, 3, 1], 4, 0.02, 0.01),
    "mse without bias, few features": lambda: of.mse_without_bias([6, 3, 1], 2, 0.01, 0.01),
    "penalized bias": lambda: of.mse_with_penalized_bias([3, 3, 3], 4, 0.01, 0.02, 0.4),
    "penalized bias that hides the mean": lambda: of.mse_with_penalized_bias([3, 3, 3], 4, 0.01, 0.02, 0.04),
    "penalized bias, few features": lambda: of.mse_with_penalized_bias([2] * 4, 2, 0.01, 0.02, 0.4),
    "penalized bias, unbalanced": lambda: of.mse_with_penalized_bias([6, 3, 1], 4, 0.01, 0.02, 0.4),
    "unbalanced mse": lambda: of.unbalanced_mse([6, 3, 1], 4, 0.01, 0.02),
    "unbalanced ce": lambda: of.unbalanced_ce([9, 4, 1], 4, 0.01, 0.02),
    "unbalanced ce, free bias, d = r": lambda: of.unbalanced_ce([9, 4, 1], 2, 0.01, 0.01, "free"),
    "unbalanced ce, penalized bias": lambda: of.unbalanced_ce([9, 4, 1], 4, 0.01, 0.01, 0.1),
    "merged minorities": lambda: of.unbalanced_ce([12, 12, 1, 1], 4, 0.01, 0.02),
    "absent class": lambda: of.unbalanced_ce([5, 3, 0, 2], 4, 0.01, 0.01),
    "label smoothing": lambda: of.label_smoothing([2] * 4, 0.1, 5, 0.01, 0.01),
    "label smoothing, unbalanced": lambda: of.label_smoothing([5, 2, 1], 0.1, 4, 0.01, 0.01),
    "soft labels": lambda: of.soft_labels(SOFT, [3, 3, 2, 1], 4, 0.01, 0.01),
    "groups with equal targets": lambda: of.soft_labels([*SOFT[:2], SOFT[0]], [2, 3, 2], 3, 0.01, 0.01),
    "mixup": lambda: of.mixup(3, 2, 1, 4, 0.01, 0.01),
    "weighted ce": lambda: of.weighted_ce([8, 3, 1], "inverse", 4, 0.01, 0.01),
    "logit-adjusted ce": lambda: of.logit_adjusted_ce([8, 3, 1], 4, 0.01, 0.01),
    "multi-label bce": lambda: of.multi_label_bce(LABELS, [3, 2, 2, 1], 4, 0.01, 0.01),
    "multi-label bce, free bias": lambda: of.multi_label_bce(LABELS, [3, 2, 2, 1], 4, 0.01, 0.01, "free"),
    "regression": lambda: of.regression(ROWS, 4, 0.05, 0.01),
    "squared hinge": lambda: one_against_rest([6, 3, 1], 4, 0.01, 0.02),
    "squared hinge, free bias": lambda: one_against_rest([6, 3, 1], 4, 0.01, 0.02, "free"),
    "zero, ce": lambda: of.unbalanced_ce([3, 2, 1], 3, 0.5, 0.5),
    "zero, mse": lambda: of.balanced_mse(3, 2, 4, 0.5, 0.5),
}


class ByValue(Loss):
    """What is left of a loss if only its value is known."""

    def __init__(self, loss):
        self.value = loss.value
