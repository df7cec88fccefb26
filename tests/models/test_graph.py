"""Lines of objectives with a graph."""

import pytest
import torch
from torch import nn

from nclightning.models.graph import AutogradObjective
from nclightning.optim import ArmijoGD


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def objective_of(model):
    x = torch.linspace(-1, 1, 30, dtype=torch.float64).view(10, 3)
    return lambda: (model(x) - x[:, :2].cos()).square().mean()


class CountBackward(torch.autograd.Function):
    calls = 0

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        CountBackward.calls += 1
        return gradient


@pytest.mark.parametrize("noise", [None, 0.9], ids=["values decide", "slopes decide"])
def test_steps_are_those_of_a_closure_bit_for_bit(noise):
    plain, lazy = network(), network()
    optimizer, other = (ArmijoGD(m.parameters(), noise=noise, initial_step=30.0) for m in (plain, lazy))

    def closure():
        optimizer.zero_grad()
        value = objective_of(plain)()
        value.backward()
        return value.detach()

    line = AutogradObjective(objective_of(lazy), list(lazy.parameters()))
    for _ in range(20):
        optimizer.step(closure)
        other.step(line)
        assert other.outcome == optimizer.outcome
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), lazy.parameters(), strict=True))
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(plain.parameters(), lazy.parameters(), strict=True))


def test_rejected_trials_need_no_backward():
    model = network()
    objective = objective_of(model)
    CountBackward.calls = 0
    optimizer = ArmijoGD(model.parameters(), initial_step=1000.0)
    optimizer.step(AutogradObjective(lambda: CountBackward.apply(objective()), list(model.parameters())))
    assert optimizer.outcome.evaluations > 3
    assert CountBackward.calls == 2  # At the start and where it ended.


def test_a_trial_whose_gradient_is_not_finite_is_rejected():
    """At 0 the root has a finite value and no gradient."""
    x = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = ArmijoGD([x], initial_step=2.0)  # The first trial is exactly 0.
    optimizer.step(AutogradObjective(lambda: x.square().sqrt().sqrt().sum(), [x]))
    assert optimizer.outcome.evaluations == 3
    assert optimizer.outcome.step_size == 1.0
    assert torch.isfinite(x.grad).all()


def test_other_optimizers_call_it_as_a_closure():
    model, twin = network(), network()
    optimizer, other = (torch.optim.LBFGS(m.parameters(), max_iter=5) for m in (model, twin))

    def closure():
        other.zero_grad()
        value = objective_of(twin)()
        value.backward()
        return value

    optimizer.step(AutogradObjective(objective_of(model), list(model.parameters())))
    other.step(closure)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_measuring_brings_value_and_squared_norm():
    model = network()
    value, square = AutogradObjective(objective_of(model), list(model.parameters())).measure()
    expected = objective_of(model)()
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    assert value.item() == expected.item()
    assert square.item() == pytest.approx(sum(float(g.square().sum()) for g in gradients), rel=1e-14)
