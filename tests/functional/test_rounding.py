"""What rounding of the features explains, and what it does not: real directions stay, spurious ones do not come in."""

import math

import pytest
import torch
from torch.nn.functional import layer_norm

from nclightning.functional import ClassStatistics, StatisticsBuffer, class_statistics
from nclightning.metrics.measures import MEASURES, MeasureInput
from tests.functional import multiprecision, oracle

EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)}


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def read(names, features, labels, K, weight=None):
    reading = MeasureInput(class_statistics(features, labels, K), weight)
    return {name: float(MEASURES[name].read(reading)) for name in names}


def epsilon(features):
    return float(class_statistics(features, torch.arange(len(features)) % 3, 3).epsilon)


# Noise of 17 and of 170 roundings of float32, in as many dimensions as there are samples to a few.
@pytest.mark.parametrize("noise", [2e-6, 2e-5])
def test_noise_of_some_roundings_explains_class_means(noise):
    K, d = 3, 9
    labels = torch.arange(13) % K
    data = (normal(K, d)[labels] + noise * normal(13, d, seed=1)).float(), labels, normal(K, d, seed=2), normal(K)
    names = ("nc1", "nc1_vci", "mse_nc1", "mse_nc2_nc3", "mse_perpendicular")
    expected = multiprecision.evaluate_all(names, data[0].double(), *data[1:])
    reading = MeasureInput(class_statistics(*data[:2], K), *data[2:])
    for name in names:
        assert float(MEASURES[name].read(reading)) == pytest.approx(expected[name], rel=1e-6, abs=0), name


def test_fewer_samples_than_dimensions_explain_all():
    labels = torch.arange(32) % 4
    features = (normal(4, 40)[labels] + 5e-6 * normal(32, 40, seed=1)).float()
    assert all(value < 1e-30 for value in read(["nc1_vci"], features, labels, 4).values())


def by_oracle(names, features, labels, weight):
    exact = oracle.Oracle(features.double(), labels, weight)
    return {name: oracle.MEASURES[name](exact) for name in names}


OF_MEANS = ("nc1", "nc1_ratio", "nc1_cdnv", "nc1_vci", "nc2_means", "nc2_equinorm_means", "nc3", "nc3_difference")


@pytest.mark.parametrize(
    ("dtype", "offset", "spread", "n"), [(torch.bfloat16, 10.0, 0.1, 500), (torch.float32, 1000.0, 1e-3, 250)]
)
def test_roundings_of_many_samples_average_out(dtype, offset, spread, n):
    """Class means differ by less than a rounding of a sample, and are known to far less."""
    K, d = 6, 8
    labels = torch.arange(n * K) % K
    within = 0.5 if dtype == torch.bfloat16 else 5e-3
    features = (offset + spread * normal(K, d)[labels] + within * normal(n * K, d, seed=1)).to(dtype)
    weight = normal(K, d, seed=2)
    values = read([*OF_MEANS, "nc1_rank"], features, labels, K, weight)
    assert values.pop("nc1_rank") == K - 1
    # The oracle's sums around the origin are rounded to 1e-12.
    assert values == pytest.approx(by_oracle(OF_MEANS, features, labels, weight), rel=1e-5)


def test_one_mean_in_the_centre_changes_no_measure_of_all_means():
    """Samples of a class are equal, so that nothing averages out; two means are within a rounding of the centre."""
    rows = 1 + EPS[torch.bfloat16] * torch.tensor([[3.0, 0.0], [0.0, 1.0], [-2.0, 0.0], [0.0, 0.0]])
    labels, weight = torch.arange(8) % 4, normal(4, 2)
    features = rows[labels].bfloat16()
    names = [name for name in OF_MEANS if name not in ("nc1", "nc1_vci", "nc1_cdnv", "nc1_ratio")]
    values = read([*names, "nc2_equiangularity_means", "gnc2_energy", "nc3_cosine"], features, labels, 4, weight)
    for name in ("nc2_equiangularity_means", "gnc2_energy", "nc3_cosine"):
        assert math.isnan(values.pop(name))
    assert values == pytest.approx(by_oracle(names, features, labels, weight), rel=1e-9)


def test_means_that_all_coincide_have_no_geometry():
    features = (1 + 0.3 * EPS[torch.bfloat16] * normal(4, 2)).bfloat16()[torch.arange(8) % 4]
    assert all(
        math.isnan(v) for v in read(["nc2_means", "nc2_equinorm_means"], features, torch.arange(8) % 4, 4).values()
    )


def confined(kind, K, d, n, noise, dtype, before):
    labels = torch.arange(K).repeat(n)
    rows = normal(K, d)[labels] + noise * normal(K * n, d, seed=1) + before
    if kind == "layer norm":
        return layer_norm(rows.to(dtype), (d,)), labels, d - 1
    if kind == "layer norm by hand":
        rows = rows.to(dtype) - rows.to(dtype).mean(dim=1, keepdim=True)
        return rows / rows.square().mean(dim=1, keepdim=True).sqrt(), labels, d - 1
    return rows[:, :2].to(dtype) @ normal(2, d, seed=2).to(dtype), labels, 2


@pytest.mark.parametrize(
    ("kind", "K", "d", "n", "noise", "dtype", "before"),
    [
        ("layer norm", 100, 64, 20, 1e-6, torch.float32, 10.0),  # Rounding is the same for all samples of a class.
        ("layer norm", 100, 64, 20, 1e-3, torch.float32, 40.0),
        ("layer norm", 10, 8, 20, 1e-7, torch.float32, 10.0),
        ("layer norm", 10, 8, 20, 1e-16, torch.float64, 10.0),
        ("layer norm by hand", 100, 64, 20, 1e-4, torch.bfloat16, 1.0),
        ("bottleneck", 10, 512, 2, 1e-5, torch.float32, 0.0),  # Many more dimensions than classes.
        ("bottleneck", 10, 512, 20, 1e-3, torch.bfloat16, 0.0),
    ],
)
def test_directions_of_rounding_do_not_count(kind, K, d, n, noise, dtype, before):
    features, labels, dims = confined(kind, K, d, n, noise, dtype, before)
    for each in (features, features.double()):
        value = read(["nc1_rank", "nc1"], each, labels, K)
        assert value["nc1_rank"] == min(K - 1, dims)
        assert value["nc1"] < 10 * max(noise, EPS[dtype]) ** 2 * dims * 1e3


def test_a_small_direction_of_the_means_still_counts_in_bfloat16():
    """The least spread of the means is 4 roundings, and well known by the many samples."""
    labels = torch.arange(2000) % 4
    means = torch.tensor([[1.0, 0, 0], [-1, 1, 0], [-1, -1, 0.06], [1, 0, -0.06]], dtype=torch.float64)
    features = (means[labels] + 0.05 * normal(2000, 3)).bfloat16()
    assert read(["nc1_rank"], features, labels, 4) == {"nc1_rank": 3}


def half_exact(rows, which):
    """Features of float32 of which some rows are numbers of bfloat16."""
    features = normal(rows, 6).float()
    return torch.where(which.unsqueeze(1), features.bfloat16().float(), features)


@pytest.mark.parametrize("pieces", [1, 2, 4, 40])
@pytest.mark.parametrize("which", ["first", "last", "every other", "all but the last"])
def test_rows_of_both_dtypes_show_the_finer_one_in_any_order(which, pieces):
    index = torch.arange(1280)
    chosen = {
        "first": index < 640,
        "last": index >= 640,
        "every other": index % 2 == 0,
        "all but the last": index < 1152,
    }[which]
    buffer = StatisticsBuffer(ClassStatistics.empty(3, 6))
    for rows, labels in zip(half_exact(1280, chosen).chunk(pieces), (index % 3).chunk(pieces), strict=True):
        buffer.add(rows, labels)
    assert float(buffer.statistics.epsilon) == EPS[torch.float32]
    assert float(buffer.statistics.folded.epsilon) == EPS[torch.float32]


def test_a_few_short_numbers_show_nothing():
    rows = torch.tensor([[1, 2**-9], [1, 2**-9], [1, 0], [1, 2**-10]])
    values = read(["nc1_ratio", "nc2_means"], rows.double(), torch.tensor([0, 0, 1, 1]), 2)
    assert values["nc1_ratio"] == pytest.approx(2 / 9, rel=1e-12)
    assert values["nc2_means"] == pytest.approx(0, abs=1e-15)


SHORT = {
    "integers": lambda: torch.randint(0, 256, (200, 6)),
    "signs": lambda: torch.randint(0, 2, (200, 6)) * 2 - 1,
    "shares": lambda: torch.randint(0, 9, (200, 6)) / 8,
    "one value": lambda: torch.full((200, 6), 200),
    "zeros": lambda: torch.zeros(200, 6),
}


@pytest.mark.parametrize("kind", SHORT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_short_numbers_show_no_narrower_dtype(kind, dtype):
    torch.manual_seed(0)
    assert epsilon(SHORT[kind]().to(dtype)) == EPS[dtype]


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("offset", "scale"), [(0, 1), (12, 1), (3, 0.4), (0.75, 0.1), (0, 3e-5), (0, 1e-6)])
def test_numbers_within_few_binades_show_their_dtype(offset, scale, narrow, wide):
    """Numbers of one binade are all multiples of one step, and subnormal ones of the least."""
    labels = torch.arange(800) % 8
    rows = layer_norm(normal(8, 4)[labels] + 0.3 * normal(800, 4, seed=1), (4,))
    features = (offset + scale * rows).to(narrow)
    for each in (features, features.to(wide)):
        value = read(["nc1_rank", "nc1"], each, labels, 8)
        assert value["nc1_rank"] == 3
        assert value["nc1"] == pytest.approx(read(["nc1"], rows, labels, 8)["nc1"], rel=0.02)
    assert epsilon(features.to(wide)) == EPS[narrow]
