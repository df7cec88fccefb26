"""Features and heads of sizes whose squares leave the range of their dtype."""

import math

import pytest
import torch

from nclightning.functional import class_statistics
from nclightning.functional.linear import invertible_power_of_two, power_of_two, product
from nclightning.metrics import MEASURES, NearestClassCentre, NeuralCollapse

# Powers of the scale of features and of head to which a value is proportional, without a bias; else it is scale-free.
POWERS = {"nc0": (0, 1), "bias_collapse": (1, 1), "mean_norm": (1, 0), "head_norm": (0, 1), "variance": (2, 0)}
SIZES = {"fewer classes than dimensions": (5, 12), "more": (30, 6)}
DTYPES = [(torch.float64, torch.float64), (torch.float32, torch.float64), (torch.float32, torch.float32)]
EXPONENTS = {torch.float64: 664, torch.float32: 100}  # 2^664 = 8e199, 2^100 = 1e30.


def draw(K, d, dtype):
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(K, d, generator=generator, dtype=torch.float64)
    labels = torch.arange(20 * K) % K
    noise = torch.randn(20 * K, d, generator=generator, dtype=torch.float64)
    weight = means - means.mean(0) + 0.1 * torch.randn(K, d, generator=generator, dtype=torch.float64)
    bias = 0.1 * torch.randn(K, generator=generator, dtype=torch.float64)
    return (means[labels] + 0.1 * noise).to(dtype), labels, weight.to(dtype), bias.to(dtype)


def read(features, labels, head, dtype, folded):
    weight = head if isinstance(head, torch.Tensor) else head[0]
    metric = NeuralCollapse(*weight.shape, head, ("all",), dtype=dtype)
    for rows, own in zip(features.split(30), labels.split(30), strict=True):
        metric.update(rows, own)
    if folded:
        metric._fold()
    decisions = NearestClassCentre(metric.statistics, head)
    decisions.update(features, labels)
    per_class = {name: value.sum() for name, value in metric.per_class().items()}
    return {name: float(value) for name, value in (metric.compute() | decisions.compute() | per_class).items()}


@pytest.mark.parametrize("sign", [1, -1], ids=["huge", "tiny"])
@pytest.mark.parametrize("which", ["features", "head", "both"])
@pytest.mark.parametrize("folded", [False, True], ids=["kept", "folded"])
@pytest.mark.parametrize(("given", "dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_values_of_scaled_features_and_heads(size, given, dtype, folded, which, sign):
    features, labels, weight, _ = draw(*SIZES[size], given)
    scale = 2.0 ** (sign * EXPONENTS[given])
    scales = (scale if which != "head" else 1.0), (scale if which != "features" else 1.0)
    plain = read(features, labels, weight, dtype, folded)
    scaled = read(scales[0] * features, labels, scales[1] * weight, dtype, folded)
    assert plain.keys() == scaled.keys() >= MEASURES.keys()
    for name, value in plain.items():
        if name == "mse_perpendicular":  # It compares with a loss of a scale of its own.
            assert not math.isnan(scaled[name])
            continue
        expected = value
        for base, power in zip(scales, POWERS.get(name, (0, 0)), strict=True):
            expected = float(torch.tensor(expected, dtype=dtype) * torch.tensor(base, dtype=dtype) ** power)
        assert scaled[name] == pytest.approx(expected, rel=1e-11 if dtype == torch.float64 else 1e-4), name


@pytest.mark.parametrize("sign", [1, -1], ids=["huge features", "huge head"])
@pytest.mark.parametrize("size", SIZES)
def test_a_scale_that_only_moves_between_features_and_head(size, sign):
    features, labels, weight, bias = draw(*SIZES[size], torch.float64)
    scale = 2.0 ** (664 * sign)
    plain = read(features, labels, (weight, bias), torch.float64, False)
    moved = read(scale * features, labels, (weight / scale, bias), torch.float64, False)
    for name in [*(MEASURES.keys() - {"nc0"}), "accuracy", "ncc_mismatch"]:
        assert moved[name] == pytest.approx(plain[name], rel=1e-10), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_unit_and_its_inverse_are_finite(dtype):
    info = torch.finfo(dtype)
    for size in (info.max, 1.0, 1.5, info.tiny, info.tiny * info.eps):
        values = torch.tensor([0.0, -size], dtype=dtype)
        for unit in (power_of_two(values), invertible_power_of_two(values)):
            assert unit.isfinite()
            assert unit.log2().frac() == 0
        assert (1 / unit).isfinite()
    assert all(float(power_of_two(torch.tensor(v, dtype=dtype))) == 1 for v in (0.0, math.inf, math.nan))


def test_features_below_the_normal_numbers():
    features, labels, *_ = draw(5, 12, torch.float64)
    stats = class_statistics((2.0**-1040 * features), labels, 5)
    assert float(stats.norms.sum() / class_statistics(features, labels, 5).norms.sum()) == pytest.approx(
        2.0**-1040, rel=1e-8
    )


@pytest.mark.parametrize("scales", [(1e200, 1e200), (1e-200, 1e-200), (1e200, 1e-200), (3.0, 5.0)])
def test_products_that_are_added_to_others(scales):
    a, b = (torch.full((1, 2), scale, dtype=torch.float64) for scale in scales)
    c = 0.25
    products, own, other = product(a, b)
    assert float((own * products + other * c) / other) == pytest.approx(2 * scales[0] * scales[1] + c, rel=1e-14)
