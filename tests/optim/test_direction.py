"""One search for all directions: what of a step depends on the descent vector and what does not."""

import pytest
import torch

from nclightning.models.graph import AutogradObjective
from nclightning.optim import ArmijoGD, LineSearchOptimizer, SearchStatus
from nclightning.optim.direction import Descent, SteepestDescent
from tests.optim.own_line import OwnLine, closure_of, objective, parameters
from tests.optim.problems import FUNCTIONS

GD = {
    "initial_step": 1.0, "shrink": 0.5, "grow": 4.0, "patience": 2, "c1": 0.3, "max_trials": 60, "noise": None,
    "reuse_gradient": True,
}  # fmt: skip


class Multiple(SteepestDescent):
    """The gradient times a power of two, as a vector of its own."""

    def __init__(self, factor, flaws=0):
        self.factor, self.flaws, self.restarts = factor, flaws, 0

    def find(self, start, line, space):
        factor = -self.factor if self.flaws else self.factor
        along = [None if g is None else g * factor for g in start.gradients]
        slope = line.inner_products([(start.gradients, along)])
        assert slope.dtype == torch.float64
        return Descent(along, abs(float(slope)))

    def restart(self):
        self.restarts += 1
        self.flaws -= 1
        return self.flaws >= 0


LINES = {
    "closure": closure_of,
    "graph": lambda _, params: AutogradObjective(lambda: objective(params), params),
    "own": lambda _, params: OwnLine(params),
}


@pytest.mark.parametrize("noise", [None, 0.9], ids=["values decide", "slopes decide"])
@pytest.mark.parametrize("factor", [1.0, 0.25, 8.0])
@pytest.mark.parametrize("make", LINES.values(), ids=LINES)
def test_a_multiple_of_the_gradient_makes_the_same_iterates_bit_for_bit(make, factor, noise):
    params, others = parameters(), parameters()
    plain = ArmijoGD(params, noise=noise, initial_step=32.0)
    scaled = LineSearchOptimizer(others, GD | {"noise": noise, "initial_step": 32.0 / factor}, Multiple(factor))
    for _ in range(40):
        plain.step(make(plain, params))
        scaled.step(make(scaled, others))
        assert scaled.outcome.step_size == plain.outcome.step_size / factor
        assert scaled.outcome.evaluations == plain.outcome.evaluations
        assert scaled.outcome.status is plain.outcome.status
        assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def test_a_direction_that_fails_is_restarted_within_the_step_until_it_knows_no_other():
    params = parameters()
    direction = Multiple(1.0, flaws=2)  # Uphill twice.
    optimizer = LineSearchOptimizer(params, GD | {"max_trials": 3, "initial_step": 0.1}, direction)
    optimizer.step(closure_of(optimizer, params))
    assert direction.restarts == 2
    assert optimizer.outcome.accepted
    assert optimizer.outcome.evaluations == 1 + 3 + 3 + 1


def test_a_direction_that_fails_for_good_leaves_everything_as_it_was():
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = LineSearchOptimizer(params, GD | {"max_trials": 3}, Multiple(1.0, flaws=9))
    optimizer._direction.restart = lambda: False
    optimizer.step(closure_of(optimizer, params))
    assert optimizer.outcome.status is SearchStatus.EXHAUSTED
    assert all(torch.equal(p, x) for p, x in zip(params, before, strict=True))


class Interpolating(SteepestDescent):
    interpolates = True


def test_a_parabola_is_interpolated_at_its_minimum():
    x = torch.nn.Parameter(torch.tensor([3.0, -4.0], dtype=torch.float64))
    optimizer = LineSearchOptimizer([x], GD | {"initial_step": 10.0}, Interpolating())

    def closure():
        optimizer.zero_grad()
        value = 0.7 * x.square().sum() / 2
        value.backward()
        return value

    optimizer.step(closure)
    assert optimizer.outcome.step_size == pytest.approx(1 / 0.7, rel=1e-12)
    assert optimizer.outcome.evaluations == 3


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.name)
def test_interpolation_keeps_the_condition(function):
    x = torch.nn.Parameter(torch.tensor(function.start, dtype=torch.float64))
    optimizer = LineSearchOptimizer([x], GD, Interpolating())

    def closure():
        optimizer.zero_grad()
        value = function.f(x)
        value.backward()
        return value

    for _ in range(100):
        optimizer.step(closure)
        outcome = optimizer.outcome
        if outcome.status is SearchStatus.ACCEPTED:
            decrease = outcome.previous_objective - outcome.objective
            assert decrease >= 0.3 * outcome.step_size * outcome.previous_grad_norm**2 * (1 - 1e-14)


def test_inner_products_of_several_pairs_and_missing_entries():
    params = parameters()
    line = AutogradObjective(lambda: objective(params), params)
    a, b = ([torch.randn(2, dtype=torch.float64) for _ in params] for _ in range(2))
    holes, nothing = [None, b[1]], [None, None]
    products = line.inner_products([(a, b), (a, holes), (a, nothing), (b, b)])
    flat = torch.cat(a), torch.cat(b)
    expected = [flat[0] @ flat[1], a[1] @ b[1], torch.tensor(0.0, dtype=torch.float64), flat[1] @ flat[1]]
    torch.testing.assert_close(products, torch.stack(expected), rtol=1e-15, atol=1e-15)
    assert line.inner_products([(nothing, nothing)]).tolist() == [0.0]
