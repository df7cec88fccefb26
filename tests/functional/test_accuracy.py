"""How many digits are right: against many digits on drawn shapes, and against single precision's own limit."""

import math

import pytest
import torch

from nclightning.functional import class_statistics
from nclightning.metrics.measures import MEASURES, Reading
from tests.functional import multiprecision, oracle

DRAWS = range(24)
NOISES = (1e-1, 1e-3, 1e-5, 1e-8)


def draw(seed, noise):
    """Class means of norms from 1 to 1000, all shifted by 100 times the spread of the unit class."""
    generator = torch.Generator().manual_seed(seed)
    between = lambda low, high: int(torch.randint(low, high + 1, (), generator=generator))  # noqa: E731
    K, d, n = between(2, 6), between(1, 10), between(1, 8)
    normal = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    directions = torch.nn.functional.normalize(normal(K, d), dim=1)
    means = directions * torch.logspace(0, 3, K, dtype=torch.float64)[:, None]
    labels = torch.arange(K * n) % K
    return means[labels] + noise * normal(K * n, d) + 100 * normal(d), labels, normal(K, d), normal(K)


def read(name, features, labels, weight, bias):
    stats = class_statistics(features, labels, len(weight))
    return float(MEASURES[name].read(Reading(stats, weight, bias)))


@pytest.mark.slow
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("name", multiprecision.MEASURES)
def test_float64_to_nine_digits(name, noise):
    for seed in DRAWS:
        data = draw(seed, noise)
        expected = multiprecision.evaluate(name, *data)
        # Below 1e-13 a measure that sums K^2 entries of size 1 is its own rounding.
        assert read(name, *data) == pytest.approx(expected, rel=1e-9, abs=1e-13 if name > "nc2" else 0), seed


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("name", multiprecision.MEASURES)
def test_float32_features_to_nine_digits_of_what_they_hold(name, noise):
    for seed in DRAWS:
        features, *rest = draw(seed, noise)
        single = features.float()
        expected = multiprecision.evaluate(name, single.double(), *rest)
        assert read(name, single, *rest) == pytest.approx(expected, rel=1e-9, abs=1e-13 if name > "nc2" else 0), seed


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("name", multiprecision.MEASURES)
def test_float32_features_to_four_digits_where_their_rounding_allows(name, noise):
    """Rounding to float32 moves each entry by up to eps/2 of its size, here up to 1000 + 300.

    Where it is a share ``limit`` of the noise, NC1 is right to ten times that share; from 1 on it reads the rounding.
    """
    for seed in DRAWS:
        features, *rest = draw(seed, noise)
        limit = float(features.abs().max()) * 2**-24 / noise
        if name.startswith("nc1") and limit > 1e-5:
            continue
        expected = read(name, features, *rest)
        assert read(name, features.float(), *rest) == pytest.approx(
            expected, rel=1e-4, abs=1e-4 if name > "nc2" else 0
        ), seed


@pytest.mark.parametrize("name", multiprecision.MEASURES)
def test_bfloat16_features_are_read_as_they_are(name):
    for seed in DRAWS:
        features, *rest = draw(seed, 0.1)
        half = features.bfloat16()
        value = read(name, half, *rest)
        assert math.isfinite(value)
        assert value == pytest.approx(read(name, half.double(), *rest), rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("K", "d", "n"), [(200, 40, 3), (200, 2048, 2), (20, 2048, 5), (50, 300, 100), (100, 99, 10)])
@pytest.mark.parametrize("name", ["nc1", "nc1_ratio", "nc2_means", "nc3", "nc3_difference", "bias_collapse"])
def test_wide_layers_and_many_classes(name, K, d, n):
    generator = torch.Generator().manual_seed(K + d)
    normal = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    labels = torch.arange(K * n) % K
    data = normal(K, d)[labels] + 0.1 * normal(K * n, d), labels, normal(K, d), normal(K)
    expected = oracle.MEASURES[name](oracle.Oracle(*data))
    # The oracle's covariance squares the condition number of the means, at most 1e5 here (K = d + 1).
    assert read(name, *data) == pytest.approx(expected, rel=1e-9)
