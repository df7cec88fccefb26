"""ArmijoCG and ArmijoNewtonCG: known minima, states, and what strangers do."""

import copy
import pickle

import pytest
import torch

from nclightning.models.graph import AutogradObjective
from nclightning.optim import ArmijoCG, ArmijoGD, ArmijoNewtonCG, SearchStatus
from tests.optim.closures import (
    DISTURBANCES,
    FALLING,
    closure_of,
    freeze,
    logistic,
    loss_of,
    network,
    parameter,
    shorten_history,
    step,
)
from tests.optim.problems import FUNCTIONS, beale, rosenbrock

BOTH = pytest.mark.parametrize("make", [ArmijoCG, ArmijoNewtonCG])


def run(make, f, start, evaluations=1500, dtype=torch.float64, until=0.0, **options):
    """Step until the search ends, the gradient is small or too many evaluations were spent."""
    x = parameter(*start, dtype=dtype)
    optimizer = make([x], **options)
    closure = closure_of(optimizer, f, x)
    while optimizer.total_evaluations < evaluations:
        optimizer.step(closure)
        if not optimizer.outcome.accepted or optimizer.outcome.grad_norm < until:
            break
    return x.detach(), optimizer


@BOTH
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.name)
def test_known_functions(function, make):
    x, _ = run(make, function.f, function.start, 600, until=1e-12)
    if function.minimum is None:
        assert float(torch.func.grad(function.f)(x).norm()) < 1e-9
    else:
        assert float(function.f(x)) == pytest.approx(function.minimum, abs=1e-12)


@BOTH
@pytest.mark.parametrize(("f", "start", "minimum"), [(rosenbrock, (-1.2, 1.0), (1, 1)), (beale, (2.0, 0.0), (3, 0.5))])
def test_minima_are_reached_to_round_off(f, start, minimum, make):
    """Of a value that is not 0, so that it stops to tell at 1e-8 of the minimum."""
    x, optimizer = run(make, lambda x: f(x) + 1.0, start, 400, until=1e-13)
    torch.testing.assert_close(x, torch.tensor(minimum, dtype=x.dtype), rtol=0, atol=1e-12)
    assert optimizer.total_evaluations < 200


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logistic_regression_is_that_of_a_newton_method(dtype, make):
    f = logistic(torch.float64)
    w = torch.zeros(12, dtype=torch.float64)
    for _ in range(50):
        w = w - torch.linalg.solve(torch.func.hessian(f)(w), torch.func.grad(f)(w))
    x, _ = run(make, logistic(dtype), (0.0,) * 12, 300, dtype)
    # The gradient's rounding over the least eigenvalue, about 1e-3.
    assert float((x.double() - w).norm()) < 1e4 * torch.finfo(dtype).eps


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("function", "status"), FALLING.values(), ids=FALLING)
def test_objectives_that_fall_for_ever_end_in_words_that_say_so(function, status, dtype, make):
    x, optimizer = run(make, function, (1.0,), 4000, dtype)
    assert optimizer.outcome.status in (SearchStatus.UNBOUNDED, SearchStatus.UNATTAINED)
    assert x.isfinite().all()


@BOTH
@pytest.mark.parametrize("power", [2, 4, 6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_degenerate_minima_are_stationary(power, dtype, make):
    _, optimizer = run(make, lambda x: (x**power).sum(), (0.7,), 4000, dtype)
    assert optimizer.outcome.status is SearchStatus.STATIONARY


@BOTH
def test_a_start_at_the_optimum_stays(make):
    x, optimizer = run(make, rosenbrock, (1.0, 1.0))
    assert x.tolist() == [1.0, 1.0]
    assert optimizer.outcome.status is SearchStatus.STATIONARY
    assert optimizer.total_evaluations == 1


@BOTH
def test_from_near_a_maximum(make):
    x, _ = run(make, lambda x: (x**4 / 4 - x**2 / 2).sum(), (1e-3,), 100, until=1e-13)
    assert x.item() == pytest.approx(1.0, abs=1e-12)


@BOTH
def test_a_flat_valley_is_reached_and_not_left(make):
    """Minima on the hyperbola ab = 1: the Hessian there is singular along it."""
    x, optimizer = run(make, lambda x: (x[0] * x[1] - 1) ** 2 + 1, (3.0, 0.1), 100, until=1e-14)
    assert float(x.prod()) == pytest.approx(1.0, abs=1e-13)
    assert float(x.norm()) < 5
    assert optimizer.outcome.grad_norm < 1e-14


@BOTH
@pytest.mark.parametrize(
    ("scale", "unit"), [(2.0**-430, 1.0), (2.0**460, 1.0), (1.0, 2.0**-465), (1.0, 2.0**430), (2.0**430, 2.0**400)]
)
def test_iterates_do_not_depend_on_units(scale, unit, make):
    """F(x / unit) * scale: the run is the same, bit for bit."""
    function = next(f for f in FUNCTIONS if f.name == "rosenbrock-10")

    def path(scale, unit):
        x = parameter(*(unit * v for v in function.start))
        first = 2.0**-12 * unit**2 / scale if make is ArmijoCG else 1.0
        optimizer = make([x], initial_step=first)
        closure = closure_of(optimizer, lambda x: function.f(x / unit) * scale, x)
        for _ in range(30):
            optimizer.step(closure)
            assert optimizer.outcome.accepted
        return x.detach() / unit, optimizer.total_evaluations

    found, evaluations = path(scale, unit)
    expected, expected_evaluations = path(1.0, 1.0)
    assert torch.equal(found, expected)
    assert evaluations == expected_evaluations


@BOTH
@pytest.mark.parametrize("in_memory", [True, False], ids=["deepcopy", "file"])
@pytest.mark.parametrize("done", [1, 7, 20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_resumed_run_continues_bit_for_bit(make, dtype, done, in_memory, tmp_path):
    straight = network(dtype)
    optimizer = make(straight.parameters())
    expected = step(optimizer, straight, 40)
    first = network(dtype)
    other = make(first.parameters())
    step(other, first, done)
    if in_memory:
        state, weights = copy.deepcopy(other.state_dict()), copy.deepcopy(first.state_dict())
    else:
        torch.save((other.state_dict(), first.state_dict()), tmp_path / "state.pt")
        state, weights = torch.load(tmp_path / "state.pt", weights_only=True)
    second = network(dtype, seed=5)
    second.load_state_dict(weights)
    resumed = make(second.parameters())
    resumed.load_state_dict(state)
    assert step(resumed, second, 40 - done) == expected[done:]
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), second.parameters(), strict=True))
    assert resumed.total_evaluations == optimizer.total_evaluations


@BOTH
def test_a_state_has_tensors_of_the_parameters_shapes_only(make):
    model = network()
    optimizer = make(model.parameters())
    step(optimizer, model, 10)
    state, params = optimizer.state_dict()["state"], list(model.parameters())
    assert list(state) == ([] if make is ArmijoNewtonCG else list(range(len(params))))
    for index, entries in state.items():
        assert sorted(entries) == ["change", "step"]
        assert all(value.shape == params[index].shape for value in entries.values())


@BOTH
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copies_continue_on_their_own(duplicate, make):
    model = network()
    optimizer = make(model.parameters())
    step(optimizer, model, 8)
    twin_model, twin = duplicate((model, optimizer))
    assert step(twin, twin_model, 5) == step(optimizer, model, 5)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin_model.parameters(), strict=True))


@BOTH
def test_a_state_of_another_direction_is_refused(make):
    x = parameter(1.0)
    with pytest.raises(ValueError, match=f"not made by {make.__name__}: it is a state of"):
        make([x]).load_state_dict(ArmijoGD([x]).state_dict())


def test_conjugate_gradients_take_the_steps_of_a_closure_along_a_line_bit_for_bit():
    plain, lazy = network(), network()
    optimizer, other = ArmijoCG(plain.parameters()), ArmijoCG(lazy.parameters())
    line = AutogradObjective(lambda: loss_of(lazy), list(lazy.parameters()))
    assert step(optimizer, plain, 30) == step(other, lazy, 30, line)
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), lazy.parameters(), strict=True))


@BOTH
@pytest.mark.parametrize("disturb", [each for each in DISTURBANCES if each is not shorten_history])
def test_it_goes_on_after_what_is_done_between_steps(disturb, make):
    model = network()
    optimizer = make(model.parameters())
    step(optimizer, model, 8)
    disturb(model, optimizer)
    frozen = model[0].weight.detach().clone()
    for _ in range(300):
        step(optimizer, model, 1)
        trained = [p for p in model.parameters() if p.requires_grad]
        size = torch.finfo(trained[0].dtype).eps
        if optimizer.outcome.grad_norm < 50 * size:
            break
    gradients = torch.autograd.grad(loss_of(model), trained)
    assert float(torch.cat([g.flatten() for g in gradients]).double().norm()) < 100 * size
    assert disturb is not freeze or torch.equal(model[0].weight, frozen)


@BOTH
def test_what_has_no_gradient_stays_and_may_get_one(make):
    def bowl(x):
        return (x[0] - 3) ** 2 + 10 * (x[0] + x[1]) ** 2 + 1

    used, unused = parameter(1.0, 2.0), parameter(7.0)
    optimizer = make([used, unused], reuse_gradient=False)  # The objective changes.
    for _ in range(3):
        optimizer.step(closure_of(optimizer, bowl, used))
    assert unused.item() == 7.0
    for _ in range(60):
        optimizer.step(closure_of(optimizer, lambda x, y: bowl(x) + (y - x[1]).square().sum(), used, unused))
    assert unused.item() == pytest.approx(-3.0, abs=1e-10)


@BOTH
def test_an_exception_in_a_trial_restores_the_iterate_and_keeps_what_was_learnt(make):
    model = network()
    optimizer = make(model.parameters())
    step(optimizer, model, 8)
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


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_refused(dtype, make):
    x = parameter(1.0, dtype=dtype)
    optimizer = make([x])
    with pytest.raises(ValueError, match=f"{make.__name__} needs parameters in float32 or float64, got one of dtype"):
        optimizer.step(closure_of(optimizer, lambda x: x.square().sum(), x))
    assert x.item() == 1.0


@BOTH
@pytest.mark.parametrize(
    ("options", "message"),
    [({"initial_step": 0}, "(initial_step=...) must be positive and finite, got 0"), ({"c1": 0.5}, "(c1=...)")],
)
def test_options_are_validated(options, message, make):
    with pytest.raises(ValueError, match="must be") as refusal:
        make([parameter(1.0)], **options)
    assert make.__name__ + message in str(refusal.value)


@BOTH
def test_a_resumed_run_sees_what_is_frozen_after_it(make):
    models = [network(), network(seed=5)]
    optimizers = [make(model.parameters()) for model in models]
    step(optimizers[0], models[0], 12)
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for optimizer, model in zip(optimizers, models, strict=True):
        freeze(model, optimizer)
    straight, resumed = (step(o, m, 15) for o, m in zip(optimizers, models, strict=True))
    assert [o.objective for o in resumed] == [o.objective for o in straight]
    assert all(torch.equal(p, q) for p, q in zip(*(m.parameters() for m in models), strict=True))


def test_an_older_state_of_conjugate_gradients_is_loaded():
    """Its tensors had other names."""
    models = network(), network()
    optimizers = [ArmijoCG(model.parameters()) for model in models]
    for optimizer, model in zip(optimizers, models, strict=True):
        step(optimizer, model, 5)
    state, older = optimizers[0].state_dict(), {"step": "along", "change": "bend"}
    state["state"] = {i: {older[name]: value for name, value in each.items()} for i, each in state["state"].items()}
    optimizers[1].load_state_dict(state)
    assert step(optimizers[1], models[1], 5) == step(optimizers[0], models[0], 5)
