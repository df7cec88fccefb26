"""Gap and distance from streamed moments against the closed forms on all samples."""

import contextlib
import math

import pytest
import torch
from torch import nn

from nclightning.functional import ClassStatistics, StatisticsBuffer, class_statistics, distance_to_collapse
from nclightning.heads import read_head
from nclightning.metrics import Optimality
from nclightning.metrics.reference import Reference
from nclightning.objective import Objective
from nclightning.probe.optimality import OptimalityCollector
from nclightning.theory import UFMProblem
from tests.cases import ALL, at_strength, name_of
from tests.helpers import norm, perturb, random_point
from tests.theory.multiprecision import exact_distance, exact_gap

EPS = torch.finfo(torch.float64).eps
FULL_RANK = [p for p in ALL if p.feature_dim >= p.num_classes - 1]


def head_of(point):
    head = nn.Linear(point.weight.shape[1], len(point.weight), bias=point.bias is not None, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(point.weight)
        if point.bias is not None:
            head.bias.copy_(point.bias)
    return head


def stream(problem, point, size=8):
    metric = Optimality(problem, head_of(point))
    for h, y in zip(point.features.split(size), point.labels.split(size), strict=True):
        metric.update(h, y)
        if len(h) < size:
            metric._fold()
    return {name: float(value) for name, value in metric.compute().items()}


def collect(problem, point, size=8):
    """By the collector of a pass in which another one gathers the statistics."""
    collector = OptimalityCollector(Reference(problem), read_head(head_of(point)), own_statistics=False)
    buffer = StatisticsBuffer(ClassStatistics.empty(*point.weight.shape))
    for h, y in zip(point.features.split(size), point.labels.split(size), strict=True):
        buffer.add(h, y)
        collector.update(h, y)
    return {name: float(value) for name, value in collector.read(buffer.statistics).values.items()}


@pytest.mark.parametrize("problem", FULL_RANK, ids=name_of)
@pytest.mark.parametrize("step", [None, 1e-3, 1e-6, 1e-9])
def test_equals_the_closed_forms_on_all_samples(problem, step, generator):
    if step is None:
        point = random_point(problem, generator)
    else:
        point = perturb(problem.random_optimum(generator), generator, step)
    values = stream(problem, point)
    # Rounding of the point against its distance, as for the closed forms themselves.
    slack = max(1e-12, 1e-14 * (1 + norm(point)) / (step or 1))
    assert values["distance"] == pytest.approx(float(problem.distance(*point)), rel=slack)
    assert values["gap"] == pytest.approx(float(problem.optimality_gap(*point)), rel=10 * slack)


@pytest.mark.parametrize("problem", [p for p in FULL_RANK if p.collapses], ids=name_of)
def test_vanishes_at_an_optimum(problem, generator):
    values = stream(problem, problem.random_optimum(generator))
    assert values["relative_distance"] <= 1e-14
    assert values["gap"] <= 1e-27


def test_a_bias_under_cross_entropy_is_free(generator):
    """The minimum over the bias, too, is F*; a constant bias changes neither gap nor distance."""
    problem = UFMProblem("ce", 4, 3, 6, 1e-2, 3e-3)
    point = random_point(problem, generator)
    for shift in (0.0, 5.0):
        biased = point._replace(bias=torch.full((4,), shift, dtype=torch.float64))
        values = stream(problem, biased)
        assert values["gap"] == pytest.approx(float(problem.optimality_gap(*point)), rel=1e-10)
        assert values["distance"] == pytest.approx(float(problem.distance(*point)), rel=1e-12)
    biased = point._replace(bias=torch.randn(4, dtype=torch.float64, generator=generator))
    value = Objective("ce", problem.lambda_w, problem.lambda_h)(*biased[:3], biased.bias)
    assert stream(problem, biased)["gap"] == pytest.approx(float(value) - problem.optimal_value, rel=1e-12)


def test_ranks_merge(generator):
    problem = UFMProblem("mse", 3, 4, 5, 1e-2, 3e-3)
    point = random_point(problem, generator)
    first, second = (Optimality(problem, head_of(point)) for _ in range(2))
    first.update(point.features[:5], point.labels[:5])
    second.update(point.features[5:], point.labels[5:])
    first.merge_state(second)
    assert {k: float(v) for k, v in first.compute().items()} == pytest.approx(stream(problem, point), rel=1e-12)


def towards(end, start, share):
    """The point at a share of the way from one to another."""
    parts = zip((end.weight, end.features, end.bias), (start.weight, start.features, start.bias), strict=True)
    weight, features, bias = (None if one is None else one + share * (two - one) for one, two in parts)
    return end._replace(weight=weight, features=features, bias=bias)


RUN = {
    **{
        f"{share:g} of the way": lambda end, start, _, s=share: towards(end, start, s)
        for share in (1, 1e-3, 1e-9, 1e-15)
    },
    # Features within classes collapse earlier than means and head.
    **{
        f"within {size:g}": lambda _, start, means, s=size: start._replace(features=means + s * start.features)
        for size in (1e-3, 1e-12, 1e-15, 0)
    },
    "optimum": lambda end, *_: end,
}


@pytest.mark.parametrize(
    "problem", [at_strength(loss, (3, 8, 4), kq, 2.0) for loss in ("mse", "ce") for kq in (1e-6, 0.3)], ids=name_of
)
@pytest.mark.parametrize("state", RUN)
def test_equals_the_difference_of_objectives_in_70_digits(problem, state, generator):
    """From a random start to the optimum, in any chunks and order.

    Found: relative errors of at most 5e-16 far from the optimum and of 0.4 eps |x| / distance near it, like those of a
    sum over all samples. Tolerance 1e-14 and 4 eps |x| / distance: the point itself is known to eps |x|.
    """
    end = problem.random_optimum(generator)
    means = torch.randn(3, 4, dtype=torch.float64, generator=generator)[end.labels]
    point = RUN[state](end, random_point(problem, generator)._replace(labels=end.labels), means)
    exact, distance = exact_gap(problem, point), exact_distance(problem, point)
    tolerance = 1e-14 + 4 * EPS * norm(point) / float(distance)
    for order in (torch.arange(24), torch.randperm(24, generator=generator)):
        for size in (1, 7, 64):
            shuffled = point._replace(features=point.features[order], labels=point.labels[order])
            for values in (stream(problem, shuffled, size), collect(problem, shuffled, size)):
                assert values["gap"] == pytest.approx(float(exact), rel=tolerance)
                assert values["distance"] == pytest.approx(float(distance), rel=tolerance)


@pytest.mark.parametrize("loss", ["mse", "ce"])
@pytest.mark.parametrize("share", [1.0, 1e-3, 1e-6])
def test_penalties_are_fitted_to_the_same_states(loss, share, generator):
    problem = at_strength(loss, (4, 6, 5), 0.1, 2.0)
    end = problem.random_optimum(generator)
    point = towards(end, random_point(problem, generator, 0.3)._replace(labels=end.labels), share)
    fitted = distance_to_collapse(class_statistics(point.features, point.labels, 4), point.weight)
    found = UFMProblem.at_scale(loss, 4, 6, 5, float(fitted.head_scale), float(fitted.feature_scale))
    for values in (stream(loss, point), collect(loss, point)):
        assert values.pop("lambda_w") == pytest.approx(found.lambda_w, rel=1e-12)
        assert values.pop("lambda_h") == pytest.approx(found.lambda_h, rel=1e-12)
        assert values == pytest.approx(stream(found, point), rel=1e-9 if share < 1 else 1e-12)
        # The problem of the penalties that are found is known to 1e-15 of its scales.
        assert values["gap"] == pytest.approx(float(found.optimality_gap(*point)), rel=1e-12 + 1e-14 / share)


@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_nan_where_no_penalties_fit(loss, generator):
    problem = UFMProblem(loss, 4, 6, 5, 1.0, 1.0)
    point = random_point(problem, generator)
    zero = point._replace(weight=torch.zeros(4, 5, dtype=torch.float64))
    names = {"gap", "distance", "relative_distance", "certified_gap", "certified_bound", "lambda_w", "lambda_h"}
    for values in (stream(loss, zero), collect(loss, zero)):
        assert values.keys() == names
        assert all(map(math.isnan, values.values()))
    optimum = at_strength(loss, (4, 6, 5), 0.1, 1.0).random_optimum(generator)
    large = optimum._replace(weight=100 * optimum.weight)
    assert math.isnan(stream(loss, large)["gap"]) == (loss == "mse")  # Logits beyond the targets.


@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_processes_merge_whatever_their_classes(loss, generator):
    """As torchmetrics stacks their states: the sums are around different means."""
    problem = at_strength(loss, (3, 8, 4), 0.3, 2.0)
    point = random_point(problem, generator)
    ranks = [Optimality(problem, head_of(point)) for _ in range(4)]  # The last one sees nothing.
    order = point.labels.argsort().roll(3)  # Each of the others sees parts of two classes.
    for rank, own in zip(ranks, order.split(8), strict=False):
        rank.update(point.features[own], point.labels[own])
    together = Optimality(problem, head_of(point))
    for rank in ranks:
        rank._fold()
    for name, state in together.metric_state.items():
        if isinstance(state, torch.Tensor):
            states = torch.stack([getattr(rank, name) for rank in ranks])
            setattr(together, name, states.sum(dim=0) if name.startswith("soft_") else states)
    together._update_count = 1
    assert float(together.compute()["gap"]) == pytest.approx(float(problem.optimality_gap(*point)), rel=1e-12)
    for rank in ranks[1:]:
        ranks[0].merge_state(rank)
    assert float(ranks[0].compute()["gap"]) == pytest.approx(float(problem.optimality_gap(*point)), rel=1e-12)


def test_a_batch_can_be_read_alone(generator):
    problem = at_strength("ce", (3, 8, 4), 0.3, 2.0)
    first, second = (random_point(problem, generator) for _ in range(2))
    metric = Optimality(UFMProblem("ce", 3, 8, 4, problem.lambda_w, problem.lambda_h), head_of(first))
    for point in (first, second):
        expected = float(problem.optimality_gap(*point._replace(weight=first.weight)))
        assert float(metric(point.features, point.labels)["gap"]) == pytest.approx(expected, rel=1e-12)


def test_features_and_head_are_of_one_time(generator):
    """An averaged weight that is put back before the reading does not mix with the features of the other."""
    problem = at_strength("ce", (3, 8, 4), 0.3, 2.0)
    point = random_point(problem, generator)
    head = head_of(point)
    metric = Optimality(problem, head)
    metric.update(point.features, point.labels)
    with torch.no_grad():
        head.weight.zero_()
    assert float(metric.compute()["gap"]) == pytest.approx(float(problem.optimality_gap(*point)), rel=1e-12)
    metric.reset()
    metric.update(point.features, point.labels)
    zero = point._replace(weight=torch.zeros_like(point.weight))
    assert float(metric.compute()["gap"]) == pytest.approx(float(problem.optimality_gap(*zero)), rel=1e-12)


@pytest.mark.parametrize("loss", ["mse", "ce"])
@pytest.mark.parametrize("kq", [1e-6, 0.1, 0.9])
def test_the_problem_at_a_scale(loss, kq):
    K, n, d, c = 5, 7, 9, 3.0
    problem = UFMProblem(loss, K, n, d, kq / K * c, kq / K / (n * c))
    again = UFMProblem.at_scale(loss, K, n, d, problem.weight_scale, problem.feature_scale)
    # 1 - s of MSE loses the digits of K q.
    assert again.lambda_w == pytest.approx(problem.lambda_w, rel=1e-14 / kq + 1e-12)
    assert again.lambda_h == pytest.approx(problem.lambda_h, rel=1e-14 / kq + 1e-12)


@pytest.mark.parametrize("scales", [(0.0, 1.0), (1.0, -1.0), (2.0, 0.5), (math.nan, 1.0)])
def test_scales_that_are_optimal_nowhere(scales):
    with pytest.raises(ValueError, match="no penalties make these scales optimal"):
        UFMProblem.at_scale("mse", 3, 2, 4, *scales)


def test_bad_input(generator):
    problem = UFMProblem("mse", 3, 4, 5, 1e-2, 3e-3)
    with pytest.raises(ValueError, match="head must have a bias, since the problem has one"):
        Optimality(problem, nn.Linear(5, 3, bias=False))
    metric = Optimality(problem, nn.Linear(5, 3))
    metric.update(torch.randn(6, 5, generator=generator), torch.tensor([0, 0, 1, 1, 2, 0]))
    with pytest.raises(ValueError, match=r"class must occur exactly 4 times, got between 1 and 3: pass 'mse' and"):
        metric.compute()
    with pytest.raises(ValueError, match=r"means must have shape \(3, 5\)"):
        problem.distance_from_moments(torch.zeros(3, 5), torch.zeros(3, 4), torch.zeros(()))
    with pytest.raises(ValueError, match="at least num_classes - 1 = 2 for a gap from moments"):
        UFMProblem("mse", 3, 4, 1, 1e-2, 3e-3).gap_from_moments(*[torch.zeros(3, 1)] * 2, *[torch.zeros(())] * 2)


@pytest.mark.parametrize("num_ignored", [None, 0, 2])
def test_without_samples_nothing_is_read(num_ignored):
    metric = Optimality("ce", torch.zeros(3, 5), ignore_index=-100)
    if num_ignored is None:
        warns = pytest.warns(UserWarning, match="called before the ``update`` method")
    else:
        warns = contextlib.nullcontext()
        metric.update(torch.zeros(num_ignored, 5), torch.full((num_ignored,), -100))
    with warns, pytest.raises(ValueError, match=r"^there are no samples: call update before compute\.$"):
        metric.compute()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_table_of_any_precision(dtype, generator):
    features, weight = torch.randn(15, 5, generator=generator), torch.randn(3, 5, generator=generator)
    metric = Optimality("ce", weight, 4e-3, 5e-2 / 15, targets=torch.eye(3, dtype=dtype) * 0.7 + 0.1)
    metric.update(features, torch.arange(15) % 3)
    values = metric.compute()
    assert 0 < float(values["gap"]) <= float(values["certified_gap"])


@pytest.mark.parametrize(
    ("loss", "row"), [("ce", [-0.1, 1.1]), ("ce", [0.0, 0.0]), ("bce", [0.5, 1.5]), ("bce", [math.nan, 0.0])]
)
def test_targets_of_samples_outside_of_the_loss(loss, row, generator):
    metric = Optimality(loss, torch.randn(2, 4, generator=generator), 1e-2, 1e-2)
    metric.update(torch.randn(2, 4, generator=generator), torch.tensor([[0.5, 0.5], row]))
    with pytest.raises(ValueError, match=r"^targets must be rows .* for 'ce' not negative .* for 'bce' between 0"):
        metric.compute()


def test_targets_of_samples_count_with_their_sum(generator):
    """As in PyTorch's cross-entropy."""
    features, weight = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (6, 3))
    targets = torch.rand(6, 3, generator=generator, dtype=torch.float64)
    metric = Optimality("ce", weight, 1e-2, 1e-3)
    metric.update(features, targets)
    values = metric.compute()
    expected = nn.functional.cross_entropy(features @ weight.T, targets)
    expected = expected + 1e-2 / 2 * weight.square().sum() + 1e-3 / 2 * features.square().sum()
    # The sum of both is F up to its rounding.
    assert float(values["certified_gap"] + values["certified_bound"]) == pytest.approx(float(expected), rel=1e-14)
