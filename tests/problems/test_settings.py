"""Problems in settings that are not those of the other tests."""

import copy
import pickle

import numpy as np
import pytest
import torch

from nclightning.problems import BinaryCrossEntropy, CrossEntropy, Problem, multi_label_bce, regression, unbalanced_ce
from tests.problems.cases import ByValue


@pytest.mark.parametrize("loss", [CrossEntropy(), ByValue(BinaryCrossEntropy())], ids=["formulas", "autograd"])
def test_asked_first_in_inference_mode(loss):
    """As a callback does in validation; what is kept of it serves gradients afterwards."""
    with torch.inference_mode():
        problem = Problem(loss, np.eye(3), np.array([6, 3, 1]), 4, 0.01, 0.02)
        assert float(problem.gap(*problem.random_optimum())) < 1e-27
        mu = problem.mu
    assert problem.mu == mu
    optimum = problem.random_optimum()
    weight = optimum.weight.requires_grad_()
    problem.value(weight, *optimum[1:]).backward()
    assert float(weight.grad.norm()) < 1e-14
    with torch.no_grad():
        assert Problem(loss, torch.eye(3), [6, 3, 1], 4, 0.01, 0.02).mu == mu


def test_other_dtypes_and_autocast():
    problem = unbalanced_ce([6, 3, 1], 4, 0.01, 0.02, "free")
    point = problem.random_optimum()
    low = [t.float() if t.is_floating_point() else t for t in point]
    assert 0 < float(problem.gap(*low)) < 1e-13
    assert problem.gap(*low).dtype == torch.float64
    assert problem.value(*low).dtype == torch.float32
    gap = problem.gap(*low)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(problem.gap(*low), gap)
    torch.set_default_dtype(torch.float16)
    try:
        other = multi_label_bce([[1, 0, 0.3], [0, 1, 1]], [3, 2], 4, 0.01, 0.01)
        assert float(other.gap(*other.random_optimum())) < 1e-27
    finally:
        torch.set_default_dtype(torch.float32)
    assert other.optimal_value == multi_label_bce([[1, 0, 0.3], [0, 1, 1]], [3, 2], 4, 0.01, 0.01).optimal_value


def test_copies_and_changes_of_what_was_given():
    rows = torch.randn(20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    problem, again = regression(rows, 3, 0.01, 0.01), regression(rows, 3, 0.01, 0.01)
    rows.zero_()
    for each in (again, pickle.loads(pickle.dumps(problem)), copy.deepcopy(problem)):
        assert each.optimal_value == problem.optimal_value > 0.05


def test_many_samples_as_groups_of_their_own():
    """The targets of a regression are as many as its samples: nothing is of that size squared."""
    rows = torch.randn(20000, 3, generator=torch.Generator().manual_seed(0))
    problem = regression(rows, 16, 1e-3, 1e-7)
    assert float(problem.gap(*problem.random_optimum())) < 1e-25
    assert problem.optimum.inactive.left.shape[1] <= 3
