"""Gradients in closed form against autograd, rows at a time."""

import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from nclightning.models import UFM, closed_form
from nclightning.models.closed_form import UFMObjective
from nclightning.models.graph import AutogradObjective
from nclightning.objective import Objective
from nclightning.optim import ArmijoGD, ClosureObjective
from nclightning.problems import SquaredError
from tests.helpers import fakes_a_gpu
from tests.models.lines import LOSSES, TOLERANCE, any_lines, lines, point

SHAPES = [(2, 1, 1), (4, 3, 6), (5, 2, 3), (10, 10, 20)]


@pytest.fixture(params=[2**17, 7], ids=["at once", "a row or so at a time"])
def rows_at_a_time(request, monkeypatch):
    monkeypatch.setattr(closed_form, "ELEMENTS_PER_STEP", request.param)


def assert_same(ours, theirs, dtype):
    tolerance = TOLERANCE[dtype]
    assert ours.value == pytest.approx(theirs.value, rel=tolerance)
    assert ours.square == pytest.approx(theirs.square, rel=10 * tolerance)
    for a, b in zip(ours.gradients, theirs.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(1.0, float(b.abs().max())))


@pytest.mark.usefixtures("rows_at_a_time")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("loss", ["mse", "ce"])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 3.0])
def test_value_and_gradient_are_those_of_autograd(loss, shape, dtype, scale):
    ours, theirs, params = lines(loss, shape, dtype, scale=scale)
    before = [p.detach().clone() for p in params]
    measured = [float(each) for each in ours.measure()]
    here = ours.evaluate()
    assert_same(here, theirs.evaluate(), dtype)
    assert measured == [here.value, here.square]
    assert [float(each) for each in ours.measure()] == measured
    assert all(torch.equal(p, x) for p, x in zip(params, before, strict=True))


@pytest.mark.usefixtures("rows_at_a_time")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("loss", LOSSES)
@torch.no_grad()
def test_any_loss_goes_the_way_of_its_problem(loss, with_bias, dtype):
    """Value, gradient, slope and iterates; the slope is taken on its own, and with the value."""
    ours, theirs, params, twins = any_lines(loss, dtype, with_bias)
    here, there = ours.evaluate(), theirs.evaluate()
    for _ in range(4):
        assert_same(here, there, dtype)
        ours.begin(here)
        theirs.begin(there)
        for size in (2.0, 0.3):
            assert ours.trial(size) == pytest.approx(theirs.trial(size), rel=TOLERANCE[dtype])
            size_of_slope = TOLERANCE[dtype] * 10 * there.square
            assert ours.slope() == pytest.approx(theirs.slope(), rel=10 * TOLERANCE[dtype], abs=size_of_slope)
        here, there = ours.accept(), theirs.accept()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=10 * TOLERANCE[dtype])


@pytest.mark.parametrize("loss", LOSSES)
def test_a_whole_search_of_any_loss(loss):
    ours, theirs, params, twins = any_lines(loss, torch.float64)
    one, other = ArmijoGD(params), ArmijoGD(twins)
    for _ in range(20):
        one.step(ours)
        other.step(theirs)
    assert one.total_evaluations == other.total_evaluations
    for p, q in zip(params, twins, strict=True):
        # Descent takes starts one rounding apart as far as 4e-14 from each other.
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_gradient_without_numbers_is_not_moved_to():
    class Broken(SquaredError):
        def sum_and_residual_(self, logits, targets, labels):
            losses = super().sum_and_residual_(logits, targets, labels)
            logits.mul_(broken[0])
            return losses

    broken = [1.0]
    features, head, labels = point("mse", (4, 3, 6))
    line = UFMObjective(Objective(Broken(), 7e-3, 3e-3), features, head, labels, [features, *head], 12)
    line.begin(line.evaluate())
    broken[0] = math.nan
    line.trial(0.1)
    with pytest.raises(ValueError, match="the gradient of Broken is not finite where its value is"):
        line.accept()


@pytest.mark.usefixtures("rows_at_a_time")
@pytest.mark.parametrize("with_slope", [False, True])
@pytest.mark.parametrize("loss", ["mse", "ce"])
@torch.no_grad()
def test_a_search_goes_the_way_of_a_closure(loss, with_slope):
    ours, _, params = lines(loss, (4, 3, 6))
    _, theirs, twins = lines(loss, (4, 3, 6))
    start = ours.evaluate()
    gradients = [g.clone() for g in start.gradients]
    ours.begin(start)
    theirs.begin(theirs.evaluate())
    before = [p.detach().clone() for p in params]
    for size in (5.0, 0.3):
        assert ours.trial(size) == pytest.approx(theirs.trial(size), rel=1e-13)
        assert all(torch.equal(p, x) for p, x in zip(params, before, strict=True))
        if with_slope:
            assert ours.slope() == pytest.approx(theirs.slope(), rel=1e-12)
        assert not ours.stands_still()
    assert_same(ours.accept(), theirs.accept(), torch.float64)
    for p, x, g in zip(params, before, gradients, strict=True):
        assert torch.equal(p, torch.sub(x, g, alpha=0.3))
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-14)
    ours.begin(ours.evaluate())
    ours.trial(1e-30)
    assert ours.stands_still()


@pytest.mark.usefixtures("rows_at_a_time")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("asked", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("loss", ["mse", "ce"])
@torch.no_grad()
def test_what_a_slope_has_done_is_what_is_accepted(loss, asked, dtype):
    """Taken in a pass of its own or with the value, asked for at the last trial or at an earlier one."""
    ours, _, params = lines(loss, (5, 3, 6), dtype)
    _, theirs, twins = lines(loss, (5, 3, 6), dtype)
    here, there = ours.evaluate(), theirs.evaluate()
    for _ in range(4):
        ours.begin(here)
        theirs.begin(there)
        for size, with_slope in zip((5.0, 0.3), asked, strict=True):
            ours.trial(size)
            theirs.trial(size)
            if with_slope:
                assert ours.slope() == pytest.approx(theirs.slope(), rel=10 * TOLERANCE[dtype])
        here, there = ours.accept(), theirs.accept()
        assert_same(here, there, dtype)
        kept = [g.clone() for g in here.gradients]
        again, _, others = lines(loss, (5, 3, 6), dtype)
        for p, q in zip(others, params, strict=True):
            p.copy_(q)
        fresh = again.evaluate()  # As after a resume.
        assert (fresh.value, fresh.square) == (here.value, here.square)
        assert all(torch.equal(g, h) for g, h in zip(fresh.gradients, kept, strict=True))
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=10 * TOLERANCE[dtype])


@pytest.mark.usefixtures("rows_at_a_time")
@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_searches_that_slopes_decide(loss):
    ours, _, params = lines(loss, (5, 3, 6))
    _, theirs, twins = lines(loss, (5, 3, 6))
    optimizers = ArmijoGD(params, noise=0.99), ArmijoGD(twins, noise=0.99)
    for _ in range(40):
        for optimizer, line in zip(optimizers, (ours, theirs), strict=True):
            optimizer.step(line)
    one, other = optimizers
    assert one.outcome.status == "accepted_by_slope"
    assert one.total_evaluations == other.total_evaluations > 41  # Some were rejected.
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-13)


@pytest.mark.parametrize("scale", [1e-25, 1e-16, 1e-12])
@torch.no_grad()
def test_slopes_of_gradients_whose_squares_underflow(scale):
    """Float32 features on their way to zero: products of 1e-50 have no number there."""
    slopes = []
    for dtype in (torch.float32, torch.float64):
        line, _, _ = lines("ce", (4, 3, 6), dtype, scale=scale)
        line.begin(line.evaluate())
        line.trial(1.0)
        slopes.append(line.slope())
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-5)
    assert slopes[0] > 0


@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_a_line_continues_from_the_gradient_of_another(loss):
    """As after a Lightning step, or when hooks were set meanwhile: the gradient is kept, the line made anew."""
    one, _, params = lines(loss, (4, 3, 6))
    _, autograd, twins = lines(loss, (4, 3, 6))
    optimizer, other = ArmijoGD(params), ArmijoGD(twins)
    for step in range(12):
        fresh = UFMObjective(one._objective, params[-1], params[:-1], one._labels, params, 12)
        optimizer.step([one, fresh, ClosureObjective(closure_of(one, params), params)][step % 3])
        other.step(autograd)
    assert optimizer.total_evaluations == other.total_evaluations
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-13)


def closure_of(line, params):
    def closure():
        for p in params:
            p.grad = None
        weight, *bias, features = params
        value = line._objective(weight, features, line._labels, *bias)
        value.backward()
        return value.detach()

    return closure


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@torch.no_grad()
def test_values_whose_gradient_may_overflow_are_not_finite(dtype):
    line, _, _ = lines("mse", (4, 3, 6), dtype)
    line.begin(line.evaluate())
    assert math.isinf(line.trial(math.sqrt(torch.finfo(dtype).max)))
    assert math.isfinite(line.trial(1.0))


def test_a_label_out_of_range_raises():
    features, head, labels = point("mse", (4, 3, 6))
    line = UFMObjective(Objective("mse", 1e-2, 1e-2), features, head, labels + 1, [features, *head], 12)
    with pytest.raises(RuntimeError, match="index 4 is out of bounds"):
        line.evaluate()


def ufm(**options):
    torch.manual_seed(0)
    return UFM(4, 3, 6, "mse", lambda_=5e-3, **options)


def batch():
    return torch.arange(12), torch.arange(12) // 3


def test_the_model_takes_the_closed_form_and_does_not_copy_its_features():
    model = ufm()
    assert isinstance(model.make_closure(batch(), list(model.parameters())), UFMObjective)
    index, labels = batch()
    model.make_closure((index, labels), list(model.parameters()))
    assert model.features_of(index) is model.features
    assert model.features_of(index.clone()) is not model.features


def hooked():
    model = ufm()
    model.head.register_forward_hook(lambda *_: None)
    return model, batch()


def watched_gradient():
    model = ufm()
    model.features.register_hook(lambda gradient: gradient)
    return model, batch()


def patched():
    model = ufm()
    forward = model.head.forward
    model.head.forward = lambda x: 2 * forward(x)
    return model, batch()


def frozen_head():
    model = ufm()
    model.head.weight.requires_grad_(False)
    return model, batch()


def parametrized():
    model = ufm()
    nn.utils.parametrizations.weight_norm(model.head)
    return model, batch()


def own_objective():
    class Own(UFM):
        def evaluate_objective(self, batch):
            return 2 * super().evaluate_objective(batch)

    return Own(4, 3, 6, "mse", lambda_=5e-3), batch()


def other_order():
    order = torch.randperm(12)
    return ufm(), tuple(t[order] for t in batch())


@pytest.mark.parametrize(
    "make", [hooked, watched_gradient, patched, frozen_head, parametrized, own_objective, other_order]
)
def test_whatever_was_changed_goes_by_autograd(make):
    model, data = make()
    params = [p for p in model.parameters() if p.requires_grad]
    line = model.make_closure(data, params)
    assert isinstance(line, AutogradObjective)
    assert line.evaluate().value == float(model.evaluate_objective(data).detach())


def test_a_mix_of_devices_raises():
    with FakeTensorMode():
        features, weight = (nn.Parameter(torch.empty(12, 6, device=device)) for device in ("cuda", "cpu"))
        labels = torch.empty(12, dtype=torch.int64, device="cuda")
        with pytest.raises(ValueError, match="must be on one device, got cpu and cuda:0"):
            UFMObjective(Objective("ce", 1e-2, 1e-2), features, [weight], labels, [features, weight], 12)


@pytest.mark.skipif(not fakes_a_gpu(), reason="this torch looks for a real GPU")
@pytest.mark.parametrize("loss", [loss for loss in LOSSES if "hinge" not in loss])  # Autograd would look for a GPU.
def test_on_a_device_only_decisions_come_to_the_host(loss, monkeypatch):
    """Fake tensors raise on a transfer and on a mix of devices; numbers come by one function."""
    devices = []

    def numbers(scalars):
        devices.extend(scalar.device.type for scalar in scalars)
        return [1.0 for _ in scalars]

    objective = LOSSES[loss]()
    monkeypatch.setattr(type(objective.function), "check_targets", lambda *_: None)  # It looks at numbers, once.
    with FakeTensorMode(allow_non_fake_inputs=True):  # The targets are real ones.
        features, weight, bias = (nn.Parameter(torch.empty(s, device="cuda")) for s in ((12, 6), (4, 6), (4,)))
        labels = torch.empty(12, dtype=torch.int64, device="cuda")
        for head in ([weight], [weight, bias]):
            line = UFMObjective(objective, features, head, labels, [features, *head], 12)
            with torch.no_grad():
                value, square = line.measure()
                assert {value.device.type, square.device.type} == {"cuda"}
                with pytest.raises(DataDependentOutputException):
                    line.evaluate()
                with monkeypatch.context() as patch:
                    patch.setattr(closed_form, "_numbers", numbers)
                    line.begin(line.evaluate())
                    for with_slope in (False, True, True):  # The last one takes the slope with the value.
                        line.trial(0.1)
                        assert not with_slope or line.slope() == len(head) + 1.0  # A number of each part.
                        line.accept()
    assert set(devices) == {"cuda"}


def test_readings_see_what_hooks_make_of_the_features():
    model = ufm()
    index, labels = batch()
    model.make_closure((index, labels), list(model.parameters()))
    model.backbone.register_forward_hook(lambda module, inputs, output: 2 * output)
    value, _ = model.value_and_grad_norm((index, labels))
    assert float(value) == float(model.evaluate_objective((index, labels)).detach())
    assert torch.equal(model.features_of(index), 2 * model.features)


def test_replaced_memory_is_followed():
    model = ufm()
    data, params = batch(), list(model.parameters())
    line, optimizer = model.make_closure(data, params), ArmijoGD(list(model.parameters()))
    optimizer.step(line)
    nn.utils.vector_to_parameters(torch.linspace(-1, 1, sum(p.numel() for p in params), dtype=torch.float64), params)
    start = model.evaluate_objective(data).item()
    optimizer.zero_grad()
    optimizer.step(line)
    assert optimizer.outcome.previous_objective == pytest.approx(start, rel=1e-14)
    assert model.evaluate_objective(data).item() == pytest.approx(optimizer.outcome.objective, rel=1e-14)
    assert optimizer.outcome.objective < start


@torch.no_grad()
def test_memory_replaced_after_a_reading_is_followed():
    ours, theirs, params = lines("mse", (4, 3, 6))
    ours.measure()
    for p in params:
        p.data = p.data + 1
    start = theirs.evaluate()
    for line in (ours, theirs):
        line.begin(start)
    assert ours.trial(0.1) == pytest.approx(theirs.trial(0.1), rel=1e-13)


def test_a_point_without_a_value_leaves_nothing_behind():
    model = ufm()
    line = model.make_closure(batch(), list(model.parameters()))
    kept = model.features.detach().clone()
    with torch.no_grad():
        model.features[0, 0] = math.inf
    assert not math.isfinite(float(line()))
    with torch.no_grad():
        model.features.copy_(kept)
    assert float(line()) == pytest.approx(model.evaluate_objective(batch()).item(), rel=1e-14)


def test_indices_that_were_written_to_are_looked_at_again():
    model = ufm()
    index, labels = batch()
    params = list(model.parameters())
    model.make_closure((index, labels), params)
    index.copy_(index.flip(0))
    line = model.make_closure((index, labels), params)
    assert line.evaluate().value == model.evaluate_objective((index, labels)).item()


def test_a_part_of_the_samples_on_one_process_is_stepped_as_it_is():
    model = ufm()
    part = tuple(t[:6] for t in batch())
    assert float(model.make_closure(part, list(model.parameters()))()) == model.evaluate_objective(part).item()


def test_parametrised_features_can_be_saved():
    model = ufm()
    nn.utils.parametrize.register_parametrization(model.backbone, "features", nn.Identity())
    assert "backbone.parametrizations.features.original" in model.state_dict()
    nn.utils.parametrize.register_parametrization(model.head, "weight", nn.Identity())
    nn.utils.parametrize.remove_parametrizations(model.head, "weight")  # Now behind the bias.
    nn.utils.parametrize.remove_parametrizations(model.backbone, "features")
    line = model.make_closure(batch(), list(model.parameters()))
    assert line.evaluate().value == pytest.approx(model.evaluate_objective(batch()).item(), rel=1e-14)


def test_a_start_beyond_the_safe_range_is_searched_like_any_other():
    torch.manual_seed(0)
    model = UFM(3, 4, 5, "mse", lambda_=5e-3, init_scale=1e6, dtype="float32")
    optimizer = ArmijoGD(model.parameters())
    index = torch.arange(12)
    optimizer.step(model.make_closure((index, index // 4), list(model.parameters())))
    assert optimizer.outcome.accepted
