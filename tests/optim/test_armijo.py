"""ArmijoGD: steps derived by hand, functions with known minima, failures, and its contract with torch."""

import copy
import math
import pickle

import pytest
import torch

from nclightning.optim import ArmijoGD, SearchStatus
from tests.optim.problems import FUNCTIONS


def parameter(*values, dtype=torch.float64):
    return torch.nn.Parameter(torch.tensor(values, dtype=dtype))


def closure_of(optimizer, f, *params):
    def closure():
        optimizer.zero_grad()
        value = f(*params)
        value.backward()
        return value

    return closure


def half_square(curvature):
    return lambda x: curvature * x.square().sum() / 2


# F = a x^2 / 2: a step t is accepted iff (1 - t a)^2 <= 1 - 2 c1 t a, that is t <= 2 (1 - c1) / a.
@pytest.mark.parametrize(
    ("curvature", "c1", "step"),
    [
        (1.0, 0.3, 1.0),  # 1 <= 1.4
        (1.5, 0.3, 0.5),  # 1 > 0.933
        (4.0, 0.3, 0.25),  # 0.5 > 0.35
        (1.7, 0.1, 1.0),  # 1 <= 1.058
        (1.7, 0.2, 0.5),  # 1 > 0.941
        (100.0, 0.3, 2.0**-7),  # 2^-6 = 0.0156 > 0.014
    ],
)
def test_accepted_step_on_a_quadratic(curvature, c1, step):
    x = parameter(3.0, -4.0)
    optimizer = ArmijoGD([x], c1=c1)
    value = optimizer.step(closure_of(optimizer, half_square(curvature), x))
    outcome = optimizer.outcome
    assert outcome.status is SearchStatus.ACCEPTED
    assert outcome.step_size == step
    assert outcome.evaluations == 2 + round(-math.log2(step))
    assert outcome.previous_objective == 12.5 * curvature
    assert outcome.previous_grad_norm == pytest.approx(5 * curvature, rel=1e-15)
    torch.testing.assert_close(
        x.detach(), (1 - step * curvature) * torch.tensor([3.0, -4.0], dtype=x.dtype), rtol=1e-15, atol=0
    )
    assert value == outcome.objective == pytest.approx(12.5 * curvature * (1 - step * curvature) ** 2, rel=1e-14)
    assert outcome.grad_norm == pytest.approx(abs(1 - step * curvature) * 5 * curvature, rel=1e-14, abs=1e-14)


def steps_of(optimizer, closure, count):
    for _ in range(count):
        optimizer.step(closure)
        yield optimizer.outcome.step_size, optimizer.outcome.evaluations


@pytest.mark.parametrize(
    ("grow", "steps"),
    [
        # Bound 2 (1 - 0.3) / 0.1 = 14: a 16 would be rejected, so it is not tried.
        (2.0, [1, 1, 2, 2, 4, 4, 8, 8, 8, 8, 8, 8]),
        (4.0, [1, 1, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4]),
    ],
)
def test_step_grows_after_patience_as_far_as_the_curvature_allows(grow, steps):
    x = parameter(1.0)
    optimizer = ArmijoGD([x], grow=grow)
    taken = list(steps_of(optimizer, closure_of(optimizer, half_square(0.1), x), 12))
    assert taken == [(steps[0], 2)] + [(step, 1) for step in steps[1:]]  # The first call pays for the start.
    assert optimizer.total_evaluations == 13


def test_step_shrinks_when_needed_and_the_count_of_acceptances_begins_anew():
    x, curvature = parameter(1.0), 0.1
    optimizer = ArmijoGD([x], reuse_gradient=False)  # One evaluation more per step: the objective changes.
    closure = closure_of(optimizer, lambda x: curvature * x.square().sum() / 2, x)
    assert list(steps_of(optimizer, closure, 3)) == [(1, 2), (1, 2), (4, 2)]
    curvature = 0.9  # Bound 1.56.
    assert list(steps_of(optimizer, closure, 1)) == [(1, 4)]
    curvature = 0.01
    assert list(steps_of(optimizer, closure, 3)) == [(1, 2), (1, 2), (4, 2)]


def test_growth_waits_for_the_curvature_rather_than_starting_its_count_anew():
    x, curvature = parameter(1.0), 0.5
    optimizer = ArmijoGD([x], reuse_gradient=False)
    closure = closure_of(optimizer, lambda x: curvature * x.square().sum() / 2, x)
    assert list(steps_of(optimizer, closure, 4)) == [(1, 2)] * 4  # 4 * 0.5 > 1.4.
    curvature = 0.34  # 4 * 0.34 < 1.4.
    assert list(steps_of(optimizer, closure, 2)) == [(1, 2), (4, 2)]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.name)
def test_known_functions(function):
    x = parameter(*function.start)
    optimizer = ArmijoGD([x])
    closure = closure_of(optimizer, function.f, x)
    c1 = optimizer.defaults["c1"]
    for _ in range(function.steps):
        before = x.detach().clone()
        optimizer.step(closure)
        outcome = optimizer.outcome
        moved = float((x.detach() - before).norm())
        if outcome.status is SearchStatus.ACCEPTED:
            decrease = outcome.previous_objective - outcome.objective
            # Armijo, and with it condition (i) of Fact 1 with kappa_1 = c1 / t: both sides are rounded once or twice.
            assert decrease >= c1 * outcome.step_size * outcome.previous_grad_norm**2 * (1 - 1e-14)
            assert decrease >= c1 / outcome.step_size * moved**2 * (1 - 1e-8)
        if outcome.accepted and outcome.previous_grad_norm > 1e-6:
            # Condition (iii) with kappa_3 = 1 / t; the move is rounded to the parameters' precision.
            assert outcome.previous_grad_norm == pytest.approx(moved / outcome.step_size, rel=1e-6)
        if not outcome.accepted or outcome.grad_norm < 1e-12:
            break
    if function.minimum is None:
        assert outcome.grad_norm < 1e-9
        assert outcome.objective < float(function.f(torch.tensor(function.start, dtype=torch.float64))) - 1
    else:
        assert outcome.objective == pytest.approx(function.minimum, abs=function.tolerance)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_trials_that_are_not_finite_are_rejected(bad):
    """F = x^2 / 2, undefined beyond |x| = 1 on the other side: from 0.5 the step 4 lands at -1.5."""
    x = parameter(0.5)
    optimizer = ArmijoGD([x], initial_step=4.0)

    def f(x):
        return half_square(1.0)(x) if float(x.detach()) > -1 else x.sum() * bad

    optimizer.step(closure_of(optimizer, f, x))
    assert optimizer.outcome.accepted
    assert optimizer.outcome.step_size == 1.0  # 4 is undefined, 2 gives no decrease, 1 does.


def test_a_gradient_that_is_not_finite_is_rejected():
    x = parameter(1.0)
    optimizer = ArmijoGD([x])
    # sqrt has an infinite slope at the 0 that the first trial would reach: x - 1 * (2 * 0.5) = 0.
    optimizer.step(closure_of(optimizer, lambda x: (x.sqrt() ** 2 + 0 * x).sum() / 1, x))
    assert float(x.detach()) > 0
    assert math.isfinite(optimizer.outcome.grad_norm)


@pytest.mark.parametrize("start", [math.nan, math.inf])
def test_start_that_is_not_finite_raises_and_changes_nothing(start):
    x = parameter(start)
    optimizer = ArmijoGD([x])
    with pytest.raises(ValueError, match=r"objective at the start of the step is .* must be finite"):
        optimizer.step(closure_of(optimizer, half_square(1.0), x))
    torch.testing.assert_close(x.detach(), torch.tensor([start], dtype=x.dtype), equal_nan=True)


def test_stationary_start():
    x = parameter(0.0, 0.0)
    optimizer = ArmijoGD([x])
    closure = closure_of(optimizer, half_square(1.0), x)
    for _ in range(3):
        assert optimizer.step(closure) == 0.0
        assert optimizer.outcome.status is SearchStatus.STATIONARY
    assert "stationary point" in optimizer.outcome.status.sentence
    assert optimizer.outcome.step_size == 0.0
    assert optimizer.total_evaluations == 3  # Asking again evaluates once: the closure's caller may count on it.
    assert optimizer.state_dict()["search"]["next_step"] == 1.0  # No growth on steps that were not taken.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flat_functions_are_stationary_and_keep_the_dtype(dtype):
    x = parameter(1.0, 2.0, dtype=dtype)
    optimizer = ArmijoGD([x])
    assert optimizer.step(closure_of(optimizer, lambda x: 0 * x.sum() + 3.0, x)) == 3.0
    assert optimizer.outcome.status is SearchStatus.STATIONARY
    assert x.dtype == dtype
    assert x.grad.dtype == dtype


def test_failure_restores_every_bit():
    x = parameter(*torch.randn(50, generator=torch.Generator().manual_seed(0)).tolist())
    before = x.detach().clone()
    optimizer = ArmijoGD([x], max_trials=20)

    def uphill(x):  # Whatever the step, the value comes back larger than at the start.
        return (x.square().sum() / 2) if torch.equal(x.detach(), before) else (1e6 + x.sum() * 0)

    optimizer.step(closure_of(optimizer, uphill, x))
    assert optimizer.outcome.status is SearchStatus.EXHAUSTED
    assert "max_trials" in optimizer.outcome.status.sentence
    assert optimizer.outcome.evaluations == 21
    assert torch.equal(x.detach(), before)
    torch.testing.assert_close(x.grad, before, rtol=0, atol=0)  # The gradient at the start, too.
    optimizer.step(closure_of(optimizer, uphill, x))  # Asking again at the same point costs one evaluation.
    assert optimizer.outcome.status is SearchStatus.EXHAUSTED
    assert optimizer.outcome.evaluations == 1


def test_stalls_where_the_step_no_longer_changes_the_parameters():
    x = parameter(1.0, dtype=torch.float32)
    optimizer = ArmijoGD([x], noise=0.0)
    values = iter([1.0] + [2.0] * 100)

    def f(x):
        return x.sum() - x.sum().detach() + next(values)

    optimizer.step(closure_of(optimizer, f, x))
    assert optimizer.outcome.status is SearchStatus.STALLED
    # float32 around 1: 1 - 2^-k is 1 from k = 25 on, so 25 trials, the one that shows it, and the start.
    assert optimizer.outcome.evaluations == 27
    assert x.item() == 1.0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_a_trial_restores_the_iterate(error):
    x = parameter(1.0, 2.0)
    optimizer = ArmijoGD([x])
    calls = 0

    def f(x):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise error
        return half_square(1.0)(x)

    with pytest.raises(error):
        optimizer.step(closure_of(optimizer, f, x))
    assert x.tolist() == [1.0, 2.0]
    optimizer.step(closure_of(optimizer, f, x))  # And the search goes on from there.
    assert x.tolist() == [0.0, 0.0]


def test_groups_move_along_one_direction():
    a, b = parameter(1.0), parameter(2.0, 3.0)
    joint, split = parameter(1.0, 2.0, 3.0), None
    f = lambda v: (torch.tensor([1.0, 5.0, 0.2], dtype=v.dtype) * v.square()).sum()  # noqa: E731
    grouped = ArmijoGD([{"params": [a]}, {"params": [b]}])
    single = ArmijoGD([joint])
    for _ in range(30):
        grouped.step(closure_of(grouped, lambda a, b: f(torch.cat([a, b])), a, b))
        single.step(closure_of(single, f, joint))
        split = torch.cat([a, b]).detach()
        # Products are summed group by group, so that the norm may differ in its last bit; steps are powers of two.
        assert torch.equal(split, joint.detach())
        assert grouped.outcome.step_size == single.outcome.step_size


def test_parameters_without_gradient_stay():
    used, unused = parameter(1.0), parameter(7.0)
    optimizer = ArmijoGD([used, unused])
    optimizer.step(closure_of(optimizer, half_square(1.0), used))
    assert (used.item(), unused.item()) == (0.0, 7.0)
    assert unused.grad is None


def quartic(x):
    return (x**4).sum() + (x - 1).square().sum()


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_state_dict_round_trip_continues_bit_for_bit(steps):
    generator = torch.Generator().manual_seed(0)
    x = parameter(*(0.01 * torch.randn(20, generator=generator)).tolist())
    # Small first steps are accepted at once, so that the count of acceptances matters.
    optimizer = ArmijoGD([x], patience=3, shrink=0.6, initial_step=1e-3)
    for _ in range(steps):
        optimizer.step(closure_of(optimizer, quartic, x))
    y = torch.nn.Parameter(x.detach().clone())
    other = ArmijoGD([y])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.outcome == optimizer.outcome
    for _ in range(10):
        optimizer.step(closure_of(optimizer, quartic, x))
        other.step(closure_of(other, quartic, y))
        assert torch.equal(x, y)
        assert other.outcome == optimizer.outcome
        assert other.total_evaluations == optimizer.total_evaluations


def test_state_dict_survives_a_weights_only_load(tmp_path):
    x = parameter(1.0, 2.0)
    optimizer = ArmijoGD([x])
    optimizer.step(closure_of(optimizer, quartic, x))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    ArmijoGD([x]).load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))


def test_state_dict_of_another_optimizer_is_refused():
    x = parameter(1.0)
    with pytest.raises(ValueError, match="not made by ArmijoGD"):
        ArmijoGD([x]).load_state_dict(torch.optim.SGD([x], lr=1.0).state_dict())


@pytest.mark.parametrize(
    "disturb",
    [
        lambda x: x.add_(0.5),
        lambda x: x.grad.zero_(),
        lambda x: setattr(x, "grad", None) or x.mul_(2.0),
    ],
    ids=["moved", "gradient zeroed", "cleared and moved"],
)
def test_a_change_between_steps_is_noticed(disturb):
    """The carried gradient belongs to the old point; the next step must evaluate again."""
    x = parameter(1.0, -2.0)
    optimizer = ArmijoGD([x])
    closure = closure_of(optimizer, quartic, x)
    optimizer.step(closure)
    with torch.no_grad():
        disturb(x)
    start = x.detach().clone()
    optimizer.step(closure)
    gradient = 4 * start**3 + 2 * (start - 1)
    torch.testing.assert_close(x.detach(), start - optimizer.outcome.step_size * gradient, rtol=1e-14, atol=1e-15)


def test_clearing_gradients_keeps_the_carried_one():
    x = parameter(1.0, -2.0)
    optimizer = ArmijoGD([x])
    closure = closure_of(optimizer, half_square(0.01), x)
    optimizer.step(closure)
    optimizer.zero_grad()
    optimizer.step(closure)
    assert optimizer.outcome.evaluations == 1


def test_closures_that_zero_in_place_or_not_at_all_give_the_same_iterates():
    paths = []
    for clear in (lambda o: o.zero_grad(), lambda o: o.zero_grad(set_to_none=False), lambda o: None):
        x = parameter(1.0, -2.0)
        optimizer = ArmijoGD([x])

        def closure(optimizer=optimizer, clear=clear, x=x):
            clear(optimizer)
            value = quartic(x)
            value.backward()
            return value

        for _ in range(10):
            optimizer.step(closure)
        paths.append(x.detach().clone())
    assert torch.equal(paths[0], paths[1])
    assert torch.equal(paths[0], paths[2])


def test_stochastic_objectives_need_the_switch():
    """With another target each step, the carried gradient is that of the wrong target."""
    targets = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def run(reuse):
        x = parameter(0.0)
        optimizer = ArmijoGD([x], reuse_gradient=reuse)
        for target in targets:
            start = x.item()
            optimizer.step(closure_of(optimizer, lambda x, t=target: (x - t).square().sum() / 2, x))
            direction = (x.item() - start) / optimizer.outcome.step_size if optimizer.outcome.accepted else 0.0
            yield direction, float(target) - start

    assert all(moved == pytest.approx(wanted, abs=1e-12) for moved, wanted in run(reuse=False))
    with pytest.warns(UserWarning, match=r"gave .* and then .* at the same parameters.*reuse_gradient=False"):
        assert any(abs(moved - wanted) > 0.1 for moved, wanted in list(run(reuse=True)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial_step": 0}, r"ArmijoGD\(initial_step=...\) must be positive and finite, got 0"),
        ({"initial_step": math.inf}, "initial_step"),
        ({"initial_step": math.nan}, "initial_step"),
        ({"shrink": 1.0}, r"ArmijoGD\(shrink=...\) must be between 0 and 1, got 1.0"),
        ({"grow": 0.9}, r"ArmijoGD\(grow=...\) must be at least 1"),
        ({"patience": 0}, "patience"),
        ({"patience": 1.5}, "patience"),
        ({"c1": 0.5}, r"ArmijoGD\(c1=...\) must be between 0 and 1/2"),
        ({"c1": "small"}, "c1"),
        ({"max_trials": 0}, "max_trials"),
        ({"max_trials": True}, "max_trials"),
        ({"noise": -1e-3}, "noise"),
        ({"shrink": None}, "shrink"),
    ],
)
def test_options_are_validated(options, message):
    with pytest.raises(ValueError, match=message):
        ArmijoGD([parameter(1.0)], **options)


def test_group_options_are_refused():
    with pytest.raises(ValueError, match="cannot set c1, shrink"):
        ArmijoGD([{"params": [parameter(1.0)], "c1": 0.1, "shrink": 0.3}])


def test_complex_parameters_are_refused():
    with pytest.raises(ValueError, match="needs real parameters"):
        ArmijoGD([torch.nn.Parameter(torch.ones(2, dtype=torch.complex128))])


def test_sparse_gradients_are_refused_and_nothing_moves():
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = ArmijoGD(embedding.parameters())
    before = embedding.weight.detach().clone()
    with pytest.raises(ValueError, match=r"dense gradients.*sparse=False"):
        optimizer.step(closure_of(optimizer, lambda: embedding(torch.tensor([1])).sum()))
    assert torch.equal(embedding.weight.detach(), before)


def test_missing_closure_is_refused():
    with pytest.raises(ValueError, match=r"needs a closure.*16-mixed"):
        ArmijoGD([parameter(1.0)]).step()


@pytest.mark.parametrize("result", [None, torch.ones(2), torch.tensor(1j)])
def test_closures_without_a_scalar_are_refused(result):
    with pytest.raises(ValueError, match="must return the objective as one real number"):
        ArmijoGD([parameter(1.0)]).step(lambda: result)


def test_accumulated_gradients_are_refused():
    x = parameter(1.0)
    half_square(1.0)(x).backward()
    optimizer = ArmijoGD([x])
    with pytest.raises(ValueError, match="accumulate_grad_batches=1"):
        optimizer.step(closure_of(optimizer, half_square(1.0), x))


def test_parameters_keep_their_storage():
    x = parameter(1.0, 2.0)
    pointer = x.data_ptr()
    optimizer = ArmijoGD([x])
    for _ in range(5):
        optimizer.step(closure_of(optimizer, quartic, x))
    assert x.data_ptr() == pointer


def test_a_plain_number_from_the_closure_will_do():
    x = parameter(1.0)
    optimizer = ArmijoGD([x])
    closure = closure_of(optimizer, half_square(1.0), x)
    assert optimizer.step(lambda: closure().item()) == 0.0


def test_deepcopy_continues_on_its_own():
    x = parameter(1.0, -2.0)
    optimizer = ArmijoGD([x])
    optimizer.step(closure_of(optimizer, quartic, x))
    twin = copy.deepcopy(optimizer)
    (y,) = twin.param_groups[0]["params"]
    optimizer.step(closure_of(optimizer, quartic, x))
    twin.step(closure_of(twin, quartic, y))
    assert torch.equal(x, y)
    assert twin.total_evaluations == optimizer.total_evaluations


def test_loading_a_state_in_place_rewinds():
    x = parameter(1.0, -2.0)
    optimizer = ArmijoGD([x])
    optimizer.step(closure_of(optimizer, quartic, x))
    saved, state = x.detach().clone(), copy.deepcopy(optimizer.state_dict())
    optimizer.step(closure_of(optimizer, quartic, x))
    ahead = x.detach().clone()
    with torch.no_grad():
        x.copy_(saved)
    optimizer.load_state_dict(state)
    optimizer.step(closure_of(optimizer, quartic, x))
    assert torch.equal(x.detach(), ahead)


def test_pickle_keeps_the_search_state():
    x = parameter(1.0, -2.0)
    optimizer = ArmijoGD([x])
    optimizer.step(closure_of(optimizer, quartic, x))
    again = pickle.loads(pickle.dumps(optimizer))
    assert again.outcome == optimizer.outcome
    assert again.state_dict()["search"] == optimizer.state_dict()["search"]


def test_an_exception_after_backward_leaves_no_gradient():
    x = parameter(1.0, 2.0)
    optimizer = ArmijoGD([x])
    closure = closure_of(optimizer, half_square(1.5), x)
    calls = 0

    def late():
        nonlocal calls
        calls += 1
        value = closure()
        if calls == 2:
            raise RuntimeError("after backward")
        return value

    with pytest.raises(RuntimeError, match="after backward"):
        optimizer.step(late)
    assert x.grad is None
    optimizer.step(late)
    assert optimizer.outcome.accepted


def test_a_group_added_between_steps_joins_the_search():
    a, b = parameter(1.0), parameter(2.0)
    optimizer = ArmijoGD([a])
    optimizer.step(closure_of(optimizer, half_square(1.5), a))
    optimizer.add_param_group({"params": [b]})
    optimizer.step(closure_of(optimizer, lambda a, b: half_square(1.0)(a) + half_square(1.0)(b), a, b))
    assert b.item() == 1.0  # A step of 1/2, where the first search had ended.


def test_a_first_step_below_the_spacing_of_numbers_grows():
    x = parameter(1.0)
    optimizer = ArmijoGD([x], initial_step=1e-30)
    closure = closure_of(optimizer, half_square(1.0), x)
    for _ in range(230):  # 1e-30 grows fourfold every second step: 50 times reach 1.
        optimizer.step(closure)
    assert abs(x.item()) < 1e-8
