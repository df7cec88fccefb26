"""Optimal values and sets, against autograd and long descent."""

import math

import pytest
import torch

from nclightning.theory import UFMProblem
from tests.cases import ALL, COLLAPSED, LOW_RANK, ZERO, name_of
from tests.helpers import gradient_norm, norm, objective_of, random_point

PAPER = {"num_classes": 10, "samples_per_class": 10, "feature_dim": 20}


@pytest.mark.parametrize("problem", ALL, ids=name_of)
def test_random_optimum_is_stationary_and_has_the_optimal_value(problem, generator):
    optimum = problem.random_optimum(generator)
    assert gradient_norm(problem, optimum) <= 1e-13
    value = float(objective_of(problem)(optimum.weight, optimum.features, optimum.labels, optimum.bias))
    assert value == pytest.approx(problem.optimal_value, rel=1e-14)
    assert norm(optimum) == pytest.approx(problem.optimum_norm, rel=1e-14)


@pytest.mark.parametrize("problem", COLLAPSED + LOW_RANK, ids=name_of)
def test_optimum_has_the_stated_scales(problem, generator):
    optimum = problem.random_optimum(generator)
    singular = torch.linalg.svdvals(optimum.weight)
    expected = torch.full_like(singular, problem.weight_scale)
    expected[problem.rank :] = 0
    torch.testing.assert_close(singular, expected, rtol=1e-13, atol=1e-14)
    # Prop. 1 and 3: features are the head's rows times sqrt(lambda_w / (n lambda_h)).
    ratio = math.sqrt(problem.lambda_w / (problem.samples_per_class * problem.lambda_h))
    torch.testing.assert_close(optimum.features, ratio * optimum.weight[optimum.labels], rtol=1e-13, atol=1e-14)


def test_optimum_of_the_paper_sizes_in_numbers():
    """Scales written out by hand: q = sqrt(10 * 5e-2 * 5e-3) = 0.05, K q = 1/2, c = 1."""
    mse = UFMProblem("mse", **PAPER, lambda_w=5e-2, lambda_h=5e-3)
    assert mse.q == pytest.approx(0.05, rel=1e-15)
    assert mse.logit_scale == pytest.approx(0.5, rel=1e-15)
    assert mse.optimal_value == pytest.approx(9 * (0.25 / 20 + 0.025), rel=1e-15)
    ce = UFMProblem("ce", **PAPER, lambda_w=5e-2, lambda_h=5e-3)
    assert ce.logit_scale == pytest.approx(math.log(11), rel=1e-15)
    assert ce.optimal_value == pytest.approx(math.log(20 / 11) + 9 * math.log(11) * 0.05, rel=1e-15)


@pytest.mark.parametrize("problem", ZERO, ids=name_of)
def test_at_and_above_the_threshold_the_optimum_is_zero(problem, generator):
    assert not problem.collapses
    optimum = problem.random_optimum(generator)
    assert torch.count_nonzero(optimum.weight) == torch.count_nonzero(optimum.features) == 0
    K = problem.num_classes
    expected = (K - 1) / (2 * K) if problem.loss == "mse" else math.log(K)
    assert problem.optimal_value == pytest.approx(expected, rel=1e-15)


def test_threshold_is_the_product_of_the_penalties():
    below = UFMProblem("mse", 4, 3, 5, lambda_w=0.99 / 48, lambda_h=1.0)
    above = UFMProblem("mse", 4, 3, 5, lambda_w=1.01 / 48, lambda_h=1.0)
    assert below.threshold == pytest.approx(1 / 48, rel=1e-15)
    assert below.collapses
    assert not above.collapses


DESCENT = [p for p in ALL if p.num_classes <= 6 and abs(p.num_classes * p.q - 1) > 1e-9]


@pytest.mark.parametrize("problem", DESCENT, ids=name_of)
def test_lbfgs_from_random_starts_reaches_the_minimum(problem, generator):
    objective = objective_of(problem)
    for scale in (0.1, 1.0):
        start = random_point(problem, generator, scale)
        params = [t.clone().requires_grad_() for t in (start.weight, start.features, start.bias) if t is not None]
        optimizer = torch.optim.LBFGS(
            params, max_iter=4000, tolerance_grad=1e-14, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def closure(params=params, optimizer=optimizer, labels=start.labels):
            optimizer.zero_grad()
            value = objective(params[0], params[1], labels, params[2] if len(params) > 2 else None)
            value.backward()
            return value

        optimizer.step(closure)
        weight, features, *bias = (p.detach() for p in params)
        point = (weight, features, start.labels, bias[0] if bias else None)
        # F* is reached to the round-off of F from both sides: no start ends lower, none gets stuck higher.
        assert float(objective(*point)) == pytest.approx(problem.optimal_value, abs=1e-14)
        assert float(problem.optimality_gap(*point)) <= 1e-14
        # The slowest cases leave a gradient of 1e-8; the error-bound constant is at most a few hundred here.
        assert float(problem.distance(*point)) <= 1e-5 * max(norm(start), 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "hinge"}, "loss must be 'mse' or 'ce'"),
        ({"num_classes": 1}, "num_classes must be an integer of at least 2, got 1"),
        ({"samples_per_class": 0}, "samples_per_class must be an integer of at least 1"),
        ({"feature_dim": 0}, "feature_dim must be an integer of at least 1"),
        ({"feature_dim": 2.5}, "feature_dim must be an integer"),
        ({"lambda_w": 0.0}, "lambda_w must be positive and finite, got 0.0.*divide by it"),
        ({"lambda_h": -1e-3}, "lambda_h must be positive and finite"),
        ({"lambda_h": math.nan}, "lambda_h must be positive and finite"),
        ({"loss": "ce", "feature_dim": 8}, "feature_dim must be at least num_classes - 1 = 9 for loss='ce', got 8"),
    ],
)
def test_bad_problems_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        UFMProblem(**({"loss": "mse", **PAPER, "lambda_w": 0.1, "lambda_h": 0.1} | change))


@pytest.mark.parametrize("method", ["distance", "optimality_gap", "nearest_optimum"])
@pytest.mark.parametrize(
    ("part", "replacement", "message"),
    [
        ("weight", torch.zeros(4, 5), r"weight must have shape \(4, 6\)"),
        ("features", torch.zeros(11, 6), r"features must have shape \(12, 6\)"),
        ("labels", torch.zeros(12, dtype=torch.int64), "exactly 3 times"),
        ("labels", torch.arange(12) % 4 + 1, "exactly 3 times"),
        ("labels", (torch.arange(12) % 4).int(), "labels must be int64"),
        ("bias", None, "bias must have shape"),
    ],
)
def test_points_that_do_not_fit_are_refused(method, part, replacement, message, generator):
    problem = next(p for p in COLLAPSED if p.loss == "mse" and p.feature_dim == 6)
    point = random_point(problem, generator)._replace(**{part: replacement})
    with pytest.raises(ValueError, match=message):
        getattr(problem, method)(*point)


def test_cross_entropy_refuses_a_bias(generator):
    problem = next(p for p in COLLAPSED if p.loss == "ce" and p.feature_dim == 6)
    with pytest.raises(ValueError, match="bias must be None for loss='ce'"):
        problem.distance(*random_point(problem, generator)._replace(bias=torch.zeros(4)))
