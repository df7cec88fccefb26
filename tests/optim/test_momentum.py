"""Momentum whose constants come from mu and L."""

import copy
import math
import pickle

import pytest
import torch

from nclightning.optim import HeavyBall, Nesterov

MU, SMOOTHNESS = 0.02, 3.0
KINDS = [HeavyBall, Nesterov]


def quadratic(size=6, dtype=torch.float64):
    values = torch.linspace(MU, SMOOTHNESS, size, dtype=dtype)
    return lambda x: (values * x.square()).sum() / 2


def step(optimizer, params, f):
    optimizer.zero_grad()
    f(torch.cat([p.flatten() for p in params])).backward()
    optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_iterates_are_those_of_the_textbook(kind):
    f = quadratic()
    values = torch.linspace(MU, SMOOTHNESS, 6, dtype=torch.float64)
    start = torch.arange(1.0, 7.0, dtype=torch.float64)
    x = torch.nn.Parameter(start.clone())
    optimizer = kind([x], MU, SMOOTHNESS)
    t, beta = optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]
    now = before = start
    for _ in range(50):
        if kind is HeavyBall:
            now, before = now - t * values * now + beta * (now - before), now
            expected = now
        else:
            y = now + beta * (now - before)
            now, before = y - t * values * y, now
            expected = now + beta * (now - before)  # Where torch is.
        step(optimizer, [x], f)
        torch.testing.assert_close(x.detach(), expected, rtol=1e-12, atol=1e-13)


def test_constants():
    group = HeavyBall([torch.nn.Parameter(torch.zeros(2))], 1.0, 100.0).param_groups[0]
    assert (group["lr"], group["momentum"], group["nesterov"]) == pytest.approx((4 / 121, (9 / 11) ** 2, False))
    group = Nesterov([torch.nn.Parameter(torch.zeros(2))], 1.0, 100.0).param_groups[0]
    root = math.sqrt(301)
    assert (group["lr"], group["momentum"], group["nesterov"]) == pytest.approx(
        (4 / 301, (root - 2) / (root + 2), True)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_equal_curvature_is_done_in_one_step(kind):
    x = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = kind([x], 2.0, 2.0)
    assert optimizer.param_groups[0]["momentum"] == 0
    step(optimizer, [x], lambda x: x.square().sum())
    assert float(x.detach().norm()) < 1e-15


@pytest.mark.parametrize("kind", KINDS)
def test_without_constants_there_is_no_step(kind):
    x = torch.nn.Parameter(torch.ones(6, dtype=torch.float64))
    optimizer = kind([x])
    assert not optimizer.is_tuned
    with pytest.raises(ValueError, match=f"{kind.__name__} has no step and momentum: pass mu and smoothness"):
        step(optimizer, [x], quadratic())
    assert torch.equal(x.detach(), torch.ones(6, dtype=torch.float64))
    optimizer.tune(MU, SMOOTHNESS)
    step(optimizer, [x], quadratic())
    assert optimizer.is_tuned
    assert optimizer.param_groups[0]["lr"] == kind([x], MU, SMOOTHNESS).param_groups[0]["lr"]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
@pytest.mark.parametrize("kind", KINDS)
def test_without_constants_a_copy_takes_no_step_either(kind, duplicate):
    other = duplicate(kind([torch.nn.Parameter(torch.ones(6, dtype=torch.float64))]))
    x = other.param_groups[0]["params"][0]
    with pytest.raises(ValueError, match=f"{kind.__name__} has no step and momentum"):
        step(other, [x], quadratic())
    assert torch.equal(x.detach(), torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda kind, p: kind([p], 1.0), "mu and smoothness must be given together, got 1.0 and None"),
        (lambda kind, p: kind([p], smoothness=1.0), "mu and smoothness must be given together, got None and 1.0"),
        (lambda kind, p: kind([p], 2.0, 1.0), "0 <= mu <= smoothness, got 2.0 and 1.0"),
        (lambda kind, p: kind([p], 0.0, 1.0), "mu is 0"),
        (lambda kind, p: kind([p], -1e-9, 1.0), "least nonzero .* got -1e-09"),
        (lambda kind, p: kind([p]).tune(math.nan, 1.0), "got nan and 1.0"),
        (lambda kind, p: kind([{"params": [p], "lr": 0.1}], 1.0, 2.0), "share one step .* cannot set lr"),
        (lambda kind, p: kind([{"params": [p], "weight_decay": 0.1}], 1.0, 2.0), "cannot set weight_decay"),
    ],
)
def test_what_cannot_be_is_refused(kind, make, message):
    with pytest.raises(ValueError, match=message):
        make(kind, torch.nn.Parameter(torch.ones(2)))


@pytest.mark.parametrize("kind", KINDS)
def test_groups_frozen_parameters_and_those_without_gradient(kind):
    whole = torch.nn.Parameter(torch.ones(6, dtype=torch.float64))
    parts = [torch.nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(3)]
    still = torch.nn.Parameter(torch.ones(2, dtype=torch.float64), requires_grad=False)
    unused = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    one = kind([whole], MU, SMOOTHNESS)
    other = kind([{"params": parts[:1]}, {"params": [still]}])
    other.tune(MU, SMOOTHNESS)
    other.add_param_group({"params": [*parts[1:], unused]})
    for _ in range(30):
        step(one, [whole], quadratic())
        step(other, parts, quadratic())
    assert torch.equal(torch.cat([p.detach() for p in parts]), whole.detach())
    assert torch.equal(still, torch.ones(2, dtype=torch.float64))
    assert torch.equal(unused.detach(), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("copied", ["state", "untuned state", "deepcopy", "pickle"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_goes_on_bit_for_bit(kind, copied):
    x = torch.nn.Parameter(torch.ones(6, dtype=torch.float64))
    optimizer = kind([x], MU, SMOOTHNESS)
    for _ in range(10):
        step(optimizer, [x], quadratic())
    if "state" in copied:
        y = torch.nn.Parameter(x.detach().clone())
        other = kind([y]) if copied == "untuned state" else kind([y], 1.0, 2.0)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert other.is_tuned
    else:
        other = copy.deepcopy(optimizer) if copied == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
        y = other.param_groups[0]["params"][0]
    for _ in range(10):
        step(optimizer, [x], quadratic())
        step(other, [y], quadratic())
    assert torch.equal(x.detach(), y.detach())


def test_schedulers_and_hooks_see_each_step_once():
    torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)  # Its step is wrapped with its first instance.
    x, seen = torch.nn.Parameter(torch.ones(6, dtype=torch.float64)), []
    optimizer = HeavyBall([x], MU, SMOOTHNESS)
    optimizer.register_step_post_hook(lambda *_: seen.append(1))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    first = optimizer.param_groups[0]["lr"]
    for _ in range(4):
        step(optimizer, [x], quadratic())
        schedule.step()
    assert len(seen) == 4
    assert optimizer.param_groups[0]["lr"] == first / 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_float32_at_any_scale(kind, scale):
    x = torch.nn.Parameter(torch.ones(6))
    optimizer = kind([x], MU * scale, SMOOTHNESS * scale)
    for _ in range(300):
        step(optimizer, [x], lambda x: quadratic(dtype=torch.float32)(x) * scale)
    assert float(x.detach().norm()) < 1e-6
