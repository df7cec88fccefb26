"""What is read of torch's optimizers, against the steps that they take."""

import math

import pytest
import torch
from torch import nn

from nclightning.functional import GradientStep
from nclightning.optim import ArmijoGD
from nclightning.optim.rules import curvature_scales, momentum_buffer, step_of, weight_decays


def parameter(*values):
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


@pytest.mark.parametrize(
    ("make", "law", "is_linear"),
    [
        (lambda p: torch.optim.SGD(p, 0.1), GradientStep(0.1), True),
        (
            lambda p: torch.optim.SGD(p, 0.1, 0.9, 0.2, 0.3, maximize=True),
            GradientStep(0.1, 0.9, 0.2, decay=0.3, maximize=True),
            True,
        ),
        (
            lambda p: torch.optim.SGD(p, torch.tensor(0.5), 0.5, nesterov=True),
            GradientStep(0.5, 0.5, nesterov=True),
            True,
        ),
        (lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.3), GradientStep(0.1), False),
        (lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.3), GradientStep(0.1, decoupled_decay=0.3), False),
        (ArmijoGD, GradientStep(0.0), True),
    ],
)
def test_steps(make, law, is_linear):
    optimizer = make([parameter(1.0)])
    step = step_of(optimizer, optimizer.param_groups[0])
    assert step == (law, is_linear)


def test_a_line_search_tells_the_step_it_took():
    p = parameter(3.0, -4.0)
    optimizer = ArmijoGD([p], initial_step=1e-3, patience=1)

    def closure():
        optimizer.zero_grad()
        value = p.square().sum() / 2
        value.backward()
        return value

    before = p.detach().clone()
    optimizer.step(closure)
    step = step_of(optimizer, optimizer.param_groups[0])
    assert torch.allclose(p, (1 - step.law.lr) * before)
    assert step.law.lr != optimizer.param_groups[0]["lr"]


def test_other_optimizers_are_not_known():
    class Own(torch.optim.SGD):
        def step(self, closure=None):
            return None

    for optimizer in (torch.optim.RMSprop([parameter(1.0)]), Own([parameter(1.0)], 0.1)):
        assert step_of(optimizer, optimizer.param_groups[0]) is None
        assert curvature_scales(optimizer) is None


def test_momentum_buffers_are_not_made_by_looking():
    p = parameter(1.0)
    optimizer = torch.optim.SGD([p], 0.1, momentum=0.9)
    assert momentum_buffer(optimizer, p) is None
    assert not optimizer.state
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert momentum_buffer(optimizer, p).item() == 1


def test_coupled_decay_of_each_parameter():
    frozen, one, other = parameter(1.0).requires_grad_(False), parameter(1.0), parameter(2.0)
    groups = [{"params": [frozen, one]}, {"params": [other], "weight_decay": 0.5}]
    for kind, coupled in ((torch.optim.SGD, True), (torch.optim.Adam, True), (torch.optim.AdamW, False)):
        found = weight_decays(kind(groups, lr=0.1, weight_decay=0.2))
        assert [p for p, _ in found] == [one, other]
        assert [decay for _, decay in found] == ([0.2, 0.5] if coupled else [0.0, 0.0])


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.4])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_the_preconditioner_of_adam_is_what_its_step_divides_by(kind, decay, amsgrad):
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(5, dtype=torch.float64))
    optimizer = kind([p], lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=decay, amsgrad=amsgrad)
    for i in range(7):
        before = p.detach().clone()
        p.grad = torch.randn(5, dtype=torch.float64) * 3.0**-i
        optimizer.step()
    decoupled = decay if kind is torch.optim.AdamW else 0.0
    taken = p.detach() - (1 - 0.1 * decoupled) * before
    preconditioner = -0.1 * optimizer.state[p]["exp_avg"] / taken
    (scale,) = curvature_scales(optimizer)
    factor = 0.1 * 0.2 / (1.8 * (2 - 0.1 * decoupled))
    assert torch.allclose(scale.square(), factor / preconditioner, rtol=1e-10)


def test_no_scale_where_no_limit_is_known():
    p, q = parameter(1.0), parameter(2.0)
    assert curvature_scales(torch.optim.Adam([p], 0.1)) is None  # It has no preconditioner yet.
    assert curvature_scales(ArmijoGD([p])) is None
    assert curvature_scales(torch.optim.SGD([p], 0.1, maximize=True)) is None
    differing = [{"params": [p]}, {"params": [q], "momentum": 0.5}]
    assert curvature_scales(torch.optim.SGD(differing, lr=0.1, momentum=0.9)) is None
    differing = [{"params": [p]}, {"params": [q], "lr": 0.4}]
    scales = curvature_scales(torch.optim.SGD(differing, lr=0.1))
    assert scales == pytest.approx([math.sqrt(0.1 / 2), math.sqrt(0.4 / 2)])
