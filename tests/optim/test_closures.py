"""Closures as strangers write them: what ArmijoGD makes of them, or says."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from nclightning import optim
from nclightning.optim import ArmijoGD, SearchStatus
from tests.optim.closures import FALLING


def bowl(x):
    return x.square().sum() / 2


def start(*values, dtype=torch.float64):
    return nn.Parameter(torch.tensor(values or (1.0, -2.0), dtype=dtype))


@pytest.mark.parametrize("forgets", ["backward", "other parameters", "cleared after"])
def test_a_closure_that_leaves_no_gradient_is_refused(forgets):
    """It would be a stationary point, of which the parameters never leave."""
    x, other = start(), start()
    optimizer = ArmijoGD([x])

    def closure():
        optimizer.zero_grad()
        value = bowl(other if forgets == "other parameters" else x)
        if forgets != "backward":
            value.backward()
        if forgets == "cleared after":
            optimizer.zero_grad()
        return value

    with pytest.raises(ValueError, match=r"left no gradient at any parameter: it has to call backward\(\)"):
        optimizer.step(closure)
    assert x.tolist() == [1.0, -2.0]


def test_a_gradient_that_is_zero_is_none_that_is_missing():
    x = start(0.0)
    optimizer = ArmijoGD([x])

    def closure():
        optimizer.zero_grad()
        value = bowl(x)
        value.backward()
        return value

    optimizer.step(closure)
    assert optimizer.outcome.status is SearchStatus.STATIONARY


@pytest.mark.parametrize(
    ("result", "seen"),
    [
        (None, r"nothing \(None\)"),
        (torch.ones(2), r"a tensor of shape \(2,\)"),
        (torch.tensor(1j), r"a tensor of shape \(\) and dtype torch\.complex64"),
        (torch.tensor(3), r"a tensor of shape \(\) and dtype torch\.int64"),
        ((torch.tensor(1.0), "logits"), "an object of type tuple"),
        ({"loss": torch.tensor(1.0)}, "an object of type dict"),
    ],
)
def test_what_is_no_value_is_refused_and_named(result, seen):
    with pytest.raises(ValueError, match=rf"must return the objective as one real number, got {seen}"):
        ArmijoGD([start()]).step(lambda: result)


@pytest.mark.parametrize(
    "form", [torch.Tensor.item, torch.Tensor.detach, lambda v: v.reshape(1), lambda v: v.detach().numpy()[()]]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_in_any_form_reach_the_round_off_of_the_parameters(form, dtype):
    """A plain number does not tell its precision: taken for float64, float32 descent would stop early."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(30, 10, dtype=torch.float64, generator=generator).to(dtype)
    x = nn.Parameter(torch.ones(10, dtype=dtype))
    optimizer = ArmijoGD([x])
    reference = torch.randn(30, dtype=torch.float64, generator=generator).to(dtype)

    def closure():
        optimizer.zero_grad()
        value = (matrix @ x - reference).square().mean() / 2
        value.backward()
        return form(value)

    smallest = 1.0
    for _ in range(300):
        optimizer.step(closure)
        smallest = min(smallest, optimizer.outcome.grad_norm)
    assert smallest < 10 * torch.finfo(dtype).eps


@pytest.mark.parametrize("loss_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_descends_as_far_as_float32_nearly(dtype, loss_dtype):
    """A loss in float32 of parameters in bfloat16 has the round-off of these: 0.272 at a stall after 85 steps, else."""

    def descend(dtype):
        torch.manual_seed(0)
        inputs, labels = torch.randn(100, 10).to(dtype), torch.arange(100) % 4
        model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 4)).to(dtype)
        optimizer = ArmijoGD(model.parameters())

        def closure():
            optimizer.zero_grad()
            logits = model(inputs)
            logits = logits if loss_dtype is None else logits.to(loss_dtype)
            penalty = sum(p.to(logits.dtype).square().sum() for p in model.parameters())
            value = cross_entropy(logits, labels) + 1e-3 * penalty
            value.backward()
            return value

        for _ in range(300):
            optimizer.step(closure)
        return optimizer.outcome.objective

    assert descend(dtype) < 1.05 * descend(torch.float32)


def test_a_step_of_half_precision_is_the_step_that_is_said():
    """Kernels of bfloat16 round the step to eight bits: 0.7 to 0.69921875, seen where x is 0."""
    x = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = ArmijoGD([x], initial_step=0.7009)

    def closure():
        optimizer.zero_grad()
        value = (x.float() - 256.0).square().sum() / 2
        value.backward()
        return value

    optimizer.step(closure)
    assert optimizer.outcome.step_size == 0.7009
    assert x.item() == float(torch.tensor(0.7009 * 256).bfloat16())


def test_gradients_that_come_and_go():
    """F = x^2 / 2 + max(y, 0)^2 / 2, where a branch leaves y out: y has no gradient once it is below zero."""
    x, y = start(2.0), start(1.0)
    optimizer = ArmijoGD([x, y], initial_step=1.2)

    def closure():
        optimizer.zero_grad()
        value = bowl(x) + (bowl(y) if y.item() > 0 else 0.0)
        value.backward()
        return value

    optimizer.step(closure)
    assert (x.item(), y.item()) == pytest.approx((-0.4, -0.2))
    assert y.grad is None
    assert optimizer.outcome.grad_norm == pytest.approx(0.4)
    optimizer.step(closure)
    assert (x.item(), y.item()) == pytest.approx((0.08, -0.2))


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_gradients_may_be_summed_within_a_closure(micro_batches):
    x = start()
    optimizer = ArmijoGD([x], initial_step=0.25)

    def closure():
        optimizer.zero_grad()
        values = [bowl(x) / micro_batches for _ in range(micro_batches)]
        for value in values:
            value.backward()
        return sum(values).detach()

    optimizer.step(closure)
    torch.testing.assert_close(x.detach(), torch.tensor([0.75, -1.5], dtype=x.dtype), rtol=1e-15, atol=0)


def test_a_closure_that_changes_parameters_is_refused_and_they_are_put_back():
    x = start()
    optimizer = ArmijoGD([x])
    calls = []

    def closure():
        optimizer.zero_grad()
        calls.append(1)
        if len(calls) > 1:
            with torch.no_grad():
                x.clamp_(0, 1)
        value = bowl(x)
        value.backward()
        return value

    with pytest.raises(ValueError, match=r"the closure of ArmijoGD\.step changed a parameter"):
        optimizer.step(closure)
    assert x.tolist() == [1.0, -2.0]
    assert x.grad is None


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_the_first_call_leaves_nothing_to_trip_over(error):
    x = start()
    optimizer = ArmijoGD([x])
    failing = [True]

    def closure():
        optimizer.zero_grad()
        value = bowl(x)
        value.backward()
        if failing:
            raise failing.pop() and error
        return value

    with pytest.raises(error):
        optimizer.step(closure)
    optimizer.step(closure)
    assert x.tolist() == [0.0, 0.0]


def test_two_values_at_one_point_are_reported():
    """Dropout that leaves no decrease: the search fails, and the next call shows the cause for nothing."""
    x = start()
    optimizer = ArmijoGD([x], max_trials=3)
    noise = iter([0.0, 9.0, 9.0, 9.0, 5.0, 9.0, 9.0, 9.0])

    def closure():
        optimizer.zero_grad()
        value = bowl(x) + next(noise)
        value.backward()
        return value

    optimizer.step(closure)
    assert optimizer.outcome.status is SearchStatus.EXHAUSTED
    with pytest.warns(UserWarning, match=r"gave 2\.5 and then 7\.5 at the same parameters.*deterministic"):
        optimizer.step(closure)


def test_after_a_failed_search_another_objective_is_searched():
    """As when a penalty is lowered once descent has ended."""
    x = start(1.0)
    optimizer = ArmijoGD([x])
    penalty = [1.0]

    def closure():
        optimizer.zero_grad()
        value = ((x - 1).square() + penalty[0] * x.square()).sum() / 2
        value.backward()
        return value

    for _ in range(100):
        optimizer.step(closure)
    assert x.item() == pytest.approx(0.5)
    assert not optimizer.outcome.accepted
    penalty[0] = 0.0
    with pytest.warns(UserWarning, match="at the same parameters"):
        optimizer.step(closure)
    for _ in range(20):
        optimizer.step(closure)
    assert x.item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("first", ["closure", "other options"])
def test_a_failed_search_is_taken_up_when_its_options_change(first):
    x = start(1.0)
    optimizer = ArmijoGD([x], initial_step=1e6, max_trials=2)

    def closure():
        optimizer.zero_grad()
        value = bowl(x)
        value.backward()
        return value

    optimizer.step(closure)
    assert optimizer.outcome.status is SearchStatus.EXHAUSTED
    if first == "closure":
        optimizer.step(closure)
        assert (optimizer.outcome.status, optimizer.outcome.evaluations) == (SearchStatus.EXHAUSTED, 1)
    optimizer.param_groups[0]["max_trials"] = 60
    optimizer.step(closure)
    assert optimizer.outcome.accepted


def test_hooks_of_torch_fire_around_each_step():
    x = start()
    optimizer = ArmijoGD([x])
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    def closure():
        optimizer.zero_grad()
        seen.append("closure")
        value = bowl(x)
        value.backward()
        return value

    optimizer.step(closure)
    assert seen == ["before", "closure", "closure", "after"]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"])
def test_a_copy_of_an_optimizer_with_a_scheduler_steps_its_own_parameters(duplicate):
    """A scheduler replaces ``step`` in the instance by one that is bound to the original."""
    x = start(1.0)
    optimizer = ArmijoGD([x], initial_step=0.5)
    torch.optim.lr_scheduler.StepLR(optimizer, 10)
    optimizer.register_step_post_hook(lambda *_: None)  # No pickle of it.
    twin = duplicate(optimizer)
    (y,) = twin.param_groups[0]["params"]

    def closure():
        twin.zero_grad()
        value = bowl(y)
        value.backward()
        return value

    twin.step(closure)
    assert (x.item(), y.item()) == (1.0, 0.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("function", "status"), FALLING.values(), ids=FALLING)
def test_objectives_that_fall_for_ever_end_in_words_that_say_so(function, status, dtype):
    x = start(1.0, dtype=dtype)
    optimizer = ArmijoGD([x])

    def closure():
        optimizer.zero_grad()
        value = function(x)
        value.backward()
        return value

    for _ in range(1100):
        optimizer.step(closure)
        if not optimizer.outcome.accepted:
            break
    assert optimizer.outcome.status in (
        [SearchStatus.UNBOUNDED, SearchStatus.UNATTAINED] if status is None else [status]
    )
    assert "penalty" in optimizer.outcome.status.sentence
    assert x.isfinite().all()
    calls = []
    optimizer.step(lambda: calls.append(1) or closure())  # It stays, and evaluates nonetheless.
    assert calls == [1]
    assert not optimizer.outcome.accepted


@pytest.mark.parametrize("power", [2, 4, 6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_degenerate_minima_are_stationary(power, dtype):
    """Steps grow there as well, with 1 / x^(power - 2)."""
    x = start(0.7, dtype=dtype)
    optimizer = ArmijoGD([x])

    def closure():
        optimizer.zero_grad()
        value = (x**power).sum()
        value.backward()
        return value

    for _ in range(3000):
        optimizer.step(closure)
        if not optimizer.outcome.accepted:
            break
    assert optimizer.outcome.status is SearchStatus.STATIONARY


def test_the_earlier_name_of_closure_objectives_warns():
    with pytest.warns(DeprecationWarning, match="ClosureLine is now called ClosureObjective"):
        assert optim.ClosureLine is optim.ClosureObjective
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = optim.Nothing
