"""Laws of the steps of torch's optimizers, against runs of these optimizers."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nclightning.errors import UserError
from nclightning.functional import GradientStep, balance_deviation, balance_residual, predict_row_sum
from nclightning.theory import UFMProblem
from tests.helpers import random_point

K, D = 4, 6
# Arguments of torch.optim.SGD.
STEPS = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "momentum": {"momentum": 0.9, "weight_decay": 0.1},
    "momentum without decay": {"momentum": 0.9},
    "dampened": {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "ascent": {"momentum": 0.5, "weight_decay": 0.1, "maximize": True},
}
ZERO_SUM = {
    "hard": F.cross_entropy,
    "smoothed": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.2),
    "soft": lambda z, y: F.cross_entropy(z, (F.one_hot(y, K) + F.one_hot(y.flip(0), K)) / 2.0),
    "weighted": lambda z, y: F.cross_entropy(z, y, weight=torch.arange(1.0, K + 1).to(z)),
    "ignored": lambda z, y: F.cross_entropy(z, torch.where(y == 0, -100, y)),
    "adjusted": lambda z, y: F.cross_entropy(z + torch.arange(K).to(z), y),
    "temperature": lambda z, y: F.nll_loss(F.log_softmax(z / 3, dim=1), y),
    "margin": F.multi_margin_loss,
}
NOT_ZERO_SUM = {
    "squared error": lambda z, y: F.mse_loss(z, F.one_hot(y, K).to(z)),
    "binary": lambda z, y: F.binary_cross_entropy_with_logits(z, F.one_hot(y, K).to(z)),
    "soft rows that do not sum to one": lambda z, y: -(F.log_softmax(z, 1) * F.one_hot(y, K)).sum() + z.sum(),
}


class Run:
    """Minibatch steps on unbalanced samples, with batch norm and dropout before the head."""

    def __init__(self, loss, options, penalty=0.0, rate=lambda step: 0.1 / (1 + step)):
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(3, D), nn.BatchNorm1d(D), nn.Tanh(), nn.Dropout(0.3)).double()
        self.head = nn.Linear(D, K).double()
        self.optimizer = torch.optim.SGD([*self.body.parameters(), *self.head.parameters()], lr=0.1, **options)
        self.loss, self.penalty, self.rate = loss, penalty, rate

    def sums(self):
        return self.head.weight.detach().sum(0).clone(), self.head.bias.detach().sum().clone()

    def go(self, count):
        for step in range(count):
            self.optimizer.param_groups[0]["lr"] = self.rate(step)
            y = torch.multinomial(torch.tensor([0.6, 0.2, 0.1, 0.1]), 16, replacement=True)
            value = self.loss(self.head(self.body(torch.randn(16, 3).double() + y[:, None])), y)
            self.optimizer.zero_grad()
            (value + self.penalty / 2 * self.head.weight.square().sum()).backward()
            self.optimizer.step()

    def error(self, predicted):
        weight = self.head.weight.detach()
        return float((weight.sum(0) - predicted).norm() / (math.sqrt(K) * weight.norm()))


def laws(options, count, rate, penalty=0.0):
    names = {"weight_decay": "decay"}
    given = {names.get(name, name): value for name, value in options.items()}
    return [GradientStep(rate(i), **given, penalty=penalty, is_first=i == 0) for i in range(count)]


@pytest.mark.parametrize("penalty", [0.0, 0.3])
@pytest.mark.parametrize("options", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("loss", ZERO_SUM.values(), ids=ZERO_SUM)
def test_row_sums_follow_their_recursion(loss, options, penalty):
    run = Run(loss, options, penalty)
    weight, bias = run.sums()
    run.go(30)
    # Thirty steps of rounding, each of about 1e-16 of the weights.
    assert run.error(predict_row_sum(weight, laws(options, 30, run.rate, penalty))) < 1e-13
    predicted = predict_row_sum(bias, laws(options, 30, run.rate))
    assert float(run.sums()[1]) == pytest.approx(float(predicted), rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("loss", NOT_ZERO_SUM.values(), ids=NOT_ZERO_SUM)
def test_other_losses_do_not(loss):
    run = Run(loss, STEPS["decay"])
    weight, _ = run.sums()
    run.go(30)
    assert run.error(predict_row_sum(weight, laws(STEPS["decay"], 30, run.rate))) > 1e-3


def test_a_recursion_goes_on_from_a_momentum_buffer():
    run = Run(ZERO_SUM["hard"], STEPS["nesterov"])
    run.go(5)
    weight, _ = run.sums()
    velocity = run.optimizer.state[run.head.weight]["momentum_buffer"].sum(0)
    run.go(10)
    later = [GradientStep(run.rate(i), 0.9, nesterov=True, decay=0.1) for i in range(10)]
    assert run.error(predict_row_sum(weight, later, velocity)) < 1e-13
    assert run.error(predict_row_sum(weight, later)) > 1e-6


def test_decoupled_decay_is_coupled_decay_without_momentum():
    total = torch.randn(D, dtype=torch.float64)
    coupled, decoupled = GradientStep(0.1, decay=0.3), GradientStep(0.1, decoupled_decay=0.3)
    assert coupled.next_row_sum(total)[0].tolist() == decoupled.next_row_sum(total)[0].tolist()


# Stability.


@pytest.mark.parametrize("decoupled", [0.0, 2.0])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dampening": 0.5},
        {"momentum": 0.9},
        {"momentum": 0.5, "dampening": 0.2},
        {"momentum": 0.9, "dampening": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"nesterov": True},
    ],
    ids=str,
)
def test_the_largest_stable_curvature_is_where_a_quadratic_diverges(options, decoupled):
    step = GradientStep(0.05, **options, decoupled_decay=decoupled)

    def ends_at(curvature):
        x, v = 1.0, None
        for _ in range(3000):
            g = curvature * x
            beta, tau = step.momentum, step.dampening
            v = g if v is None or not beta else beta * v + (1 - tau) * g
            x = (1 - step.lr * decoupled) * x - step.lr * (g + beta * v if step.nesterov and beta else v)
            if abs(x) > 1e9:
                break
        return abs(x)

    most = step.largest_stable_curvature
    assert ends_at(most * 0.98) < 1e-3
    assert ends_at(most * 1.02) > 1e9


def test_limits_that_are_known():
    assert GradientStep(0.1).largest_stable_curvature == pytest.approx(20)
    assert GradientStep(0.1, momentum=0.9).largest_stable_curvature == pytest.approx(38)
    # Of an averaged gradient, as in Adam (Cohen et al., 2022).
    assert GradientStep(0.1, momentum=0.9, dampening=0.9).largest_stable_curvature == pytest.approx(380)
    assert GradientStep(0.0).largest_stable_curvature == math.inf
    with pytest.raises(UserError, match="maximize"):
        _ = GradientStep(0.1, maximize=True).largest_stable_curvature


# Balance.


@pytest.mark.parametrize("loss", ["ce", "mse"])
def test_the_optimum_is_balanced(loss, generator):
    optimum = UFMProblem(loss, K, 3, D, lambda_w=2e-2, lambda_h=1e-3).random_optimum(generator)
    assert balance_deviation(optimum.weight, optimum.features, 2e-2, 1e-3) < 1e-12
    assert balance_deviation(optimum.weight, optimum.features) > 1e-2


def descend(parts, value, lr, steps, **options):
    optimizer = torch.optim.SGD(parts, lr=lr, **options)
    for _ in range(steps):
        before = [part.detach().clone() for part in parts]
        optimizer.zero_grad()
        value().backward()
        optimizer.step()
        yield before, [part.detach().clone() for part in parts]


BOUNDED = ZERO_SUM | {name: NOT_ZERO_SUM[name] for name in ("squared error", "binary")}


@pytest.mark.parametrize("loss", BOUNDED.values(), ids=BOUNDED)
def test_each_step_changes_balance_by_its_law(loss):
    point = random_point(UFMProblem("ce", K, 3, D, lambda_w=2e-2, lambda_h=1e-3), torch.Generator().manual_seed(1))
    weight, features = (each.clone().requires_grad_() for each in (point.weight, point.features))

    def value():
        decay = 2e-2 * weight.square().sum() + 1e-3 * features.square().sum()
        return loss(features @ weight.T, point.labels) + decay / 2

    for before, after in descend([weight, features], value, 0.5, 100):
        assert balance_residual(before, after, 0.5, 2e-2, 1e-3) < 1e-14
        assert balance_residual(before, after, 0.5, 1e-3, 2e-2) > 1e-4
    # The difference of both, as a sum of the terms that the page shows.
    (w, h), (w_after, h_after), t = before, after, 0.5
    d, d_after = w.T @ w - h.T @ h, w_after.T @ w_after - h_after.T @ h_after
    second = (w_after - w).T @ (w_after - w) - (h_after - h).T @ (h_after - h)
    flow = 2 * t * (2e-2 * w.T @ w - 1e-3 * h.T @ h)
    assert torch.allclose(d_after, d - flow + second, rtol=0, atol=1e-13 * float(w.norm() ** 2 + h.norm() ** 2))


def test_layers_next_to_each_other_obey_it_too():
    torch.manual_seed(0)
    first, second, inputs = torch.randn(5, 3), torch.randn(2, 5), torch.randn(7, 3)
    first, second = (each.double().requires_grad_() for each in (first, second))

    def value():
        return (inputs.double() @ first.T @ second.T).sin().mean()

    for before, after in descend([second, first], value, 0.1, 20, weight_decay=0.2):
        sides = [(later, earlier.T) for later, earlier in (before, after)]
        assert balance_residual(*sides, 0.1, 0.2, 0.2) < 1e-14


def test_momentum_breaks_the_law_of_a_step():
    torch.manual_seed(0)
    first, second = (torch.randn(5, 5).double().requires_grad_() for _ in range(2))
    runs = list(descend([second, first], lambda: (second @ first).cos().sum(), 0.1, 3, momentum=0.9))
    residuals = [float(balance_residual((a[0], a[1].T), (b[0], b[1].T), 0.1)) for a, b in runs]
    assert residuals[0] < 1e-15
    assert min(residuals[1:]) > 1e-4


@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e150])
def test_balance_of_any_scale(scale):
    torch.manual_seed(0)
    outgoing, incoming = torch.randn(K, D).double(), torch.randn(9, D).double()
    expected = balance_deviation(outgoing, incoming, 0.1, 0.2)
    assert balance_deviation(scale * outgoing, scale * incoming, 0.1, 0.2) == pytest.approx(float(expected), rel=1e-12)
    before, after = (outgoing, incoming), (1.1 * outgoing, 0.9 * incoming)
    expected = balance_residual(before, after, 0.1, 0.1, 0.2)
    scaled = [tuple(scale * each for each in pair) for pair in (before, after)]
    assert balance_residual(*scaled, 0.1, 0.1, 0.2) == pytest.approx(float(expected), rel=1e-12)


def test_ends_of_balance():
    zero, one = torch.zeros(2, 3), torch.ones(2, 3)
    assert balance_deviation(zero, one) == 1
    assert balance_deviation(one, one) == 0
    assert torch.isnan(balance_deviation(zero, zero))


def test_what_is_refused():
    weight = torch.ones(2, 3)
    with pytest.raises(UserError, match="transpose"):
        balance_deviation(weight, torch.ones(3, 2))
    with pytest.raises(UserError, match="non-negative"):
        balance_deviation(weight, weight, -1.0)
    with pytest.raises(UserError, match="same shapes"):
        balance_residual((weight, weight), (weight, torch.ones(4, 3)), 0.1)
