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
