"""Problem (2): against sums written out, and its refusals."""

import copy
import math
import pickle

import pytest
import torch

from nclightning.objective import Objective
from nclightning.problems import BinaryCrossEntropy, CrossEntropy, SquaredError
from tests.problems.cases import CASES


def naive(loss, lambda_w, lambda_h, lambda_b, weight, features, labels, bias):
    """Problem (2), sample by sample, in Python floats."""
    total, N = 0.0, len(labels)
    for h, y in zip(features.tolist(), labels.tolist(), strict=True):
        z = [sum(w * x for w, x in zip(row, h, strict=True)) for row in weight.tolist()]
        z = z if bias is None else [a + b for a, b in zip(z, bias.tolist(), strict=True)]
        if loss == "mse":
            total += sum((a - (k == y)) ** 2 for k, a in enumerate(z)) / 2 / N
        else:
            total += (math.log(sum(math.exp(a) for a in z)) - z[y]) / N
    total += lambda_w / 2 * sum(w**2 for row in weight.tolist() for w in row)
    total += lambda_h / 2 * sum(x**2 for row in features.tolist() for x in row)
    return total + (0 if bias is None else lambda_b / 2 * sum(b**2 for b in bias.tolist()))


@pytest.mark.parametrize("loss", ["mse", "ce"])
@pytest.mark.parametrize("lambda_b", [0.0, 0.3])
@pytest.mark.parametrize("with_bias", [True, False])
def test_value_is_problem_2(loss, lambda_b, with_bias, generator):
    weight, features = (torch.randn(s, dtype=torch.float64, generator=generator) for s in ((3, 4), (7, 4)))
    bias = torch.randn(3, dtype=torch.float64, generator=generator) if with_bias else None
    labels = torch.tensor([0, 2, 1, 1, 2, 0, 0])
    value = Objective(loss, 0.1, 0.02, lambda_b)(weight, features, labels, bias)
    # Both sums have about 100 terms of size 1: 1e-14 allows a round-off each.
    assert float(value) == pytest.approx(naive(loss, 0.1, 0.02, lambda_b, weight, features, labels, bias), rel=1e-14)


@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_batches_average_to_the_full_objective(loss, generator):
    weight, features = (torch.randn(s, dtype=torch.float64, generator=generator) for s in ((3, 4), (8, 4)))
    labels = torch.tensor([0, 2, 1, 1, 2, 0, 0, 1])
    objective = Objective(loss, 0.1, 0.02)
    parts = [
        objective.from_logits(h @ weight.T, weight, h, y, num_samples=8)
        for h, y in zip(features.split(4), labels.split(4), strict=True)
    ]
    assert float(sum(parts) / 2) == pytest.approx(float(objective(weight, features, labels)), rel=1e-14)


@pytest.mark.parametrize("loss", ["mse", "ce"])
@pytest.mark.parametrize("label", [-100, -1, 3])
def test_labels_out_of_range_raise(loss, label):
    with pytest.raises((RuntimeError, IndexError)):
        Objective(loss, 0.1, 0.1)(torch.zeros(3, 2), torch.zeros(2, 2), torch.tensor([0, label]))


@pytest.mark.parametrize("label", [-100, -1, 2])
@pytest.mark.parametrize("loss", [SquaredError(), CrossEntropy(), BinaryCrossEntropy()], ids=lambda x: x.short_name)
def test_labels_without_a_row_of_targets_raise(loss, label):
    objective = Objective(loss, 0.1, 0.1, targets=[[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    with pytest.raises((RuntimeError, IndexError)):
        objective(torch.zeros(3, 2), torch.zeros(2, 2), torch.tensor([0, label]))


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients_are_those_of_the_problem(name, generator):
    problem = CASES[name]()
    targets = None if problem.has_hard_labels else problem.targets
    objective = Objective(problem.loss, problem.lambda_w, problem.lambda_h, problem.lambda_b or 0.0, targets)
    labels = problem.labels()[torch.randperm(problem.num_samples, generator=generator)]
    K, d = problem.num_classes, problem.feature_dim
    shapes = [(K, d), (problem.num_samples, d), *([(K,)] if problem.has_bias else [])]
    leaves = [torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes]
    values = [f(leaves[0], leaves[1], labels, *leaves[2:]) for f in (objective, problem.value)]
    # Sums of some hundred terms of size 1, in another order.
    torch.testing.assert_close(*values, rtol=1e-14, atol=0)
    for one, other in zip(*(torch.autograd.grad(value, leaves) for value in values), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)


def test_objectives_are_equal_if_their_numbers_and_targets_are():
    loss, rows = CrossEntropy(), [[0.5, 0.5], [1.0, 0.0]]
    objective = Objective(loss, 0.1, 0.2, targets=rows)
    same = Objective(loss, 0.1, 0.2, targets=torch.tensor(rows))
    assert objective == same
    assert hash(objective) == hash(same)
    for other in (Objective(loss, 0.1, 0.2), Objective(loss, 0.1, 0.2, targets=rows[::-1]), Objective("ce", 0.1, 0.2)):
        assert objective != other
    assert Objective("ce", 0.1, 0.2) == Objective("ce", 0.1, 0.2) != Objective("ce", 0.1, 0.3)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_are_as_good(copied):
    objective = Objective(BinaryCrossEntropy(), 0.1, 0.2, targets=[[0.5, 0.5], [1.0, 0.0]])
    point = torch.ones(2, 3), torch.ones(2, 3), torch.tensor([0, 1])
    value = objective(*point)
    assert copied(objective)(*point) == value
    assert copied(Objective("mse", 0.1, 0.2)) == Objective("mse", 0.1, 0.2)


def test_targets_first_used_in_inference_mode_can_be_trained_on():
    objective = Objective(CrossEntropy(), 0.1, 0.2, targets=[[0.5, 0.5], [1.0, 0.0]])
    weight, features, labels = torch.ones(2, 3, requires_grad=True), torch.ones(2, 3), torch.tensor([0, 1])
    with torch.inference_mode():
        objective(weight, features, labels)
    objective(weight, features, labels).backward()
    assert weight.grad is not None


def test_targets_are_a_copy():
    rows = torch.eye(2)
    objective = Objective(SquaredError(), 0.1, 0.2, targets=rows)
    rows.zero_()
    assert torch.equal(objective.targets, torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept(dtype):
    value = Objective("ce", 0.1, 0.1)(torch.ones(3, 2, dtype=dtype), torch.ones(4, 2, dtype=dtype), torch.arange(4) % 3)
    assert value.dtype == dtype


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("hinge", 0.1, 0.1), "loss must be 'mse' or 'ce' or a Loss such as CrossEntropy\\(\\), got 'hinge'"),
        ((CrossEntropy, 0.1, 0.1), "loss must be 'mse' or 'ce' or a Loss such as CrossEntropy"),
        ((["mse"], 0.1, 0.1), r"loss must be 'mse' or 'ce' or a Loss such as CrossEntropy\(\), got \['mse'\]"),
        (("ce", 0.1, 0.1, 0.0, [[0.5, 0.6]]), "targets must be rows of probabilities"),
        (("mse", 0.1, 0.1, 0.0, [1.0, 2.0]), r"targets must be a finite matrix \(M, K\)"),
        (("mse", 0.1, 0.1, 0.0, [[math.nan]]), r"targets must be a finite matrix \(M, K\)"),
        (("mse", -0.1, 0.1), "lambda_w must be finite and non-negative"),
        (("mse", 0.1, math.nan), "lambda_h must be finite and non-negative"),
        (("mse", 0.1, 0.1, math.inf), "lambda_b must be finite and non-negative"),
    ],
)
def test_bad_options_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Objective(*arguments)


@pytest.mark.parametrize(
    ("weight", "features", "labels", "bias", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64), None, "same d"),
        (torch.zeros(3, 2), torch.zeros(4, 2), torch.zeros(5, dtype=torch.int64), None, "labels must be int64"),
        (torch.zeros(3, 2), torch.zeros(4, 2), torch.zeros(4), None, "labels must be int64"),
        (torch.zeros(3, 2), torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64), torch.zeros(2), "bias must have"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(weight, features, labels, bias, message):
    with pytest.raises(ValueError, match=message):
        Objective("mse", 0.1, 0.1)(weight, features, labels, bias)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        # A column for all outputs would be broadcast without a word, and so would one offset.
        (Objective("mse", 0.1, 0.1, targets=[[1.0], [2.0]]), r"targets must have a column for each of the 3 outputs"),
        (Objective(CrossEntropy([0.5]), 0.1, 0.1), "offset must hold a number for each of the 3 classes"),
        (Objective(CrossEntropy(None, [1.0]), 0.1, 0.1), "class_weights must hold a number for each of the 3 classes"),
    ],
)
def test_losses_and_targets_that_do_not_fit_the_head_are_refused(objective, message):
    with pytest.raises(ValueError, match=message):
        objective(torch.zeros(3, 2), torch.zeros(2, 2), torch.tensor([0, 1]))
