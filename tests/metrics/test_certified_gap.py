"""Gap, distance and certified gap of any loss, targets and counts, from streamed sums."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from nclightning.metrics import Optimality
from nclightning.problems import (
    BinaryCrossEntropy,
    CrossEntropy,
    Problem,
    SquaredError,
    label_smoothing,
    mixup,
    soft_labels,
    unbalanced_ce,
)
from nclightning.problems import problem as problem_module
from nclightning.theory import UFMProblem
from tests.problems.cases import CASES, SOFT, one_against_rest

# Rounding of F and of the bound, which sums of some tens of samples have in common.
ROUNDING = 1e-14
TO_GO = ["certified_gap", "certified_bound"]


def draw(generator, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def random_point(problem, generator, scale=1.0):
    K, d, N = problem.num_classes, problem.feature_dim, problem.num_samples
    bias = scale * draw(generator, K) if problem.has_bias else None
    optimum = scale * draw(generator, K, d), scale * draw(generator, N, d)
    return *optimum, problem.labels(), bias


def nudged(problem, size, generator):
    other = random_point(problem, generator, size)
    optimum = problem.random_optimum(generator)
    return tuple(
        one if one is None or one.dtype == torch.int64 else one + two for one, two in zip(optimum, other, strict=True)
    )


def read(problem, point, size=7, order=None, **options):
    """Stream a point in batches."""
    weight, features, labels, bias = point
    metric = Optimality(problem, weight if bias is None else (weight, bias), **options)
    order = torch.arange(len(labels)) if order is None else order
    for rows in order.split(size):
        metric.update(features[rows], labels[rows])
        if len(rows) < size:
            metric._fold()
    return {name: float(value) for name, value in metric.compute().items()}


@pytest.fixture(params=CASES)
def problem(request):
    return CASES[request.param]()


@pytest.mark.parametrize("step", [None, 1e-3, 1e-8])
@pytest.mark.filterwarnings("ignore:gap or distance is nan")
def test_equals_the_answers_on_all_samples(problem, step, generator):
    """Exact values as of the problem, or none where it has none; the certified gap is F minus its bound."""
    known = problem.feature_dim >= problem.convex_optimum.rank
    if step is not None and not known:
        pytest.skip("there is no optimum to start from")
    point = random_point(problem, generator) if step is None else nudged(problem, step, generator)
    value, bound = float(problem.value(*point)), problem.certified_lower_bound(*point)
    order = torch.randperm(problem.num_samples, generator=generator)
    everything = [read(problem, point, size, order) for size in (1, 5, problem.num_samples)]
    for values in everything:
        assert values["certified_bound"] == pytest.approx(bound, rel=ROUNDING, abs=ROUNDING * value)
        assert values["certified_gap"] == pytest.approx(value - bound, abs=ROUNDING * value)
        assert math.isnan(values["gap"]) == (not known)
    if known:
        # Points are known to eps times their norm.
        slack = 1e-12 + 1e-14 / (step or 1)
        for values in everything:
            assert values["distance"] == pytest.approx(float(problem.distance(*point)), rel=slack)
            assert values["gap"] == pytest.approx(float(problem.gap(*point)), rel=10 * slack)
            assert values["certified_gap"] >= values["gap"] - ROUNDING * value
            assert values["gap"] >= 0


@pytest.mark.filterwarnings("ignore:gap or distance is nan")
def test_no_point_is_below_a_bound_of_another_point(problem, generator):
    """Weak duality, whatever is known of the optimum: also along a descent, for fewer features than the rank."""
    x = [each.requires_grad_() if each is not None else None for each in _free(random_point(problem, generator, 0.5))]
    optimizer = torch.optim.LBFGS([each for each in x if each is not None], max_iter=4, line_search_fn="strong_wolfe")
    bounds, values = [], []
    for _ in range(12):
        point = x[0], x[1], problem.labels(), x[2]

        def closure(point=point):
            optimizer.zero_grad()
            value = problem.value(*point)
            value.backward()
            return value

        detached = tuple(None if each is None else each.detach() for each in point)
        bounds.append(read(problem, detached, exact=False)["certified_bound"])
        values.append(float(problem.value(*detached)))
        optimizer.step(closure)
    assert max(bounds) <= min(values) * (1 + 1e-13)
    if problem.feature_dim >= problem.convex_optimum.rank:
        assert max(bounds) >= min(values) - 0.05 * max(values)


def _free(point):
    weight, features, _, bias = point
    return weight, features, bias


def test_the_certified_gap_vanishes_like_the_distance(generator):
    """So that a difference of objectives tells it down to the rounding of the distance."""
    problem = unbalanced_ce([12, 5, 3, 1], 5, 2e-2, 3e-3, "free")
    for size in (1e-2, 1e-5, 1e-8, 1e-11):
        values = read(problem, nudged(problem, size, generator))
        assert 1e-3 < values["certified_gap"] / values["distance"] < 1


COUNTS = [9, 4, 1, 6]
UNBALANCED = {
    "ce": lambda bias: ("ce", Problem(CrossEntropy(), None, COUNTS, 5, 2e-2, 3e-3, bias)),
    "mse": lambda bias: ("mse", Problem(SquaredError(), None, COUNTS, 5, 2e-2, 3e-3, bias)),
    "bce": lambda bias: ("bce", Problem(BinaryCrossEntropy(), None, COUNTS, 5, 2e-2, 3e-3, bias)),
    "weighted": lambda bias: (
        loss := CrossEntropy(class_weights=[0.3, 1.0, 2.0, 0.5]),
        Problem(loss, None, COUNTS, 5, 2e-2, 3e-3, bias),
    ),
}


@pytest.mark.parametrize("bias", ["none", "free", 0.05])
@pytest.mark.parametrize("kind", UNBALANCED)
def test_the_problem_of_the_samples_seen(kind, bias, generator):
    """From the loss and the penalties alone."""
    loss, problem = UNBALANCED[kind](bias)
    penalties = {"lambda_w": 2e-2, "lambda_h": 3e-3, "lambda_b": bias if isinstance(bias, float) else 0.0}
    point = random_point(problem, generator)
    assert read(loss, point, **penalties) == pytest.approx(read(problem, point), rel=1e-13)


@pytest.mark.parametrize("bias", ["none", "free", 0.05])
@pytest.mark.parametrize("kind", UNBALANCED)
def test_fitted_penalties_are_the_true_ones_at_an_optimum(kind, bias, generator):
    loss, problem = UNBALANCED[kind](bias)
    lambda_b = bias if isinstance(bias, float) else 0.0
    values = read(loss, problem.random_optimum(generator), lambda_b=lambda_b)
    assert values["lambda_w"] == pytest.approx(problem.lambda_w, rel=1e-12)
    assert values["lambda_h"] == pytest.approx(problem.lambda_h, rel=1e-12)
    assert values["relative_distance"] < 1e-12
    assert abs(values["certified_gap"]) < 1e-12 * problem.optimal_value


@pytest.mark.parametrize("kind", UNBALANCED)
def test_at_fitted_penalties_no_change_of_scale_lowers_the_objective(kind, generator):
    loss, problem = UNBALANCED[kind]("free")
    weight, features, labels, bias = nudged(problem, 0.05, generator)
    values = read(loss, (weight, features, labels, bias))
    fitted = Problem(problem.loss, None, COUNTS, 5, values["lambda_w"], values["lambda_h"], "free")
    scales = torch.ones(2, dtype=torch.float64, requires_grad=True)
    objective = fitted.value(scales[0] * weight, scales[1] * features, labels, bias)
    (slopes,) = torch.autograd.grad(objective, scales)
    assert float(slopes.abs().max()) < 1e-14


def test_penalties_that_do_not_exist(generator):
    """The loss falls with smaller scales, too: logits are wrong more than right."""
    problem = unbalanced_ce(COUNTS, 5, 2e-2, 3e-3)
    weight, features, labels, _ = problem.random_optimum(generator)
    values = read("ce", (-weight, features, labels, None))
    assert values.keys() == {"gap", "distance", "relative_distance", *TO_GO, "lambda_w", "lambda_h"}
    assert all(map(math.isnan, values.values()))


def test_one_output_and_yes_or_no(generator):
    """A head with one output under binary cross-entropy, labels 0 and 1, against torch's loss."""
    weight, features, labels = draw(generator, 1, 3), draw(generator, 20, 3), torch.arange(20) % 3 % 2
    bias = draw(generator, 1)
    values = read("bce", (weight, features, labels, bias), lambda_w=0.01, lambda_h=0.002)
    loss = binary_cross_entropy_with_logits(features @ weight.T + bias, labels.double().unsqueeze(1))
    objective = loss + 0.01 / 2 * weight.square().sum() + 0.002 / 2 * features.square().sum()
    assert values["certified_gap"] + values["certified_bound"] == pytest.approx(float(objective), rel=1e-13)
    # The bound may be F* itself, but for the rounding of F.
    assert 0 < values["gap"] <= values["certified_gap"] * (1 + 1e-13)
    with pytest.raises(ValueError, match=r"targets must be given for a head with one output"):
        read(BinaryCrossEntropy(), (weight, features, labels, bias))
    with pytest.raises(ValueError, match="head must have at least two outputs for cross-entropy"):
        read("ce", (weight, features, labels, bias))


def test_smoothed_labels_by_their_table(generator):
    problem = label_smoothing(COUNTS, 0.1, 5, 2e-2, 3e-3, "free")
    point = random_point(problem, generator)
    values = read("ce", point, lambda_w=2e-2, lambda_h=3e-3, targets=problem.targets.tolist())
    assert values == pytest.approx(read(problem, point), rel=1e-13)
    weight, features, labels, bias = point
    loss = cross_entropy(features @ weight.T + bias, labels, label_smoothing=0.1)
    objective = loss + 1e-2 * weight.square().sum() + 1.5e-3 * features.square().sum()
    assert values["certified_gap"] + values["certified_bound"] == pytest.approx(float(objective), rel=1e-13)


def test_an_absent_class_and_a_free_bias(generator):
    """Its bias falls for ever: there is no optimum, which is said once, and a bound all the same."""
    weight, features, bias = draw(generator, 4, 5), draw(generator, 12, 5), draw(generator, 4)
    metric = Optimality("ce", (weight, bias), 1e-2, 1e-2)
    metric.update(features, torch.arange(12) % 3)
    with pytest.warns(UserWarning, match=r"certified_gap is valid: .*class 3 has no samples"):
        values = metric.compute()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert float(metric.compute()["certified_gap"]) == float(values["certified_gap"]) > 0
    assert math.isnan(float(values["gap"]))


def test_fewer_features_than_the_optimum_needs(generator):
    """Of the squared error the distance is known, of cross-entropy nothing but the bound."""
    for loss, finite in (("ce", {*TO_GO}), ("mse", {*TO_GO, "distance", "relative_distance"})):
        point = draw(generator, 5, 2), draw(generator, 20, 2), torch.arange(20) % 5, draw(generator, 5)
        with pytest.warns(UserWarning, match="certified_gap is valid"):
            values = read(loss, point, lambda_w=1e-3, lambda_h=1e-3)
        assert {name for name, value in values.items() if math.isfinite(value)} == finite


@pytest.mark.parametrize("exact", [None, True, False])
def test_large_optima_without_a_formula_are_for_who_asks(exact, generator):
    K = 130
    point = draw(generator, K, K), draw(generator, 3 * K, K), torch.arange(3 * K) % K, None
    point[2][:5] = 0
    message = "130 targets with 130 outputs has no formula.*exact=True"
    with pytest.warns(UserWarning, match=message) if exact is None else warnings.catch_warnings():
        values = read("ce", point, size=400, lambda_w=0.1, lambda_h=0.1, exact=exact)
    assert math.isfinite(values["gap"]) == (exact is True)
    assert values["certified_gap"] > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isfinite(read("mse", point, size=400, lambda_w=1e-3, lambda_h=1e-3)["gap"])


def test_a_loss_of_ones_own_without_a_conjugate(generator):
    problem = one_against_rest([6, 3, 1], 4, 0.01, 0.02)
    point = random_point(problem, generator)
    values = read(problem.loss, point, lambda_w=0.01, lambda_h=0.02, targets=problem.targets)
    assert values == pytest.approx(read(problem, point), rel=1e-13)
    assert 0 < values["gap"] <= values["certified_gap"]


def test_an_optimum_is_found_once(generator, monkeypatch):
    found = []
    find = problem_module.find_optimum
    monkeypatch.setattr(problem_module, "find_optimum", lambda *args: found.append(1) or find(*args))
    metric = Optimality("ce", draw(generator, 4, 5), 1e-2, 1e-2)
    for _ in range(3):
        metric.reset()
        metric.update(draw(generator, 20, 5), torch.arange(20) ** 2 % 11 % 4)
        metric.compute()
    assert len(found) == 1


def test_samples_left_out_and_other_types(generator):
    problem = unbalanced_ce(COUNTS, 5, 2e-2, 3e-3)
    weight, features, labels, _ = random_point(problem, generator)
    expected = read("ce", (weight, features, labels, None), lambda_w=2e-2, lambda_h=3e-3)
    more = torch.cat([features, draw(generator, 3, 5)]), torch.cat([labels, torch.full((3,), -100)])
    values = read("ce", (weight, *more, None), lambda_w=2e-2, lambda_h=3e-3, ignore_index=-100)
    assert values == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match=r"3 labels were outside 0\.\.3"):
        read("ce", (weight, *more, None), lambda_w=2e-2, lambda_h=3e-3)
    with pytest.raises(TypeError, match=r"labels int64, got .* and torch\.int32"):
        read("ce", (weight, features, labels.int(), None))
    low = features.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = read("ce", (weight, low, labels, None), lambda_w=2e-2, lambda_h=3e-3)
    expected = read("ce", (weight, low.double(), labels, None), lambda_w=2e-2, lambda_h=3e-3)
    assert values == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("kind", UNBALANCED)
def test_huge_logits_and_zero_features(kind, generator):
    loss, problem = UNBALANCED[kind]("free")
    weight, features, labels, bias = random_point(problem, generator)
    penalties = {"lambda_w": 2e-2, "lambda_h": 3e-3}
    huge = 1e4 * weight, features, labels, bias
    values = read(loss, huge, **penalties)
    assert values["certified_gap"] + values["certified_bound"] == pytest.approx(
        float(problem.value(*huge)), rel=ROUNDING
    )
    assert 0 < values["gap"] <= values["certified_gap"] * (1 + ROUNDING)
    zero = weight, torch.zeros_like(features), labels, bias
    values = read(loss, zero, **penalties)
    assert values["gap"] == pytest.approx(float(problem.value(*zero)) - problem.optimal_value, rel=1e-11)
    assert all(math.isnan(value) for value in read(loss, zero).values())
    broken = weight, features.index_fill(0, torch.tensor([3]), math.nan), labels, bias
    assert all(math.isnan(value) for value in read(loss, broken, **penalties).values())


def test_processes_merge(generator):
    problem = CASES["label smoothing, unbalanced"]()
    point = random_point(problem, generator)
    parts = [Optimality(problem, point[0]) for _ in range(3)]  # The last one sees nothing.
    for part, rows in zip(parts, torch.randperm(8, generator=generator).split(5), strict=False):
        part.update(point[1][rows], point[2][rows])
    parts[0].merge_state(parts[1])
    parts[0].merge_state(parts[2])
    assert {k: float(v) for k, v in parts[0].compute().items()} == pytest.approx(read(problem, point), rel=1e-12)


# A target for each sample.


def read_soft(loss, point, targets, size=7, order=None, **options):
    weight, features, bias = point
    metric = Optimality(loss, weight if bias is None else (weight, bias), **options)
    for rows in (torch.arange(len(targets)) if order is None else order).split(size):
        metric.update(features[rows], targets[rows])
    return {name: float(value) for name, value in metric.compute().items()}


SOFT_CASES = {
    "cross-entropy": ("ce", lambda g: torch.softmax(2 * draw(g, 30, 4), dim=1)),
    "hard": ("ce", lambda g: torch.eye(4, dtype=torch.float64)[torch.arange(30) % 4]),
    "several labels": ("bce", lambda g: (draw(g, 30, 4) > 0).double()),
    "numbers": ("mse", lambda g: draw(g, 30, 4)),
    "hinge": (one_against_rest([1], 1, 1.0, 1.0).loss, lambda g: draw(g, 30, 4).sign()),
}


@pytest.mark.parametrize("bias", ["none", 0.05])
@pytest.mark.parametrize("case", SOFT_CASES)
def test_targets_of_their_own_against_two_passes(case, bias, generator):
    """Below the bound that knows the factor t before it sums, by what concavity gives away, and below each F."""
    loss, make = SOFT_CASES[case]
    targets = make(generator)
    name = {"ce": CrossEntropy(), "bce": BinaryCrossEntropy(), "mse": SquaredError()}.get(loss, loss)
    problem = Problem(name, targets, [1] * 30, 6, 1e-2, 5e-3, bias)
    lambda_b = 0.0 if bias == "none" else bias
    for scale in (0.1, 1.0, 5.0):
        weight, features, _, offset = point = random_point(problem, generator, scale)
        options = {"lambda_w": 1e-2, "lambda_h": 5e-3, "lambda_b": lambda_b}
        values = [
            read_soft(loss, (weight, features, offset), targets, size, order, **options)
            for size in (1, 7, 30)
            for order in (None, torch.randperm(30, generator=generator))
        ]
        assert all(each == pytest.approx(values[0], rel=1e-12) for each in values)
        value, twice = float(problem.value(*point)), problem.certified_lower_bound(*point)
        logits = features @ weight.T + (0 if offset is None else offset)
        residuals = name.residual(logits, targets)
        share = min(1.0, 30 * problem.strength / float(torch.linalg.matrix_norm(residuals, 2)))
        ends = [_least(name, each, targets) for each in (0 * residuals, residuals)]
        expected = (1 - share) * ends[0] + share * ends[1] - _bias_part(share * residuals, lambda_b)
        bound = values[0]["certified_bound"]
        assert bound == pytest.approx(expected, rel=1e-12, abs=1e-13)
        assert bound <= twice + ROUNDING * value
        assert values[0]["certified_gap"] == pytest.approx(value - bound, rel=1e-12)
        others = [float(problem.value(*random_point(problem, generator, size))) for size in (0.01, 0.3, 1.0)]
        assert bound <= min(others)


def _least(loss, dual, targets):
    values = loss.dual_value(dual, targets)
    return float(values.mean()) if values is not None else (0.0 if not bool(dual.any()) else _of_hinge(dual, targets))


def _of_hinge(dual, targets):
    """Of half the square of 1 - y z, with the gradient -y (1 - y z) = u: z = y + u where u is not zero."""
    return float(torch.where(dual == 0, 0, -(dual * (dual / 2 + targets))).sum(dim=1).mean())


def _bias_part(residuals, lambda_b):
    return float(residuals.mean(dim=0).square().sum()) / (2 * lambda_b) if lambda_b else 0.0


@pytest.mark.parametrize(
    "make", [lambda: mixup(3, 2, 1, 4, 0.01, 0.01), lambda: soft_labels(SOFT, [3, 3, 2, 1], 4, 0.01, 0.01)]
)
def test_targets_of_their_own_close_the_gap_at_an_optimum(make, generator):
    problem = make()
    weight, features, labels, _ = problem.random_optimum(generator)
    values = read_soft("ce", (weight, features, None), problem.targets[labels], lambda_w=0.01, lambda_h=0.01)
    assert values["certified_bound"] == pytest.approx(problem.optimal_value, rel=1e-13)
    assert abs(values["certified_gap"]) < 1e-13
    fitted = read_soft("ce", (weight, features, None), problem.targets[labels])
    assert fitted["lambda_w"] == pytest.approx(0.01, rel=1e-12)
    assert fitted["lambda_h"] == pytest.approx(0.01, rel=1e-12)


def test_targets_in_float32_are_distributions(generator):
    targets = torch.softmax(draw(generator, 30, 4).float(), dim=1)
    point = draw(generator, 4, 5), draw(generator, 30, 5), None
    values = read_soft("ce", point, targets, lambda_w=0.01, lambda_h=0.01)
    exact = targets.double() / targets.double().sum(dim=1, keepdim=True)
    expected = read_soft("ce", point, exact, lambda_w=0.01, lambda_h=0.01)
    assert values == pytest.approx(expected, rel=1e-6)


def test_targets_of_their_own_merge(generator):
    targets = torch.softmax(draw(generator, 30, 4), dim=1)
    weight, features = draw(generator, 4, 5), draw(generator, 30, 5)
    parts = [Optimality("ce", weight, 0.01, 0.01) for _ in range(2)]
    for part, rows in zip(parts, torch.arange(30).split(20), strict=True):
        part.update(features[rows], targets[rows])
    parts[0].merge_state(parts[1])
    expected = read_soft("ce", (weight, features, None), targets, lambda_w=0.01, lambda_h=0.01)
    assert {k: float(v) for k, v in parts[0].compute().items()} == pytest.approx(expected, rel=1e-13)


def test_targets_that_cannot_be_read(generator):
    weight, features, bias = draw(generator, 4, 5), draw(generator, 6, 5), draw(generator, 4)
    targets = torch.softmax(draw(generator, 6, 4), dim=1)
    with pytest.raises(ValueError, match="lambda_b must be given if each sample has its own target"):
        Optimality("ce", (weight, bias)).update(features, targets)
    with pytest.raises(ValueError, match=r"floating targets \(B, 4\), got \(6, 5\) and \(6,\)"):
        Optimality("ce", weight).update(features, targets[:, 0])
    with pytest.raises(ValueError, match="labels must be int64, row numbers of the given targets"):
        Optimality(unbalanced_ce([3, 2, 1, 0], 5, 0.1, 0.1), weight).update(features, targets)
    metric = Optimality("ce", weight)
    metric.update(features, 2 * targets - 0.5)
    with pytest.raises(ValueError, match="targets must be rows for which the loss is defined"):
        metric.compute()
    metric.reset()
    metric.update(features, targets)
    metric.update(features, torch.arange(6) % 4)
    with pytest.raises(ValueError, match="integers in all batches, or floating in all"):
        metric.compute()


@pytest.mark.parametrize("loss", ["mse", "ce", "bce"])
def test_updates_make_no_transfer_to_the_host(loss):
    """Fake CUDA tensors raise on a host sync and on a mix of devices."""
    for targets in (torch.zeros(8, dtype=torch.int64), torch.zeros(8, 4)):
        metric = Optimality(loss, nn.Linear(5, 4), lambda_b=0.1)
        on_host = metric.reference.head_loss(nn.Linear(5, 4), "cpu")
        with FakeTensorMode():
            fake = lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda")  # noqa: E731
            parts = fake(on_host.targets), fake(on_host.weight), fake(on_host.bias)
            metric._loss, metric._snapshot = type(on_host)(on_host.loss, *parts), "read"
            for name in set(metric.metric_state) - {"kept"}:
                if isinstance(getattr(metric, name), torch.Tensor):
                    setattr(metric, name, fake(getattr(metric, name)))
            for _ in range(2):
                metric.update(torch.empty(8, 5, device="cuda"), fake(targets))
                metric._fold()
            assert metric.excess_residuals.device.type == metric.soft_gram.device.type == "cuda"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("hinge",), "problem must be a UFMProblem, a Problem, a Loss .*, got 'hinge'"),
        (("ce", 0.1), "lambda_w was given without lambda_h"),
        (("ce", 0.1, -1.0), "lambda_h must be None or positive and finite, got -1.0"),
        (("ce", 0.1, 0.1, -1.0), "lambda_b must be 0 or positive and finite, got -1.0"),
        (("ce", None, None, 0.0, [[1.0, 0.0]]), r"targets must have a column for each of the 4 outputs .* \(1, 2\)"),
        (("ce", None, None, 0.0, [1.0, 0.0]), r"targets must be a finite matrix \(M, K\)"),
        ((UFMProblem("ce", 4, 3, 5, 0.1, 0.1), 0.1, 0.1), "lambda_w cannot be given together with a problem"),
        ((UFMProblem("ce", 4, 3, 6, 0.1, 0.1),), r"head must have a weight of shape \(4, 6\) for this problem"),
        ((unbalanced_ce([3, 2, 1, 1], 5, 0.1, 0.1, "free"),), "since the problem has bias='free'"),
    ],
    ids=[str(i) for i in range(9)],
)
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        Optimality(arguments[0], nn.Linear(5, 4, bias=False), *arguments[1:])


def test_counts_of_a_problem_are_kept_to(generator):
    metric = Optimality(unbalanced_ce([3, 2, 1, 1], 5, 0.1, 0.1), draw(generator, 4, 5))
    metric.update(draw(generator, 7, 5), torch.tensor([0, 0, 0, 1, 2, 2, 3]))
    with pytest.raises(ValueError, match="label 1 must occur exactly 2 times, as the problem's counts say, got 1"):
        metric.compute()
