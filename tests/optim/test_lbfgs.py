"""ArmijoLBFGS: the vector of the textbook, known minima, safeguards, states, and what strangers do."""

import copy
import math
import pickle

import pytest
import scipy.optimize
import torch
from torch import nn

from nclightning.models.graph import AutogradObjective
from nclightning.optim import ArmijoGD, ArmijoLBFGS, SearchStatus
from tests.optim.closures import (
    DISTURBANCES,
    FALLING,
    closure_of,
    freeze,
    logistic,
    loss_of,
    network,
    parameter,
    quadratic,
    step,
)
from tests.optim.problems import FUNCTIONS, beale, rosenbrock


def run(f, start, steps=500, dtype=torch.float64, **options):
    """Step until the search ends or the gradient is a zero of the dtype; return point, outcome and evaluations."""
    x = parameter(*start, dtype=dtype)
    optimizer = ArmijoLBFGS([x], **options)
    closure = closure_of(optimizer, f, x)
    for _ in range(steps):
        optimizer.step(closure)
        if not optimizer.outcome.accepted:
            break
    return x.detach(), optimizer


def two_loops(gradient, pairs):
    """H g as Algorithm 7.4 of Nocedal and Wright writes it."""
    q, alphas = gradient.clone(), []
    for s, y in reversed(pairs):
        alphas.append((s @ q) / (s @ y))
        q -= alphas[-1] * y
    s, y = pairs[-1]
    r = (s @ y) / (y @ y) * q
    for (s, y), alpha in zip(pairs, reversed(alphas), strict=True):
        r += s * (alpha - (y @ r) / (y @ s))
    return r


@pytest.mark.parametrize("history", [1, 3, 10])
@pytest.mark.parametrize("name", ["rosenbrock-10", "zakharov-6", "quadratic-20", "himmelblau"])
def test_steps_go_along_the_vector_of_the_two_loops(name, history):
    function = next(f for f in FUNCTIONS if f.name == name)
    x = parameter(*function.start)
    optimizer = ArmijoLBFGS([x], history=history)
    closure = closure_of(optimizer, function.f, x)

    def gradient():
        return torch.autograd.grad(function.f(x), x)[0]

    pairs = []
    for _ in range(40):
        before, g = x.detach().clone(), gradient()
        optimizer.step(closure)
        outcome = optimizer.outcome
        if outcome.grad_norm < 1e-5 * (1 + abs(outcome.objective)):
            break
        moved, change = x.detach() - before, gradient() - g
        expected = g if not pairs else two_loops(g, pairs[-history:])
        # Both are sums of terms that cancel: to a few thousand roundings of the largest.
        torch.testing.assert_close(-moved / outcome.step_size, expected, rtol=1e-7, atol=1e-9 * float(expected.norm()))
        if moved @ change > 1e-13 * moved.norm() * (change.norm() + g.norm()):
            pairs.append((moved, change))
    assert len(pairs) > min(history, 3)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.name)
def test_known_functions(function):
    """To the precision of the value where gradient descent takes thousands of steps."""
    x, optimizer = run(function.f, function.start, 300)
    if function.minimum is None:
        gradient = torch.func.grad(function.f)(x)
        assert float(gradient.norm()) < 1e-9
    else:
        assert float(function.f(x)) == pytest.approx(function.minimum, abs=1e-12)
    assert optimizer.total_evaluations < 400


@pytest.mark.parametrize(("f", "start", "minimum"), [(rosenbrock, (-1.2, 1.0), (1, 1)), (beale, (2.0, 0.0), (3, 0.5))])
def test_minima_are_reached_to_round_off(f, start, minimum):
    """The values stop to tell at 1e-8 of the minimum where this is not 0; it is, so that all digits come."""
    x, _ = run(lambda x: f(x) + 1.0, start)
    torch.testing.assert_close(x, torch.tensor(minimum, dtype=x.dtype), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("condition", "size", "history", "evaluations"), [(1e2, 50, 10, 200), (1e4, 20, 10, 1500), (1e8, 6, 20, 400)]
)
def test_quadratics_of_any_condition(condition, size, history, evaluations):
    x = nn.Parameter(torch.zeros(size, dtype=torch.float64))
    optimizer = ArmijoLBFGS([x], history=history)
    closure = closure_of(optimizer, quadratic(condition, size), x)
    while optimizer.outcome is None or optimizer.outcome.grad_norm > 1e-14:
        optimizer.step(closure)
        assert optimizer.outcome.accepted
        assert optimizer.total_evaluations < evaluations
    # The gradient's round-off, over the least eigenvalue.
    assert float((x.detach() - 1).norm()) < 2e-14 * condition


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logistic_regression_is_that_of_a_newton_method(dtype):
    f = logistic(torch.float64)
    w = torch.zeros(12, dtype=torch.float64)
    for _ in range(50):
        w = w - torch.linalg.solve(torch.func.hessian(f)(w), torch.func.grad(f)(w))
    assert float(torch.func.grad(f)(w).norm()) < 1e-14
    x, optimizer = run(logistic(dtype), (0.0,) * 12, 300, dtype)
    # The gradient's rounding over the least eigenvalue, about 1e-3.
    assert float((x.double() - w).norm()) < 1e4 * torch.finfo(dtype).eps
    assert optimizer.total_evaluations < 400


def test_as_few_evaluations_as_scipy():
    function = next(f for f in FUNCTIONS if f.name == "rosenbrock-16")
    x = parameter(*function.start)
    optimizer = ArmijoLBFGS([x])
    closure = closure_of(optimizer, function.f, x)
    while optimizer.outcome is None or optimizer.outcome.grad_norm > 1e-6:
        optimizer.step(closure)

    def value_and_gradient(a):
        y = parameter(*a)
        value = function.f(y)
        value.backward()
        return float(value.detach()), y.grad.numpy()

    theirs = scipy.optimize.minimize(
        value_and_gradient, function.start, jac=True, method="L-BFGS-B", options={"gtol": 1e-7, "ftol": 0}
    )
    assert optimizer.total_evaluations < 1.5 * theirs.nfev


def test_negative_curvature_makes_no_pair_and_longer_steps():
    """F = x^4 / 4 - x^2 / 2 from near its maximum: up to 1/sqrt(3) the slope grows along the way."""
    x = parameter(1e-3)
    optimizer = ArmijoLBFGS([x])
    closure = closure_of(optimizer, lambda x: (x**4 / 4 - x**2 / 2).sum(), x)
    sizes = []
    while optimizer.outcome is None or optimizer.outcome.grad_norm > 1e-12:
        optimizer.step(closure)
        sizes.append(optimizer.outcome.step_size)
        assert optimizer.outcome.accepted
        assert len(sizes) < 30
    assert sizes[:3] == [1.0, 4.0, 16.0]
    assert x.item() == pytest.approx(1.0, abs=1e-12)


class Rounded(torch.autograd.Function):
    """The linear function -sum x, whose gradient is rounded up and down in turns."""

    calls = 0

    @staticmethod
    def forward(ctx, x):
        return -x.sum()

    @staticmethod
    def backward(ctx, gradient):
        Rounded.calls += 1
        return -gradient.expand(3) * (1 + 2.0**-52 * (-1) ** Rounded.calls)


def test_rounding_is_no_curvature():
    x = parameter(1.0, 2.0, 3.0)
    optimizer = ArmijoLBFGS([x])
    Rounded.calls, sizes = 0, []
    for _ in range(6):
        optimizer.step(closure_of(optimizer, Rounded.apply, x))
        sizes.append(optimizer.outcome.step_size)
    assert sizes == [4.0**k for k in range(6)]


def test_a_vector_that_is_uphill_gives_way_to_the_gradient():
    model = network()
    optimizer = ArmijoLBFGS(model.parameters())
    step(optimizer, model, 12)
    optimizer._direction.scale = -1e3  # As no run leaves it: the vector and the scaled gradient are uphill.
    before = [p.detach().clone() for p in model.parameters()]
    gradients = [p.grad.clone() for p in model.parameters()]
    (outcome,) = step(optimizer, model, 1)
    assert outcome.status is SearchStatus.ACCEPTED
    for p, x, g in zip(model.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(x - p.detach(), outcome.step_size * g, rtol=1e-12, atol=1e-15)
    assert len(optimizer._direction._order) == 1


def test_gradients_that_come_and_go():
    """Of F = (x - 1)^2 + y^2, y is left out where x is negative."""
    x, y = parameter(2.0), parameter(1.5)
    optimizer = ArmijoLBFGS([x, y])
    missing = []

    def closure():
        optimizer.zero_grad()
        value = (2 * (x - 1).square() + (y.square() if x.item() > 0 else 0.0)).sum()
        value.backward()
        missing.append(y.grad is None)
        return value

    for number in range(12):
        if number in (1, 5):
            x.data.fill_(-1.0)
        optimizer.step(closure)
    assert {True, False} == set(missing)
    assert (x.item(), y.item()) == pytest.approx((1.0, 0.0), abs=1e-6)


@pytest.mark.parametrize("disturb", ["freeze", "thaw"])
def test_pairs_of_other_parameters_are_forgotten(disturb):
    model = network()
    weight = model[0].weight.requires_grad_(disturb == "freeze")
    optimizer = ArmijoLBFGS(model.parameters())
    step(optimizer, model, 12)
    weight.requires_grad_(disturb == "thaw")
    step(optimizer, model, 1)
    assert len(optimizer._direction._order) == 1


def test_pairs_that_mislead_are_forgotten_within_the_step():
    """Another objective from step 5 on, whose curvatures are those of the first one turned round."""
    curvatures = [torch.logspace(0, 8, 6, dtype=torch.float64)]
    x = nn.Parameter(torch.ones(6, dtype=torch.float64))
    optimizer = ArmijoLBFGS([x], reuse_gradient=False, max_trials=30)
    closure = closure_of(optimizer, lambda x: (curvatures[0] * x.square()).sum() / 2, x)
    for i in range(60):
        if i == 5:
            curvatures[0] = curvatures[0].flip(0)
        optimizer.step(closure)
        if i in (4, 59):
            assert optimizer.outcome.accepted or optimizer.outcome.objective < 1e-12
    assert optimizer.outcome.objective < 1e-6


@pytest.mark.parametrize(
    ("scale", "unit"),
    [(1e-130, 1.0), (1e140, 1.0), (1.0, 1e-140), (1.0, 1e130), (1e-70, 1e60), (1e70, 1e-60), (1e130, 1e120)],
)
def test_iterates_do_not_depend_on_units(scale, unit):
    """F(x / unit) * scale: the run is the same, bit for bit, wherever squares of the gradient are numbers."""
    scale, unit = 2.0 ** round(math.log2(scale)), 2.0 ** round(math.log2(unit))
    function = next(f for f in FUNCTIONS if f.name == "rosenbrock-10")

    def path(scale, unit):
        x = parameter(*(unit * v for v in function.start))
        optimizer = ArmijoLBFGS([x], initial_step=2.0**-12 * unit**2 / scale)
        closure = closure_of(optimizer, lambda x: function.f(x / unit) * scale, x)
        for _ in range(60):
            optimizer.step(closure)
        return x.detach() / unit, optimizer.total_evaluations

    found, evaluations = path(scale, unit)
    expected, expected_evaluations = path(1.0, 1.0)
    assert torch.equal(found, expected)
    assert evaluations == expected_evaluations


@pytest.mark.parametrize("initial_step", [1e-30, 1e-9, 1e9, 1e30])
def test_any_first_step_will_do(initial_step):
    x, optimizer = run(lambda x: rosenbrock(x) + 1, (-1.2, 1.0), initial_step=initial_step)
    torch.testing.assert_close(x, torch.ones(2, dtype=x.dtype), rtol=0, atol=1e-10)
    assert optimizer.total_evaluations < 400


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("function", "status"), FALLING.values(), ids=FALLING)
def test_objectives_that_fall_for_ever_end_in_words_that_say_so(function, status, dtype):
    x, optimizer = run(function, (1.0,), 3000, dtype)
    assert optimizer.outcome.status in (SearchStatus.UNBOUNDED, SearchStatus.UNATTAINED)
    assert x.isfinite().all()


@pytest.mark.parametrize("power", [2, 4, 6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_degenerate_minima_are_stationary(power, dtype):
    _, optimizer = run(lambda x: (x**power).sum(), (0.7,), 3000, dtype)
    assert optimizer.outcome.status is SearchStatus.STATIONARY


@pytest.mark.parametrize("in_memory", [True, False], ids=["deepcopy", "file"])
@pytest.mark.parametrize("done", [1, 2, 7, 20, 33])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_resumed_run_continues_bit_for_bit(dtype, done, in_memory, tmp_path):
    straight = network(dtype)
    optimizer = ArmijoLBFGS(straight.parameters(), history=5)
    expected = step(optimizer, straight, 40)
    first = network(dtype)
    other = ArmijoLBFGS(first.parameters(), history=5)
    step(other, first, done)
    if in_memory:
        state, weights = copy.deepcopy(other.state_dict()), copy.deepcopy(first.state_dict())
    else:
        torch.save((other.state_dict(), first.state_dict()), tmp_path / "state.pt")
        state, weights = torch.load(tmp_path / "state.pt", weights_only=True)
    second = network(dtype, seed=5)
    second.load_state_dict(weights)
    resumed = ArmijoLBFGS(second.parameters(), history=5)
    resumed.load_state_dict(state)
    assert step(resumed, second, 40 - done) == expected[done:]
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), second.parameters(), strict=True))
    assert resumed.total_evaluations == optimizer.total_evaluations


def write_history(optimizer, model, size):
    optimizer.param_groups[0]["history"] = size


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (lambda optimizer, model: write_history(optimizer, model, 2), None),
        (lambda optimizer, model: write_history(optimizer, model, 9), None),
        (None, lambda optimizer, model: model[0].requires_grad_(False)),
    ],
    ids=["fewer pairs", "more pairs", "frozen after the resume"],
)
def test_a_run_goes_on_bit_for_bit_from_a_state_that_is_written_to(before, after):
    """Before it is saved, and after it is loaded."""
    models = [network(), network(seed=5)]
    optimizers = [ArmijoLBFGS(model.parameters(), history=5) for model in models]
    step(optimizers[0], models[0], 12)
    if before is not None:
        before(optimizers[0], models[0])
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    if after is not None:
        for optimizer, model in zip(optimizers, models, strict=True):
            after(optimizer, model)
    straight, resumed = (step(o, m, 15) for o, m in zip(optimizers, models, strict=True))
    assert [o.objective for o in resumed] == [o.objective for o in straight]
    assert all(torch.equal(p, q) for p, q in zip(*(m.parameters() for m in models), strict=True))


def test_a_state_has_tensors_of_the_parameters_shapes_only():
    model = network()
    optimizer = ArmijoLBFGS(model.parameters(), history=4)
    step(optimizer, model, 10)
    state, params = optimizer.state_dict()["state"], list(model.parameters())
    assert list(state) == list(range(len(params)))
    for index, entries in state.items():
        assert len(entries) == 8
        assert all(value.shape == params[index].shape for value in entries.values())


@pytest.mark.parametrize("make", [ArmijoGD, ArmijoLBFGS])
def test_a_run_whose_steps_ran_away_ends_where_it_is_after_a_resume_too(make):
    f = (lambda x: torch.exp(-x).sum()) if make is ArmijoGD else (lambda x: -x.sum())
    x = parameter(1.0, 2.0, dtype=torch.float32)
    optimizer = make([x])
    closure = closure_of(optimizer, f, x)
    while optimizer.outcome is None or optimizer.outcome.accepted:
        state, last = copy.deepcopy(optimizer.state_dict()), x.detach().clone()
        optimizer.step(closure)
    assert optimizer.outcome.status is SearchStatus.UNATTAINED
    y = nn.Parameter(last.clone())
    other = make([y])
    other.load_state_dict(state)
    other.step(closure_of(other, f, y))
    assert other.outcome.status is SearchStatus.UNATTAINED
    assert torch.equal(y.detach(), last)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copies_continue_on_their_own(duplicate):
    model = network()
    optimizer = ArmijoLBFGS(model.parameters())
    step(optimizer, model, 12)
    twin_model, twin = duplicate((model, optimizer))
    assert step(twin, twin_model, 10) == step(optimizer, model, 10)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin_model.parameters(), strict=True))


def test_a_state_of_another_direction_is_refused():
    x = parameter(1.0)
    for one, other in ((ArmijoGD, ArmijoLBFGS), (ArmijoLBFGS, ArmijoGD)):
        with pytest.raises(ValueError, match=f"not made by {one.__name__}: it is a state of"):
            one([x]).load_state_dict(other([x]).state_dict())
    with pytest.raises(ValueError, match="not made by ArmijoLBFGS"):
        ArmijoLBFGS([x]).load_state_dict(torch.optim.SGD([x], lr=1.0).state_dict())


def test_a_line_takes_the_steps_of_a_closure_bit_for_bit():
    plain, lazy = network(), network()
    optimizer, other = ArmijoLBFGS(plain.parameters()), ArmijoLBFGS(lazy.parameters())
    line = AutogradObjective(lambda: loss_of(lazy), list(lazy.parameters()))
    assert step(optimizer, plain, 30) == step(other, lazy, 30, line)
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), lazy.parameters(), strict=True))


def test_groups_take_the_steps_of_one():
    whole, split = network(), network()
    optimizer = ArmijoLBFGS(whole.parameters())
    other = ArmijoLBFGS([{"params": [p]} for p in split.parameters()])
    assert step(optimizer, whole, 20) == step(other, split, 20)


@pytest.mark.parametrize("disturb", DISTURBANCES)
def test_it_goes_on_after_what_is_done_between_steps(disturb):
    model = network()
    optimizer = ArmijoLBFGS(model.parameters())
    step(optimizer, model, 12)
    disturb(model, optimizer)
    frozen = model[0].weight.detach().clone()
    step(optimizer, model, 300)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss_of(model), trained)
    size = torch.finfo(trained[0].dtype).eps
    assert math.sqrt(sum(float(g.square().sum()) for g in gradients)) < 100 * size
    assert disturb is not freeze or torch.equal(model[0].weight, frozen)


def test_what_has_no_gradient_stays_and_may_get_one():
    used, unused = parameter(1.0, 2.0), parameter(7.0)
    optimizer = ArmijoLBFGS([used, unused], reuse_gradient=False)  # The objective changes.
    for _ in range(5):
        optimizer.step(closure_of(optimizer, lambda x: rosenbrock(x) + 1, used))
    assert unused.item() == 7.0
    for _ in range(60):
        optimizer.step(closure_of(optimizer, lambda x, y: rosenbrock(x) + (y - 1).square().sum() + 1, used, unused))
    assert unused.item() == pytest.approx(1.0, abs=1e-10)


def test_dtypes_and_devices_of_parameters_may_differ():
    x, y = parameter(1.0, -2.0, dtype=torch.float32), parameter(3.0)
    optimizer = ArmijoLBFGS([x, y])
    f = lambda x, y: (x.double() - y).square().sum() + (y - 2).square().sum() + (x.double() ** 4).sum()  # noqa: E731
    for _ in range(40):
        optimizer.step(closure_of(optimizer, f, x, y))
    gradients = torch.autograd.grad(f(x, y), (x, y))
    assert max(float(g.abs().max()) for g in gradients) < 1e-6


def test_a_schedule_says_where_each_search_begins():
    x = parameter(1.0, 2.0)
    optimizer = ArmijoLBFGS([x])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 / (i + 1))
    sizes = []
    for _ in range(4):
        optimizer.step(closure_of(optimizer, lambda x: (x * x * x.new_tensor([0.1, 0.3])).sum(), x))
        sizes.append(optimizer.outcome.step_size)
        scheduler.step()
    assert sizes == [1.0, 1 / 2, 1 / 3, 1 / 4]


def test_parameters_without_dimensions():
    x, scalar = parameter(1.0, -2.0), nn.Parameter(torch.tensor(3.0, dtype=torch.float64))
    optimizer = ArmijoLBFGS([x, scalar])
    for _ in range(60):
        optimizer.step(closure_of(optimizer, lambda x, s: ((x * x - s) ** 2).sum() + (s - 2) ** 2 + 1, x, scalar))
    assert scalar.item() == pytest.approx(2.0, abs=1e-12)


def test_an_exception_in_a_trial_restores_the_iterate_and_keeps_the_pairs():
    model = network()
    optimizer = ArmijoLBFGS(model.parameters())
    step(optimizer, model, 12)
    twin_model, twin = copy.deepcopy((model, optimizer))
    calls = []

    def failing():
        optimizer.zero_grad()
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError
        value = loss_of(model)
        value.backward()
        return value

    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError):
        optimizer.step(failing)
    assert all(torch.equal(p, x) for p, x in zip(model.parameters(), before, strict=True))
    optimizer.step(failing)
    step(twin, twin_model, 1)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin_model.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_refused(dtype):
    x = parameter(1.0, dtype=dtype)
    optimizer = ArmijoLBFGS([x])
    with pytest.raises(ValueError, match=r"ArmijoLBFGS needs parameters in float32 or float64, got one of dtype"):
        optimizer.step(closure_of(optimizer, lambda x: x.square().sum(), x))
    assert x.item() == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial_step": 0}, r"ArmijoLBFGS\(initial_step=...\) must be positive and finite, got 0"),
        ({"history": 0}, r"ArmijoLBFGS\(history=...\) must be an integer of at least 1, got 0"),
        ({"history": 2.5}, "history"),
        ({"history": True}, "history"),
        ({"c1": 0.5}, "c1"),
        ({"shrink": 1.0}, "shrink"),
    ],
)
def test_options_are_validated(options, message):
    with pytest.raises(ValueError, match=message):
        ArmijoLBFGS([parameter(1.0)], **options)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda x: ArmijoLBFGS([x]).step(), r"ArmijoLBFGS\.step needs a closure"),
        (lambda x: ArmijoLBFGS([{"params": [x], "c1": 0.1}]), r"Pass it to ArmijoLBFGS\(...\)"),
        (lambda x: ArmijoLBFGS([x]).step(lambda: None), r"the closure of ArmijoLBFGS\.step must return"),
        (lambda x: ArmijoLBFGS([x, x]), "occurs twice in a group of ArmijoLBFGS"),
    ],
)
def test_messages_name_the_class(act, message):
    with pytest.raises(ValueError, match=message):
        act(parameter(1.0))
