"""Problem (2): against sums written out, and its refusals."""

import math

import pytest
import torch

from nclightning.objective import Objective


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept(dtype):
    value = Objective("ce", 0.1, 0.1)(torch.ones(3, 2, dtype=dtype), torch.ones(4, 2, dtype=dtype), torch.arange(4) % 3)
    assert value.dtype == dtype


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("hinge", 0.1, 0.1), "loss must be 'mse' or 'ce' or a Loss such as CrossEntropy\\(\\), got 'hinge'"),
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
