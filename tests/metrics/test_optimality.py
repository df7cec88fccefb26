"""Gap and distance from streamed moments against the closed forms on all samples."""

import math

import pytest
import torch
from torch import nn

from nclightning.metrics import Optimality
from nclightning.objective import Objective
from nclightning.theory import UFMProblem
from tests.cases import ALL, name_of
from tests.helpers import norm, perturb, random_point

FULL_RANK = [p for p in ALL if p.feature_dim >= p.num_classes - 1]


def head_of(point):
    head = nn.Linear(point.weight.shape[1], len(point.weight), bias=point.bias is not None, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(point.weight)
        if point.bias is not None:
            head.bias.copy_(point.bias)
    return head


def stream(problem, point, parts=3):
    metric = Optimality(problem, head_of(point))
    size = -(-len(point.labels) // parts)
    for h, y in zip(point.features.split(size), point.labels.split(size), strict=True):
        metric.update(h, y)
    return {name: float(value) for name, value in metric.compute().items()}


@pytest.mark.parametrize("problem", FULL_RANK, ids=name_of)
@pytest.mark.parametrize("step", [None, 1e-3, 1e-6, 1e-9])
def test_equals_the_closed_forms_on_all_samples(problem, step, generator):
    if step is None:
        point = random_point(problem, generator)
    else:
        point = perturb(problem.random_optimum(generator), generator, step)
    values = stream(problem, point)
    # Rounding of the point against its distance, as for the closed forms themselves.
    slack = max(1e-12, 1e-14 * (1 + norm(point)) / (step or 1))
    assert values["distance"] == pytest.approx(float(problem.distance(*point)), rel=slack)
    assert values["gap"] == pytest.approx(float(problem.optimality_gap(*point)), rel=10 * slack)


@pytest.mark.parametrize("problem", [p for p in FULL_RANK if p.collapses], ids=name_of)
def test_vanishes_at_an_optimum(problem, generator):
    values = stream(problem, problem.random_optimum(generator))
    assert values["relative_distance"] <= 1e-14
    assert values["gap"] <= 1e-27


def test_a_bias_under_cross_entropy_is_free(generator):
    """The minimum over the bias, too, is F*; a constant bias changes neither gap nor distance."""
    problem = UFMProblem("ce", 4, 3, 6, 1e-2, 3e-3)
    point = random_point(problem, generator)
    for shift in (0.0, 5.0):
        biased = point._replace(bias=torch.full((4,), shift, dtype=torch.float64))
        values = stream(problem, biased)
        assert values["gap"] == pytest.approx(float(problem.optimality_gap(*point)), rel=1e-10)
        assert values["distance"] == pytest.approx(float(problem.distance(*point)), rel=1e-12)
    biased = point._replace(bias=torch.randn(4, dtype=torch.float64, generator=generator))
    value = Objective("ce", problem.lambda_w, problem.lambda_h)(*biased[:3], biased.bias)
    assert stream(problem, biased)["gap"] == pytest.approx(float(value) - problem.optimal_value, rel=1e-12)


def test_ranks_merge(generator):
    problem = UFMProblem("mse", 3, 4, 5, 1e-2, 3e-3)
    point = random_point(problem, generator)
    first, second = (Optimality(problem, head_of(point)) for _ in range(2))
    first.update(point.features[:5], point.labels[:5])
    second.update(point.features[5:], point.labels[5:])
    first.merge_state(second)
    assert {k: float(v) for k, v in first.compute().items()} == pytest.approx(stream(problem, point), rel=1e-12)


@pytest.mark.parametrize("loss", ["mse", "ce"])
@pytest.mark.parametrize("kq", [1e-6, 0.1, 0.9])
def test_the_problem_at_a_scale(loss, kq):
    K, n, d, c = 5, 7, 9, 3.0
    problem = UFMProblem(loss, K, n, d, kq / K * c, kq / K / (n * c))
    again = UFMProblem.at_scale(loss, K, n, d, problem.weight_scale, problem.feature_scale)
    # 1 - s of MSE loses the digits of K q.
    assert again.lambda_w == pytest.approx(problem.lambda_w, rel=1e-14 / kq + 1e-12)
    assert again.lambda_h == pytest.approx(problem.lambda_h, rel=1e-14 / kq + 1e-12)


@pytest.mark.parametrize("scales", [(0.0, 1.0), (1.0, -1.0), (2.0, 0.5), (math.nan, 1.0)])
def test_scales_that_are_optimal_nowhere(scales):
    with pytest.raises(ValueError, match="optimal at no penalties"):
        UFMProblem.at_scale("mse", 3, 2, 4, *scales)


def test_bad_input(generator):
    problem = UFMProblem("mse", 3, 4, 5, 1e-2, 3e-3)
    with pytest.raises(ValueError, match="head must have a bias for loss='mse'"):
        Optimality(problem, nn.Linear(5, 3, bias=False))
    with pytest.raises(ValueError, match="feature_dim must be at least num_classes - 1 = 2, got 1"):
        Optimality(UFMProblem("mse", 3, 4, 1, 1e-2, 3e-3), nn.Linear(1, 3))
    metric = Optimality(problem, nn.Linear(5, 3))
    metric.update(torch.randn(6, 5, generator=generator), torch.tensor([0, 0, 1, 1, 2, 0]))
    with pytest.raises(ValueError, match=r"every class must come exactly 4 times, got between 1 and 3.*nc_distance"):
        metric.compute()
    with pytest.raises(ValueError, match=r"means must have shape \(3, 5\)"):
        problem.distance_from_moments(torch.zeros(3, 5), torch.zeros(3, 4), torch.zeros(()))
    with pytest.raises(ValueError, match="at least num_classes - 1 = 2 for a gap from moments"):
        UFMProblem("mse", 3, 4, 1, 1e-2, 3e-3).gap_from_moments(*[torch.zeros(3, 1)] * 2, *[torch.zeros(())] * 2)
