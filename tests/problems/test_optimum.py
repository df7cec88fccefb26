"""Optima against formulas, each other, and at the edges: thresholds, absent classes, few features, extreme sizes."""

import dataclasses
import math
import pickle

import pytest
import torch

from nclightning.problems import (
    BinaryCrossEntropy,
    CrossEntropy,
    NoAnswer,
    Problem,
    SquaredError,
    balanced_ce,
    balanced_mse,
    label_smoothing,
    logit_adjusted_ce,
    mixup,
    mse_with_penalized_bias,
    mse_without_bias,
    multi_label_bce,
    rank_thresholds,
    regression,
    regression_gram,
    soft_labels,
    unbalanced_ce,
    unbalanced_mse,
    weighted_ce,
)
from tests.problems.cases import CASES, LABELS, ROWS

EYE = torch.eye(3, dtype=torch.float64)


def close(one, other, tolerance=1e-12):
    one, other = (torch.as_tensor(each, dtype=torch.float64) for each in (one, other))
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def numerically(problem):
    """The same problem with a loss that gives no formula."""
    kind = type(problem.loss)
    hidden = type(f"Hidden{kind.__name__}", (kind,), {"closed_form": lambda self, groups: None})
    loss = dataclasses.replace(problem.loss) if dataclasses.is_dataclass(problem.loss) else kind()
    loss = hidden(**vars(loss))
    return problem.replace(loss=loss)


@pytest.mark.parametrize(
    "problem",
    [
        balanced_ce(10, 10, 20, 5e-3, 5e-4),
        balanced_ce(3, 5, 4, 1e-6, 1e-2),
        balanced_mse(5, 3, 6, 0.01, 0.02),
        mse_without_bias([100, 10, 1], 4, 1e-3, 1e-3),
        mse_with_penalized_bias([3] * 4, 4, 0.01, 0.02, 0.4),
        unbalanced_mse([100, 10, 1], 4, 1e-3, 1e-3),
        label_smoothing([4] * 5, 0.2, 6, 0.01, 0.01, "free"),
        regression(ROWS, 4, 0.05, 0.01),
    ],
    ids=lambda p: f"{type(p.loss).__name__}-{p.num_groups}-{p.bias}",
)
def test_formulas_are_what_the_solver_finds(problem):
    found = numerically(problem).optimum
    assert (problem.optimum.method, found.method) == ("closed form", "numerical")
    close(found.logits, problem.optimum.logits, 2e-11)
    assert found.rank == problem.optimum.rank
    assert abs(found.value / problem.optimal_value - 1) < 1e-13


@pytest.mark.parametrize("bias", ["none", "free", 0.1])
@pytest.mark.parametrize("smoothing", [0.1, 0.2, 0.3])
@pytest.mark.parametrize("K", range(2, 11))
def test_rows_of_float32_that_miss_the_sum_one(K, smoothing, bias):
    table = torch.eye(K) * (1 - smoothing) + smoothing / K
    problem = Problem(CrossEntropy(), table, [5] * K, 5 if K < 6 else K, 4e-3, 1e-2 / K, bias)
    assert problem.optimum.method == "closed form"
    assert abs(problem.optimum.duality_gap) < 1e-14
    exact = problem.replace(targets=torch.eye(K, dtype=torch.float64) * (1 - smoothing) + smoothing / K)
    # The loss has a slope of at most the largest logit, about 6, in each target.
    assert abs(problem.optimal_value - exact.optimal_value) < 6 * torch.finfo(torch.float32).eps


def test_label_smoothing_by_hand():
    K, n, delta, lw, lh = 4, 5, 0.1, 2e-3, 1e-3
    wrong = math.sqrt(n * lw * lh) + delta / K
    s = math.log(1 / wrong - K + 1)
    expected = s * (torch.eye(K, dtype=torch.float64) - 1 / K)
    close(label_smoothing([n] * K, delta, K, lw, lh).optimum.logits, expected)


@pytest.mark.parametrize("lambda_b", [0.04, 0.4, 10.0])
def test_penalized_bias_by_hand(lambda_b):
    K, n, lw, lh = 4, 3, 0.01, 0.02
    q = math.sqrt(n * lw * lh)
    s, t = 1 - K * q, max(0.0, 1 - K * q * (1 + 1 / lambda_b))
    bias = q / lambda_b if t else 1 / (K * (1 + lambda_b))
    optimum = mse_with_penalized_bias([n] * K, K, lw, lh, lambda_b).optimum
    close(optimum.factors.bias, [bias] * K)
    close(optimum.logits, s * torch.eye(K, dtype=torch.float64) - s / K + t / K + bias)
    assert optimum.rank == (K if t else K - 1)


def test_a_class_vanishes_at_its_threshold():
    """Class k does iff its count is at most N^2 times the product of the penalties; here it is that for the second."""
    N = 13
    at = mse_without_bias([9, 4], 2, 2 / N, 2 / N)
    assert at.optimum.rank == 1
    assert bool((at.random_optimum().weight[1] == 0).all())
    below = mse_without_bias([9, 4], 2, 2 / N, (2 - 1e-9) / N)
    assert below.optimum.rank == 2
    assert float(below.gap(*below.random_optimum())) < 1e-28
    assert 0 < below.mu < 1e-9
    # At the threshold F is flat to second order in the direction that vanishes, if a feature is left for it.
    assert at.mu == 0
    assert at.rates.error_bound_constant == math.inf


@pytest.mark.parametrize("loss", [CrossEntropy(), BinaryCrossEntropy(), SquaredError()], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("bias", ["none", "free", 0.1])
def test_zero_from_the_threshold_on(loss, bias):
    problem = Problem(loss, EYE, [6, 3, 2], 3, 0.01, 0.01, bias)
    root = math.sqrt(problem.threshold)

    def at(part):
        return problem.replace(lambda_w=root * part, lambda_h=root * part)

    assert [at(part).optimum.rank for part in (1 + 1e-9, 1.5, 1e6)] == [0, 0, 0]
    assert at(1 - 1e-6).optimum.rank > 0
    above = at(1.5)
    optimum = above.random_optimum()
    assert not bool(optimum.weight.any())
    assert not bool(optimum.features.any())
    assert float(above.gap(*optimum)) < 1e-28
    assert above.dimension == (1 if bias == "free" and loss.shift_invariant else 0)


def test_minorities_merge():
    """From a threshold on both have the same logits, and before they are apart; the majorities stay apart."""
    problem = unbalanced_ce([50, 50, 2, 2], 4, 1e-3, 1e-3)
    thresholds = rank_thresholds(problem, lowest=1e-9)
    assert list(thresholds) == [3, 2, 1]
    assert thresholds[3] < thresholds[2] <= thresholds[1]
    assert abs(thresholds[1] / problem.threshold - 1) < 1e-5

    def logits(product):
        return problem.replace(lambda_w=math.sqrt(product), lambda_h=math.sqrt(product)).optimum.logits

    merged, apart = logits(1.01 * thresholds[3]), logits(0.99 * thresholds[3])
    close(merged[2], merged[3], 1e-10)
    assert float((apart[2] - apart[3]).norm()) > 1e-3
    assert float((merged[0] - merged[1]).norm()) > 1


def test_thresholds_of_the_squared_error_are_its_singular_values():
    counts = [30, 10, 4]
    values = [n / sum(counts) ** 2 for n in counts]
    found = rank_thresholds(mse_without_bias(counts, 3, 0.1, 0.1), lowest=1e-5)
    assert [abs(found[r] / v - 1) < 1e-5 for r, v in zip((1, 2, 3), values, strict=True)] == [True] * 3


def test_an_absent_class_has_a_row_and_no_features():
    problem = CASES["absent class"]()
    optimum = problem.random_optimum()
    assert sorted(set(optimum.labels.tolist())) == [0, 1, 3]
    gradient = torch.autograd.grad(problem.value(w := optimum.weight.clone().requires_grad_(), *optimum[1:]), w)[0]
    assert float(gradient.norm()) < 1e-14
    assert float(optimum.weight[2].norm()) > 0.1


def test_groups_with_equal_targets_are_one():
    parts = soft_labels([[1.0, 0], [1.0, 0], [0, 1.0]], [2, 3, 4], 3, 0.01, 0.01)
    whole = soft_labels([[1.0, 0], [0, 1.0]], [5, 4], 3, 0.01, 0.01)
    close(parts.optimal_value, whole.optimal_value)
    close(parts.optimum.logits[0], parts.optimum.logits[1])
    close(parts.optimum.logits[[0, 2]], whole.optimum.logits)


# Strengths from far below what the tiny classes can bear to where only large ones are left.
@pytest.mark.parametrize("product", [1e-20, 1e-12, 1e-8, 1e-5])
@pytest.mark.parametrize("bias", ["none", "free"])
def test_extreme_imbalance_and_penalties(product, bias):
    problem = unbalanced_ce([10000, 300, 2, 1], 5, math.sqrt(product) * 1e3, math.sqrt(product) / 1e3, bias)
    assert problem.optimum.duality_gap <= 1e-10 * problem.optimal_value + 1e-13
    optimum = problem.random_optimum()
    norm = sum(float(t.square().sum()) for t in (optimum.weight, optimum.features))
    assert float(problem.gap(*optimum)) <= 10 * problem.smoothness * norm * 2.0**-104
    assert float(problem.value(*optimum)) == pytest.approx(problem.optimal_value, rel=1e-11)


def test_hundred_classes_with_a_long_tail():
    counts = [round(500 * 0.01 ** (k / 99)) for k in range(100)]
    problem = unbalanced_ce(counts, 128, 1e-3, 1e-7)
    assert problem.optimum.rank == 99
    assert problem.optimum.duality_gap < 1e-12
    with pytest.raises(NoAnswer, match="spectrum: its dense part has 19800 rows") as caught:
        problem.spectrum()
    assert caught.value.question == "spectrum"
    assert isinstance(problem.answers()["rates"], NoAnswer)


def test_few_features():
    """Cross-entropy says that it does not know; but the bound is valid. For the squared error it is known."""
    problem = unbalanced_ce([9, 4, 1], 1, 0.01, 0.01)
    for ask in (lambda: problem.optimal_value, problem.random_optimum, problem.spectrum):
        with pytest.raises(NoAnswer, match="feature_dim=1 is below the rank 2"):
            ask()
    assert pickle.loads(pickle.dumps(problem.answers()["optimum"])).question == "optimum"
    point = problem.replace(feature_dim=2).random_optimum()
    bound = problem.certified_lower_bound(point.weight[:, :1], point.features[:, :1], point.labels)
    assert (
        bound
        <= problem.convex_optimum.value
        <= float(problem.value(point.weight[:, :1], point.features[:, :1], point.labels))
    )
    # What is left out has the singular value 1.
    few, full = (mse_without_bias([9, 4, 1], d, 0.01, 0.01) for d in (2, 3))
    N = 14
    lost = 1 / (2 * N) - ((0.01 * N) ** 2 / (2 * N) + 0.01 * (1 - 0.01 * N))
    assert few.optimal_value - full.optimal_value == pytest.approx(lost)
    mixed = mse_without_bias([9, 4, 4], 2, 0.01, 0.01)
    assert mixed.optimal_value > 0
    with pytest.raises(NoAnswer, match="several equal singular values in addition to larger ones"):
        mixed.random_optimum()
    with pytest.raises(NoAnswer, match="not unique"):
        balanced_mse(5, 2, 2, 0.01, 0.01).divergence(torch.zeros(1, 5), torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (unbalanced_ce([3, 0, 2], 3, 0.01, 0.01, "free"), "class 1 has no samples"),
        (multi_label_bce([[1, 0], [1, 1]], [2, 2], 3, 0.01, 0.01, "free"), "all or no samples have label 0"),
    ],
)
def test_no_minimum_with_a_free_bias(problem, words):
    for ask in ("optimal_value", "threshold"):
        with pytest.raises(NoAnswer, match=f"F has no minimum with a free bias: {words}.*Penalize"):
            getattr(problem, ask)
    assert isinstance(problem.answers()["threshold"], NoAnswer)
    penalized = problem.replace(bias=1e-3)
    assert float(penalized.gap(*penalized.random_optimum())) < 1e-26


def test_more_outputs_than_groups_and_fewer():
    for targets in (torch.eye(5)[:2], torch.tensor(LABELS, dtype=torch.float64)[:, :2]):
        for loss, bias in ((SquaredError(), "free"), (BinaryCrossEntropy(), "none")):
            problem = Problem(loss, targets, [3] * len(targets), 4, 0.01, 0.02, bias)
            optimum = problem.random_optimum()
            assert float(problem.gap(*optimum)) < 1e-26
            variables = sum(t.numel() for t in (optimum.weight, optimum.features))
            variables += 0 if optimum.bias is None else optimum.bias.numel()
            assert sum(e.multiplicity for e in problem.spectrum()) == variables


def test_weights_are_averaged_as_torch_averages(generator):
    counts, weights = [4, 2, 1], [0.3, 1.0, 2.5]
    problem = weighted_ce(counts, weights, 3, 0.01, 0.02)
    W, H = (torch.randn(n, 3, dtype=torch.float64, generator=generator) for n in (3, 7))
    loss = torch.nn.CrossEntropyLoss(weight=torch.tensor(weights, dtype=torch.float64))(H @ W.T, problem.labels())
    penalty = 0.01 / 2 * W.square().sum() + 0.02 / 2 * H.square().sum()
    close(problem.value(W, H, problem.labels()), loss + penalty)


def test_the_head_of_regression():
    rows = torch.tensor(ROWS, dtype=torch.float64)
    problem = regression(ROWS, 5, 0.05, 0.01)
    covariance = torch.cov(rows.T, correction=0)
    values, axes = torch.linalg.eigh(covariance)
    root = axes * (values.sqrt() - math.sqrt(8 * 0.05 * 0.01)).clamp(min=0) @ axes.T
    close(regression_gram(problem), math.sqrt(8 * 0.01 / 0.05) * root)


def test_no_optimum_above_the_tolerance(monkeypatch):
    monkeypatch.setattr("nclightning.problems.solving._OUTER", 0)
    problem = unbalanced_ce([9, 4, 1], 3, 0.01, 0.01)
    with pytest.raises(NoAnswer, match=r"certified gap of .*, above the tolerance of 1e-10 .*Raise tolerance"):
        _ = problem.optimal_value
    assert problem.replace(tolerance=10.0).optimum.duality_gap > 1e-6


@pytest.mark.parametrize("bias", ["none", "free", 0.1])
@pytest.mark.parametrize("counts", [[10, 10, 1, 1], [1000, 100, 10, 1, 1]])
def test_penalties_within_the_rounding_of_the_loss(counts, bias):
    """The whole minimum is within the rounding of the loss at zero: right all the same."""
    for strength in (1e-12, 1e-16, 1e-20, 1e-30):
        problem = unbalanced_ce(counts, 5, strength, strength, bias)
        optimum = problem.optimum
        multipliers = optimum.groups.multipliers(optimum.logits)
        assert float(torch.linalg.matrix_norm(multipliers, 2)) == pytest.approx(strength, rel=1e-9)
        along = -float((multipliers * optimum.factors.scaled_logits).sum())
        assert along == pytest.approx(strength * float(optimum.factors.singular.sum()), rel=1e-9)


# The path to the last case ends at a factor that vanishes in both halves, which once made the Newton steps infinite.
@pytest.mark.parametrize("bias", ["free", 0.01])
def test_many_small_groups_of_labels(bias, generator):
    targets = (torch.rand(45, 23, generator=generator) < 0.3).double()
    targets[0], targets[1] = 0, 1
    for strength in (1e-6, 1e-5, 1e-4):
        problem = multi_label_bce(targets, [1000] + [1] * 44, 45, strength, strength, bias)
        assert problem.optimum.duality_gap < 1e-13


@pytest.mark.parametrize("shares", [(0.3,), (0.5,)])
@pytest.mark.parametrize("bias", ["none", "free", 1.0])
@pytest.mark.parametrize("below", [1e-4, 1e-6, 1e-8, 1e-10])
def test_just_below_the_threshold(shares, bias, below):
    """Multipliers then exceed the strength by what the factors that are about to vanish cannot tell."""
    problem = mixup(8, 3, 2, 8, 1.0, 1.0, shares, bias)
    strength = math.sqrt(problem.threshold) * (1 - below)
    optimum = problem.replace(lambda_w=strength, lambda_h=strength).optimum
    assert optimum.duality_gap < 1e-10
    assert optimum.value == pytest.approx(math.log(8), rel=1e-7)


def test_counts_given_as_floats_are_read_in_full():
    problem = unbalanced_ce([16777217.0, 1.0], 2, 0.01, 0.01)
    assert problem.counts.tolist() == [16777217, 1]
    assert logit_adjusted_ce([16777217.0, 1.0], 2, 0.01, 0.01).counts.tolist() == [16777217, 1]


def test_the_bound_from_predictions_of_many_batches(generator):
    problem = multi_label_bce(LABELS, [30, 20, 20, 10], 5, 1e-3, 1e-4, "free")
    optimum, labels = problem.random_optimum(generator), problem.labels()
    features = optimum.features + 0.1 * torch.randn(80, 5, dtype=torch.float64, generator=generator)
    sums = torch.zeros(4, 3, dtype=torch.float64)
    for batch in torch.randperm(80, generator=generator).split(7):
        logits = features[batch] @ optimum.weight.T + optimum.bias
        sums.index_add_(0, labels[batch], torch.sigmoid(logits) - problem.targets[labels[batch]])
    bound = problem.certified_lower_bound_from_residuals(sums / problem.counts.unsqueeze(1))
    assert bound == pytest.approx(problem.certified_lower_bound(optimum.weight, features, labels, optimum.bias))
    assert 0.5 * problem.optimal_value < bound < problem.optimal_value


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Problem("ce", EYE, [1, 1, 1], 3, 0.1, 0.1), "loss must be a Loss .*got 'ce'"),
        (lambda: Problem(CrossEntropy(), [[0.5, 0.6]], [1], 3, 0.1, 0.1), "sum 1, got a row with sum 1.1"),
        (lambda: Problem(CrossEntropy(), EYE, [1, 1], 3, 0.1, 0.1), "counts must hold a number for each of the 3"),
        (lambda: Problem(CrossEntropy(), EYE, [1, -1, 1], 3, 0.1, 0.1), r"counts must be integers.*got \[1, -1, 1\]"),
        (lambda: Problem(CrossEntropy(), EYE, [0, 0, 0], 3, 0.1, 0.1), "one positive"),
        (lambda: Problem(CrossEntropy(), EYE, [1.5, 1, 1], 3, 0.1, 0.1), "counts must be integers"),
        (lambda: Problem(CrossEntropy(), EYE, [1, 1, 1], 0, 0.1, 0.1), "feature_dim must be .*got 0"),
        (lambda: Problem(CrossEntropy(), EYE, [1, 1, 1], 3, 0.0, 0.1), "lambda_w must be positive and finite, got 0.0"),
        (lambda: Problem(CrossEntropy(), EYE, [1, 1, 1], 3, 0.1, 0.1, "yes"), "bias must be 'none', 'free' or"),
        (lambda: Problem(CrossEntropy(), EYE, [1, 1, 1], 3, 0.1, 0.1, 0.0), "got 0.0"),
        (
            lambda: Problem(CrossEntropy(offset=[1.0]), EYE, [1, 1, 1], 3, 0.1, 0.1),
            "offset must hold a number for each",
        ),
        (lambda: Problem(CrossEntropy(), [[1.0]], [1], 3, 0.1, 0.1), "at least two columns"),
        (lambda: Problem(BinaryCrossEntropy(), [[2.0]], [1], 3, 0.1, 0.1), "between 0 and 1.*2"),
        (lambda: balanced_ce(1, 3, 3, 0.1, 0.1), "num_classes must be an integer of at least 2, got 1"),
        (lambda: label_smoothing([1, 1], 1.0, 3, 0.1, 0.1), "smoothing must be from 0 to below 1, got 1.0"),
        (lambda: weighted_ce([1, 1], "equal", 3, 0.1, 0.1), "class_weights must be numbers or 'inverse'"),
        (lambda: weighted_ce([1, 1], 2.0, 3, 0.1, 0.1), r"class_weights must hold 2 numbers .* got the shape \(\)"),
        (lambda: weighted_ce([1, 1], [1, 0], 3, 0.1, 0.1), r"class_weights must be positive and finite, got \[1, 0\]"),
        (lambda: weighted_ce([1, 1], [1, math.inf], 3, 0.1, 0.1), "class_weights must be positive and finite"),
    ],
)
def test_arguments_that_do_not_fit(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_points_that_do_not_fit():
    problem = unbalanced_ce([2, 1], 3, 0.1, 0.1)
    weight, features, labels, _ = problem.random_optimum()
    for point, words in (
        ((weight.T, features, labels), r"weight must have shape \(2, 3\)"),
        ((weight, features[:2], labels), r"features must have shape \(3, 3\)"),
        ((weight, features, labels.int()), "labels must be int64"),
        ((weight, features, 1 - labels), "as often as counts says"),
        ((weight, features, labels, torch.zeros(2)), "bias must be None"),
    ):
        with pytest.raises(ValueError, match=words):
            problem.gap(*point)


@pytest.mark.parametrize("strength", [1e-4, 1e-6, 1e-8, 1e-10])
def test_weak_penalties_leave_no_gap_at_the_optimum(strength, generator):
    """Multipliers of directions that vanish are then close to the rounding of the others."""
    for _ in range(10):
        targets = torch.rand(3, 3, dtype=torch.float64, generator=generator)
        problem = Problem(SquaredError(), targets, [3, 1, 9], 3, strength, strength, "free")
        optimum = problem.random_optimum(generator)
        size = float(optimum.weight.square().sum() + optimum.features.square().sum())
        assert float(problem.gap(*optimum)) < 100 * size * 2.0**-104
