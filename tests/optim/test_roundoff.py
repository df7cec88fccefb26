"""The floors that descent reaches in float64 and float32, with and without the slope test."""

import pytest
import torch

from nclightning.objective import Objective
from nclightning.optim import ArmijoGD, SearchStatus
from nclightning.theory import UFMProblem

# K = 4, n = 5, d = 8: the published comparison of line searches at these penalties.
SMALL = UFMProblem("ce", 4, 5, 8, 5e-2, 1e-2)


def descend(problem, dtype, steps, **options):
    generator = torch.Generator().manual_seed(0)
    K, d, N = problem.num_classes, problem.feature_dim, problem.num_samples
    weight, features = (
        torch.nn.Parameter(torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype))
        for shape in ((K, d), (N, d))
    )
    bias = torch.nn.Parameter(torch.zeros(K, dtype=dtype)) if problem.loss == "mse" else None
    labels = problem.labels()
    objective = Objective(problem.loss, problem.lambda_w, problem.lambda_h)
    optimizer = ArmijoGD([p for p in (weight, features, bias) if p is not None], **options)

    def closure():
        optimizer.zero_grad()
        value = objective(weight, features, labels, bias)
        value.backward()
        return value

    smallest = float("inf")
    for _ in range(steps):
        optimizer.step(closure)
        smallest = min(smallest, optimizer.outcome.grad_norm)
        if not optimizer.outcome.accepted:
            break
    return smallest, float(problem.optimality_gap(weight, features, labels, bias)), optimizer.outcome


@pytest.mark.parametrize(("loss"), ["ce", "mse"])
@pytest.mark.parametrize(
    ("dtype", "grad_norm", "gap"),
    # Round-off of a gradient whose terms are of size 0.1: 1e-17 and 1e-8; the gap is its square over mu = 0.01.
    [(torch.float64, 1e-15, 1e-27), (torch.float32, 1e-7, 1e-12)],
)
def test_slopes_reach_the_round_off_of_the_gradient(loss, dtype, grad_norm, gap):
    problem = UFMProblem(loss, 4, 5, 8, 5e-2, 1e-2)
    reached, final, _ = descend(problem, dtype, 1500)
    assert reached <= grad_norm
    assert final <= gap


@pytest.mark.parametrize(("dtype", "floor"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
def test_plain_armijo_dies_at_the_round_off_of_the_objective(dtype, floor):
    """What ``noise=0`` gives: the gradient stays at about sqrt(eps)."""
    reached, _, outcome = descend(SMALL, dtype, 1500, noise=0.0)
    assert reached >= floor
    assert not outcome.accepted
    assert outcome.status in (SearchStatus.STALLED, SearchStatus.EXHAUSTED)


@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_float32_at_the_paper_sizes_ends_far_below_plain_armijo(loss):
    problem = UFMProblem(loss, 10, 10, 20, 5e-2, 5e-3)
    _, gap, _ = descend(problem, torch.float32, 1500)
    _, plain, _ = descend(problem, torch.float32, 1500, noise=0.0)
    assert gap <= 1e-12
    assert plain >= 1e5 * gap


@pytest.mark.parametrize("shrink", [0.5, 0.7, 0.1])
@pytest.mark.parametrize("first", [1.0, 3.0, 100.0, 1e6])
def test_a_rejecting_slope_tells_how_far_to_shrink(first, shrink):
    """On a quadratic the step is that of trial by trial backtracking, with at most one rejection."""
    x = torch.nn.Parameter(torch.tensor([1e-9, 2e-9], dtype=torch.float64))
    curvature = torch.tensor([0.5, 3.0], dtype=torch.float64)
    optimizer = ArmijoGD([x], initial_step=first, shrink=shrink, c1=0.3)
    gradient = curvature * x.detach()
    along = float(curvature @ gradient.square() / gradient.square().sum())

    def closure():
        optimizer.zero_grad()
        value = 1e12 + (curvature * x.square()).sum() / 2  # No change of this is above its round-off.
        value.backward()
        return value

    optimizer.step(closure)
    expected = first
    while expected * along > 2 * (1 - 0.3):
        expected *= shrink
    assert optimizer.outcome.status is SearchStatus.ACCEPTED_BY_SLOPE
    assert optimizer.outcome.step_size == expected
    assert optimizer.outcome.evaluations == (2 if expected == first else 3)  # The first of all, and the trials.


@pytest.mark.parametrize("shrink", [1 - 1e-9, 1 - 2.0**-53])
def test_a_shrink_factor_next_to_one_ends_in_time(shrink):
    """No more factors at once than trials: what is due here is some ten million, or for ever."""
    x = torch.nn.Parameter(torch.tensor([1e-9], dtype=torch.float64))
    optimizer = ArmijoGD([x], initial_step=3.0, shrink=shrink, max_trials=5)

    def closure():
        optimizer.zero_grad()
        value = 1 + x.square().sum() / 2
        value.backward()
        return value

    optimizer.step(closure)
    assert optimizer.outcome.status is SearchStatus.EXHAUSTED
    assert x.item() == 1e-9


def test_a_slope_that_misleads_ends_in_a_step_nonetheless():
    """Curvature that is a thousand times greater where the trial ends: the next one is shorter than it need be."""
    x = torch.nn.Parameter(torch.tensor([1e-9], dtype=torch.float64))
    optimizer = ArmijoGD([x], initial_step=1.5)

    def closure():
        optimizer.zero_grad()
        value = 1 + torch.where(x > 0, x.square() / 2, 500 * x.square()).sum()
        value.backward()
        return value

    optimizer.step(closure)
    assert optimizer.outcome.status is SearchStatus.ACCEPTED_BY_SLOPE
    assert optimizer.outcome.evaluations == 3
    assert 0 < x.item() < 1e-9
