"""What others do to parameters, gradients and groups between two steps of ArmijoGD, and how the next step takes it."""

import copy

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from nclightning.optim import ArmijoGD, SearchStatus
from nclightning.optim.evaluation import Evaluation
from nclightning.optim.unchanged import Fingerprint, remember
from tests.optim.own_line import CURVATURES, OwnLine, closure_of, objective, parameters


def gradient(x):
    return CURVATURES * x + x**3


def flat(params):
    return torch.cat([p.detach().flatten() for p in params]).clone()


def swapped_by_an_average(params):
    """As Lightning's WeightAveraging swaps, before a validation, weights for their mean, and trains on from there."""
    module = torch.nn.ParameterList(params)
    average = AveragedModel(copy.deepcopy(module))
    for p in average.module.parameters():
        p.data.mul_(0.5)
    for a, b in zip(average.module.parameters(), params, strict=True):
        kept = a.data.clone()
        a.data.copy_(b.data)
        b.data.copy_(kept)


def clipped(params):
    for p in params:
        p.grad.data.clamp_(-1e-3, 1e-3)


def exchanged(params):
    kept = params[0].data.clone()
    params[0].data.copy_(params[1].data)
    params[1].data.copy_(kept)


def with_new_memory(params):
    params[0].data = params[0].data * 2


def one_number(params):
    params[1].data[1] += 2.0**-30


DISTURBANCES = {
    "copied": lambda ps: ps[0].data.copy_(torch.tensor([1.0, 2.0])),
    "one number": one_number,
    "signs": lambda ps: [p.data.neg_() for p in ps],
    "powers of two": lambda ps: [p.data.mul_(2.0) for p in ps],
    "order": lambda ps: ps[0].data.copy_(ps[0].data.flip(0)),
    "exchanged": exchanged,
    "new memory": with_new_memory,
    "average": swapped_by_an_average,
    "vector": lambda ps: torch.nn.utils.vector_to_parameters(flat(ps) * 1.5, ps),
    "loaded": lambda ps: torch.nn.ParameterList(ps).load_state_dict({str(i): p * 1.5 for i, p in enumerate(ps)}),
    "gradients zeroed": lambda ps: [p.grad.data.zero_() for p in ps],
    "gradients clipped": clipped,
}


@pytest.mark.parametrize("make", [closure_of, lambda _, params: OwnLine(params)], ids=["closure", "line objective"])
@pytest.mark.parametrize("disturb", DISTURBANCES.values(), ids=DISTURBANCES)
def test_a_step_goes_along_the_gradient_where_it_begins(disturb, make):
    """Also where torch counts no write: the step of old gradients would be another one."""
    params = parameters()
    optimizer = ArmijoGD(params)
    closure = make(optimizer, params)
    optimizer.step(closure)
    before = optimizer.total_evaluations
    disturb(params)
    start = flat(params)
    optimizer.step(closure)
    outcome = optimizer.outcome
    assert outcome.accepted
    torch.testing.assert_close(flat(params), start - outcome.step_size * gradient(start), rtol=1e-14, atol=1e-15)
    assert outcome.previous_objective == pytest.approx(float(objective([start])), rel=1e-14)
    assert optimizer.total_evaluations > before + 1  # The start, and its trials.


@pytest.mark.parametrize("make", [closure_of, lambda _, params: OwnLine(params)], ids=["closure", "line objective"])
def test_weights_that_were_swapped_and_put_back_cost_nothing(make):
    params = parameters()
    optimizer = ArmijoGD(params, initial_step=0.1)
    closure = make(optimizer, params)
    optimizer.step(closure)
    kept = [p.data.clone() for p in params]
    for p, x in zip(params, kept, strict=True):
        p.data.zero_()
        p.data.copy_(x)
    optimizer.step(closure)
    assert optimizer.outcome.evaluations == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 20_001, 2**17 + 7])
@pytest.mark.parametrize("remember", [Fingerprint, remember], ids=["hashes", "copies where few"])
def test_single_changes_signs_and_order_are_told(dtype, count, remember):
    torch.manual_seed(0)
    p = torch.randn(count, dtype=torch.float64).to(dtype)
    original, print_ = p.clone(), remember([p])
    assert print_.matches([p])
    for index in {0, count // 2, count - 1}:
        p[index] = torch.nextafter(p[index], torch.tensor(9.0, dtype=dtype)) if dtype.itemsize > 2 else p[index] * 1.01
        assert not print_.matches([p])
        p.copy_(original)
        p[index] = -p[index]
        assert not print_.matches([p])
        p.copy_(original)
    for change in (lambda x: -x, lambda x: 2 * x, lambda x: x.flip(0), lambda x: torch.cat([x, x[:1] * 0])):
        assert print_.matches([change(p)]) == torch.equal(change(p), p)


def test_within_alone_version_counters_still_tell_and_after_it_the_iterate_does():
    params = parameters()
    optimizer = ArmijoGD(params, initial_step=0.1)
    closure = closure_of(optimizer, params)
    with optimizer.alone():
        optimizer.step(closure)
        optimizer.step(closure)
        assert optimizer.outcome.evaluations == 1
        with torch.no_grad():
            params[0].mul_(1.5)
        optimizer.step(closure)
        assert optimizer.outcome.evaluations == 2
    optimizer.step(closure)
    assert optimizer.outcome.evaluations == 1
    for disturbed in (True, False):
        if disturbed:
            params[0].data.mul_(1.5)
        with optimizer.alone():
            optimizer.step(closure)
        assert optimizer.outcome.evaluations == 1 + disturbed


def test_frozen_parameters_stay():
    params = parameters()
    optimizer = ArmijoGD(params)
    closure = closure_of(optimizer, params)
    optimizer.step(closure)
    params[0].requires_grad_(False)
    start = flat(params)
    optimizer.step(closure)
    expected = gradient(start) * torch.tensor([0.0, 0.0, 1.0, 1.0])
    torch.testing.assert_close(flat(params), start - optimizer.outcome.step_size * expected, rtol=1e-14, atol=1e-15)
    assert torch.equal(flat(params)[:2], start[:2])
    assert optimizer.outcome.previous_grad_norm == pytest.approx(float(expected.norm()), rel=1e-14)


def test_what_is_unfrozen_after_a_stationary_step_is_trained():
    a, b = (torch.nn.Parameter(torch.tensor([v], dtype=torch.float64)) for v in (0.0, 1.0))
    b.requires_grad_(False)
    optimizer = ArmijoGD([a, b])

    def closure():
        optimizer.zero_grad()
        value = (a.square() + b.square()).sum() / 2
        value.backward()
        return value

    optimizer.step(closure)
    assert optimizer.outcome.status is SearchStatus.STATIONARY
    b.requires_grad_(True)
    optimizer.step(closure)
    assert b.item() == 0.0


def test_a_line_objective_of_frozen_parameters_is_refused():
    params = parameters()
    optimizer, line = ArmijoGD(params), OwnLine(params)
    optimizer.step(line)
    params[0].requires_grad_(False)
    line.evaluate = lambda: Evaluation(1.0, 1e-16, [torch.ones(2, dtype=torch.float64)] * 2, 4.0)
    with pytest.raises(ValueError, match="OwnLine has a gradient for a parameter that was frozen later"):
        optimizer.step(line)


def test_all_frozen_is_refused():
    params = parameters()
    optimizer = ArmijoGD(params)
    for p in params:
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="all are frozen"):
        optimizer.step(closure_of(optimizer, params))


def line(curvature):
    x = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = ArmijoGD([x])

    def closure():
        optimizer.zero_grad()
        value = curvature * x.square().sum() / 2
        value.backward()
        return value

    return x, optimizer, closure


@pytest.mark.parametrize(
    ("name", "value", "step"),
    # F = x^2 a / 2 accepts t up to 2 (1 - c1) / a = 1.4 / 0.8 = 1.75; the step before was 1.
    [
        ("c1", 0.49, 1.0),  # Up to 1.275.
        ("initial_step", 8.0, 1.0),  # 8, 4, 2, 1.
        ("initial_step", 0.25, 0.25),
        ("lr", 1.5, 1.5),
        ("lr", torch.tensor(1.5, dtype=torch.float64), 1.5),
        ("lr", 6.0, 1.5),
    ],
)
def test_what_is_written_to_groups_holds_from_the_next_step(name, value, step):
    _, optimizer, closure = line(0.8)
    optimizer.step(closure)
    optimizer.param_groups[0][name] = value
    optimizer.step(closure)
    assert optimizer.outcome.step_size == step
    assert optimizer.param_groups[0]["lr"] == step


def test_a_written_c1_decides():
    _, optimizer, closure = line(1.35)  # Bound 1.037 with c1 = 0.3, 0.815 with 0.45.
    optimizer.step(closure)
    assert optimizer.outcome.step_size == 1.0
    optimizer.param_groups[0]["c1"] = 0.45
    optimizer.step(closure)
    assert optimizer.outcome.step_size == 0.5


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("c1", 0.7, r"ArmijoGD\(c1=...\) must be between 0 and 1/2, got 0.7"),
        ("max_trials", 0, "max_trials"),
        ("lr", 0.0, r"lr of ArmijoGD's parameter groups must be positive and finite, got 0.0"),
        ("lr", float("nan"), "got nan"),
        ("lr", "fast", "got 'fast'"),
    ],
)
def test_what_is_written_to_groups_is_checked(name, value, message):
    x, optimizer, closure = line(0.8)
    optimizer.step(closure)
    optimizer.param_groups[0][name] = value
    before = x.item()
    with pytest.raises(ValueError, match=message):
        optimizer.step(closure)
    assert x.item() == before


@pytest.mark.parametrize("name", ["c1", "lr"])
def test_groups_must_agree(name):
    params = parameters()
    optimizer = ArmijoGD([{"params": [p]} for p in params])
    optimizer.step(closure_of(optimizer, params))
    optimizer.param_groups[1][name] = 0.03
    with pytest.raises(ValueError, match=f"share one search, but {name} is .* in one and 0.03 in another"):
        optimizer.step(closure_of(optimizer, params))


def test_a_group_that_is_added_takes_the_options_as_they_are():
    params = parameters()
    optimizer = ArmijoGD(params[:1])
    optimizer.step(closure_of(optimizer, [params[0], torch.zeros(2, dtype=torch.float64)]))
    optimizer.param_groups[0]["c1"] = 0.2
    optimizer.add_param_group({"params": params[1:]})
    optimizer.step(closure_of(optimizer, params))
    assert [group["c1"] for group in optimizer.param_groups] == [0.2, 0.2]
    assert len({group["lr"] for group in optimizer.param_groups}) == 1


def test_what_is_written_just_before_a_checkpoint_is_in_it():
    _, optimizer, closure = line(0.8)
    optimizer.step(closure)
    optimizer.param_groups[0]["initial_step"] = 0.25
    _, other, other_closure = line(0.8)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.step(other_closure)
    assert other.outcome.step_size == 0.25


@pytest.mark.parametrize("options", [{"lr": 0.1}, {"weight_decay": 0.1, "momentum": 0.9}, {"maximize": True}])
def test_options_of_other_optimizers_in_a_group_are_refused(options):
    with pytest.raises(ValueError, match=f"cannot set {', '.join(sorted(options))}"):
        ArmijoGD([{"params": parameters(), **options}])


def test_a_parameter_twice_in_a_group_is_refused():
    params = parameters()
    with pytest.raises(ValueError, match="occurs twice"):
        ArmijoGD([*params, params[0]])


def test_parameters_without_values_are_refused():
    p = torch.nn.Parameter(torch.ones(2, device="meta"))
    optimizer = ArmijoGD([p])
    with pytest.raises(ValueError, match="meta device"):
        optimizer.step(p.sum)
