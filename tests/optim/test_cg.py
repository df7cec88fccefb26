"""The vector of ArmijoCG against the plane that it is the minimum over, and its restarts."""

import math

import pytest
import torch
from torch import nn

from nclightning.optim import ArmijoCG
from tests.optim.closures import closure_of, parameter, quadratic
from tests.optim.problems import FUNCTIONS


def minimum_over_the_plane(g, p, q):
    """Of the model with the curvature of Cauchy and Schwarz, times 3/2, along g; by dense linear algebra."""
    basis = torch.stack([g, p], dim=1)
    steep = 1.5 * (q @ q) * (g @ g) / (p @ q)
    mixed = g @ q
    matrix = torch.stack([torch.stack([steep, mixed]), torch.stack([mixed, p @ q])])
    return basis @ torch.linalg.solve(matrix, basis.T @ g)


@pytest.mark.parametrize("name", ["rosenbrock-10", "zakharov-6", "himmelblau"])
def test_steps_go_along_the_minimum_over_the_plane(name):
    function = next(f for f in FUNCTIONS if f.name == name)
    x = parameter(*function.start)
    optimizer = ArmijoCG([x])
    closure = closure_of(optimizer, function.f, x)

    def gradient():
        return torch.autograd.grad(function.f(x), x)[0]

    last, compared = None, 0
    for _ in range(40):
        before, g = x.detach().clone(), gradient()
        optimizer.step(closure)
        outcome = optimizer.outcome
        if outcome.grad_norm < 1e-5 * (1 + abs(outcome.objective)):
            break
        moved, change = before - x.detach(), g - gradient()
        expected = g if last is None else minimum_over_the_plane(g, *last)
        torch.testing.assert_close(moved / outcome.step_size, expected, rtol=1e-6, atol=1e-8 * float(expected.norm()))
        assert g @ moved > 0
        compared += last is not None
        assert moved @ change > 0  # Else it restarts, which these functions do not ask for.
        last = moved, change
    assert compared > 5


def test_on_a_quadratic_it_is_as_fast_as_conjugate_gradients_are_known_to_be():
    """sqrt(condition)/2 * ln(2/eps) iterations are enough for them with exact steps: here within a factor of 1.5."""
    condition = 1e4
    x = nn.Parameter(torch.zeros(200, dtype=torch.float64))
    optimizer = ArmijoCG([x])
    closure = closure_of(optimizer, quadratic(condition, 200), x)
    optimizer.step(closure)
    first = optimizer.outcome.previous_grad_norm
    while optimizer.outcome.grad_norm > 1e-8 * first:
        optimizer.step(closure)
        assert optimizer.outcome.accepted
    assert optimizer.total_evaluations < 1.5 * math.sqrt(condition) / 2 * math.log(2 / 1e-8)


def test_negative_curvature_restarts_along_the_gradient_with_longer_steps():
    """F = x^4 / 4 - x^2 / 2 from near its maximum."""
    x = parameter(1e-3)
    optimizer = ArmijoCG([x])
    closure = closure_of(optimizer, lambda x: (x**4 / 4 - x**2 / 2).sum(), x)
    sizes = []
    for _ in range(3):
        optimizer.step(closure)
        sizes.append(optimizer.outcome.step_size)
    assert sizes == [1.0, 4.0, 16.0]


def test_a_vector_that_misleads_is_forgotten_within_the_step():
    """Another objective from step 5 on, whose curvatures are those of the first one turned round."""
    curvatures = [torch.logspace(0, 8, 6, dtype=torch.float64)]
    x = nn.Parameter(torch.ones(6, dtype=torch.float64))
    optimizer = ArmijoCG([x], reuse_gradient=False, max_trials=30)
    closure = closure_of(optimizer, lambda x: (curvatures[0] * x.square()).sum() / 2, x)
    for step in range(60):
        if step == 5:
            curvatures[0] = curvatures[0].flip(0)
            before = float(closure().detach())
            optimizer.zero_grad()
        optimizer.step(closure)
    assert optimizer.outcome.objective < 1e-3 * before
