"""The spectrum of balanced classes from a few products, against the dense matrix and the closed forms."""

import sys

import pytest
import torch

from nclightning.problems import (
    balanced_ce,
    balanced_mse,
    label_smoothing,
    mse_with_penalized_bias,
    mse_without_bias,
    multi_label_bce,
)
from nclightning.theory import UFMProblem

EYE = torch.eye(5)
CASES = {
    "ce": lambda: balanced_ce(5, 2, 7, 0.01, 0.01),
    "four classes, ce, free bias, d = r": lambda: balanced_ce(4, 1, 3, 0.01, 0.03, "free"),
    "ce, penalized bias": lambda: balanced_ce(5, 2, 7, 0.01, 0.01, 0.3),
    "mse": lambda: balanced_mse(5, 2, 6, 0.01, 0.01),
    "mse without bias": lambda: mse_without_bias([3] * 5, 6, 0.01, 0.02),
    "mse with penalized bias": lambda: mse_with_penalized_bias([3] * 5, 7, 0.01, 0.02, 0.4),
    "mse with penalized bias that hides the mean": lambda: mse_with_penalized_bias([3] * 5, 7, 0.01, 0.02, 0.04),
    "label smoothing": lambda: label_smoothing([2] * 5, 0.1, 6, 0.01, 0.02),
    "bce": lambda: multi_label_bce(EYE, [4] * 5, 6, 0.01, 0.01),
    "bce, free bias": lambda: multi_label_bce(EYE, [4] * 5, 6, 0.01, 0.01, "free"),
}


def flat(problem):
    return sorted(entry.value for entry in problem.spectrum() for _ in range(entry.multiplicity))


@pytest.mark.parametrize("name", CASES)
def test_the_same_as_the_dense_matrix(name, monkeypatch):
    module = sys.modules["nclightning.problems.spectrum"]
    problem = CASES[name]()
    assert module.is_symmetric(problem.optimal_set)
    few = flat(problem)
    monkeypatch.setattr(module, "is_symmetric", lambda optimal: False)
    dense = flat(problem)
    assert sum(value == 0 for value in few) == problem.dimension
    torch.testing.assert_close(torch.tensor(few), torch.tensor(dense), rtol=0, atol=1e-13 * dense[-1])


@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_a_hundred_classes(loss):
    sizes = 100, 10, 120
    old = UFMProblem(loss, *sizes, 5e-5, 5e-6)
    new = (balanced_mse if loss == "mse" else balanced_ce)(*sizes, 5e-5, 5e-6)
    rows = [[(e.value, e.multiplicity) for e in p.spectrum()] for p in (old, new)]
    assert sum(m for _, m in rows[0]) == sum(m for _, m in rows[1])
    # Each value with its multiplicity, where sectors may share values.
    for value, _ in rows[0]:
        near = [sum(m for v, m in each if abs(v - value) <= 1e-12 * old.smoothness) for each in rows]
        assert near[0] == near[1], value
    assert new.mu == pytest.approx(old.mu, rel=1e-9)
