"""How many digits are right: every measure against sixty digits on one grid, and NC1 where other spread dominates."""

import math

import pytest
import torch

from nclightning.functional import ClassStatistics, StatisticsBuffer, class_statistics, within_class_variability
from nclightning.metrics.measures import MEASURES, MeasureInput
from tests.functional import multiprecision, oracle

NAMES = tuple(multiprecision.MEASURES)
BALANCED, UNBALANCED, ABSENT = (5, 5, 5, 5), (9, 1, 4, 7), (3, 0, 5, 2, 2)
# What confines features to fewer dimensions than they have coordinates.
CONFINED = ("hyperplane", "bottleneck", "duplicates", "dead")


def draw(structure, dtype=torch.float64, offset=0.0, scale=1.0, counts=BALANCED, noise=1e-3, seed=1):
    """Class means of norms from 1 to 10 with noise; returns data and the dimensions that they are confined to."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    K, d = len(counts), 6
    labels = torch.repeat_interleave(torch.arange(K), torch.tensor(counts))
    means = normal(K, d) * torch.logspace(0, 1, K, dtype=torch.float64)[:, None]
    x, dims = (means[labels] + noise * normal(len(labels), d)).to(dtype), d
    if structure == "hyperplane":
        x, dims = torch.nn.functional.layer_norm(x, (d,)), d - 1
    elif structure == "bottleneck":
        x, dims = x[:, :2] @ normal(2, d).to(dtype), 2
    elif structure in ("duplicates", "dead"):
        x = torch.cat([x, x[:, :2] if structure == "duplicates" else 0 * x[:, :2]], dim=1)
    x = ((x.double() + offset) * scale).to(dtype)
    order = torch.randperm(len(labels), generator=generator)
    return (x[order], labels[order], normal(K, x.shape[1]) / scale, normal(K)), dims


# Offsets with float64 only: beside 1000, float32 rounds the noise away. Half precision needs noise that it can hold.
GRID = [
    dict(structure=structure, counts=counts, **rest)
    for structure in ("full", *CONFINED)
    for counts in (BALANCED, UNBALANCED, ABSENT)
    for rest in (
        *({"noise": noise, "offset": offset} for noise in (1.0, 1e-3, 1e-6, 1e-9) for offset in (0.0, 1e3)),
        {"scale": 1e-150},
        {"scale": 1e150},
        {"noise": 1.0, "dtype": torch.float32},
        {"noise": 1e-3, "dtype": torch.float32},
        {"noise": 1.0, "dtype": torch.bfloat16},
    )
]


@pytest.mark.slow
def test_every_measure_to_nine_digits():
    wrong = []
    for case in GRID:
        data, dims = draw(**case)
        features, *rest = data
        expected = multiprecision.evaluate_all(NAMES, features.double(), *rest, dims=dims)
        kept = class_statistics(features, data[1], len(case["counts"]))
        for stats in (kept, kept.folded):
            reading = MeasureInput(stats, *rest[1:])
            for name, right in expected.items():
                value = float(MEASURES[name].read(reading))
                # The printed VCI takes the rounding of confined features for spread; that squared is its error.
                rough = name == "nc1_vci" and case["structure"] in CONFINED
                rel = max(1e-9, torch.finfo(features.dtype).eps ** 2 if rough else 0)
                if value != pytest.approx(right, rel=rel, abs=0):
                    wrong.append((name, value, right, stats is kept, case))
    assert not wrong


@pytest.mark.parametrize("structure", ["full", *CONFINED])
@pytest.mark.parametrize("counts", [BALANCED, ABSENT])
def test_features_of_narrow_dtypes_cast_to_wide_ones_keep_their_rounding(structure, counts):
    """Users cast before they measure; the rounding stays."""
    for narrow, wide in (
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float64),
        (torch.float16, torch.float64),
    ):
        (features, labels, *_), dims = draw(structure, narrow, counts=tuple(8 * n for n in counts), noise=0.3)
        stats = class_statistics(features.to(wide), labels, len(counts))
        assert float(stats.epsilon) == torch.finfo(narrow).eps
        rank = MEASURES["nc1_rank"].read(MeasureInput(stats))
        assert int(rank) == min(dims, sum(n > 0 for n in counts) - 1)


@pytest.mark.parametrize("features", [torch.arange(12.0), torch.eye(4)[:, :3].flatten(), torch.full((12,), 200.0)])
def test_numbers_on_a_grid_show_no_rounding(features):
    stats = class_statistics(features.double().reshape(4, 3), torch.tensor([0, 0, 1, 1]), 2)
    assert float(stats.epsilon) == torch.finfo(torch.float64).eps


def test_class_means_whose_norms_differ_a_thousandfold_keep_their_rank_in_float32():
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        directions = torch.nn.functional.normalize(torch.randn(6, 10, generator=generator), dim=1)
        labels = torch.arange(60) % 6
        features = (directions * torch.logspace(0, 3, 6)[:, None])[labels] + 1e-2 * torch.randn(
            60, 10, generator=generator
        )
        reading = MeasureInput(class_statistics(features, labels, 6))
        assert int(MEASURES["nc1_rank"].read(reading)) == 5
        expected = multiprecision.evaluate("nc1", features.double(), labels, torch.ones(6, 10), torch.ones(6))
        assert float(MEASURES["nc1"].read(reading)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("before", [0.0, 10.0])
def test_nc1_behind_a_layer_norm(dtype, before, generator):
    """The last of min(K - 1, d) directions is orthogonal to the hyperplane: there round-off would be divided by it."""
    K, d, n = 200, 64, 100
    labels = torch.arange(K).repeat(n)
    rows = torch.randn(K, d, generator=generator)[labels] + 0.003 * torch.randn(K * n, d, generator=generator)
    features = torch.nn.functional.layer_norm((rows + before).to(dtype), (d,))
    covariance = oracle.Oracle(features, labels, torch.ones(K, d))
    # The pseudo-inverse by NumPy, with the null direction of the hyperplane cut off.
    right = (
        float((covariance.within * torch.linalg.pinv(torch.tensor(covariance.between()), rtol=1e-9).numpy()).sum()) / K
    )
    for stats in (class_statistics(features, labels, K), class_statistics(features, labels, K).folded):
        assert float(within_class_variability(stats)) == pytest.approx(right, rel=1e-6)
        assert int(MEASURES["nc1_rank"].read(MeasureInput(stats))) == d - 1


def test_large_coordinates_hide_no_direction_in_the_others(generator):
    """A unit that is far larger than all others, as in language models, rounds itself only."""
    labels = torch.arange(80) % 4
    features = torch.randn(4, 8, generator=generator)[labels] + 0.1 * torch.randn(80, 8, generator=generator)
    features = torch.cat([features, torch.full((80, 1), 1e4)], dim=1).bfloat16()
    assert int(MEASURES["nc1_rank"].read(MeasureInput(class_statistics(features, labels, 4)))) == 3


def spread_elsewhere(ratio, N=60, K=3, d=5, seed=0, along=1e-6):
    """Class means of size 1; noise along them, and ``ratio`` times as much orthogonal to them, rotated."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    labels = torch.arange(N) % K
    size = torch.cat([torch.full((K - 1,), along), torch.full((d - K + 1,), along * ratio)]).double()
    means = torch.zeros(K, d, dtype=torch.float64)
    means[:, : K - 1] = normal(K, K - 1)
    noise = normal(N, d) * size
    for k in range(K):  # Else the means of the noise would turn the means of the classes towards it.
        noise[labels == k] -= noise[labels == k].mean(dim=0)
    return (means[labels] + noise) @ torch.linalg.qr(normal(d, d)).Q, labels


WAYS = {
    "kept": lambda x, y: class_statistics(x, y, 3),
    "folded": lambda x, y: class_statistics(x, y, 3).folded,
    "many folded batches": lambda x, y: _stream(x, y, fold=True),
    "many kept batches": lambda x, y: _stream(x, y, fold=False),
    "two processes": lambda x, y: class_statistics(x[:41], y[:41], 3).folded.merge(class_statistics(x[41:], y[41:], 3)),
    "a tree of merges": lambda x, y: _tree(
        [class_statistics(h, z, 3).folded for h, z in zip(x.split(7), y.split(7), strict=True)]
    ),
}


def _stream(x, y, fold):
    buffer = StatisticsBuffer(ClassStatistics.empty(3, x.shape[1]))
    for h, z in zip(x.split(4), y.split(4), strict=True):
        buffer.add(h, z)
        if fold:
            buffer.fold()
    return buffer.statistics


def _tree(parts):
    while len(parts) > 1:
        parts = [a.merge(b) for a, b in zip(parts[::2], parts[1::2], strict=False)] + parts[len(parts) // 2 * 2 :]
    return parts[0]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ratio", [10.0**k for k in range(0, 11, 2)])
@pytest.mark.parametrize("along", [1e-6, 1e-11])
def test_nc1_where_spread_orthogonal_to_the_class_means_dominates(way, ratio, along):
    """Along the class means the spread is right to the rounding of the other one."""
    for seed in range(3):
        features, labels = spread_elsewhere(ratio, seed=seed, along=along)
        right = multiprecision.evaluate("nc1", features, labels, torch.ones(3, 5), torch.ones(3))
        value = float(within_class_variability(WAYS[way](features, labels)))
        assert value == pytest.approx(right, rel=1e-9 + 64 * 2.3e-16 * ratio)


def test_four_samples_whose_scatter_cancels():
    rows = [[1 + 1e-11, 1e-2], [1 - 1e-11, -1e-2], [-1 + 1e-11, 1e-2], [-1 - 1e-11, -1e-2]]
    turn = [[math.cos(1), -math.sin(1)], [math.sin(1), math.cos(1)]]
    features = torch.tensor(rows, dtype=torch.float64) @ torch.tensor(turn, dtype=torch.float64).T
    labels = torch.tensor([0, 0, 1, 1])
    right = multiprecision.evaluate("nc1", features, labels, torch.ones(2, 2), torch.ones(2))
    assert right == pytest.approx(5e-23, rel=1e-3)
    for stats in (class_statistics(features, labels, 2), class_statistics(features, labels, 2).folded):
        assert float(within_class_variability(stats)) == pytest.approx(right, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("K", "d", "n"), [(200, 40, 3), (200, 2048, 2), (20, 2048, 5), (50, 300, 100), (100, 99, 10)])
def test_wide_layers_and_many_classes(K, d, n):
    generator = torch.Generator().manual_seed(K + d)
    normal = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    labels = torch.arange(K * n) % K
    data = normal(K, d)[labels] + 0.1 * normal(K * n, d), labels, normal(K, d), normal(K)
    exact, reading = oracle.Oracle(*data), MeasureInput(class_statistics(*data[:2], K), *data[2:])
    for name in ("nc1", "nc1_ratio", "nc2_means", "nc3", "nc3_difference", "bias_collapse"):
        # The oracle's covariance squares the condition number of the means, at most 1e5 here (K = d + 1).
        expected = pytest.approx(oracle.MEASURES[name](exact), rel=1e-9)
        assert float(MEASURES[name].read(reading)) == expected, name
