"""Statistics that keep their samples instead of forming the scatter: never another value, never another's data."""

import math
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nclightning.functional import (
    ClassStatistics,
    StatisticsBuffer,
    class_statistics,
    samples,
    statistics,
    variability_collapse_index,
    within_class_variability,
)
from nclightning.metrics import NeuralCollapse

K, D = 4, 40


def data(generator, N=90, spread=1.0, dtype=torch.float64):
    labels = torch.randint(K, (N,), generator=generator)
    centres = 10 * torch.randn(K, D, dtype=torch.float64, generator=generator)
    noise = spread * torch.randn(N, D, dtype=torch.float64, generator=generator)
    return (centres[labels] + noise).to(dtype), labels


def collect(batches, dtype=torch.float64):
    buffer = StatisticsBuffer(ClassStatistics.empty(K, D, dtype))
    for features, labels in batches:
        buffer.add(features, labels)
    return buffer.statistics


def by_loop(features, labels, direction):
    total = 0.0
    for k in range(K):
        rows = features[labels == k].double()
        total += float((((rows - rows.mean(0)) @ direction) ** 2).sum()) if len(rows) else 0.0
    return total


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [1.0, 1e-6])
def test_spread_along_is_that_of_a_loop(spread, dtype, generator):
    features, labels = data(generator, spread=spread, dtype=dtype)
    directions = torch.randn(3, D, dtype=torch.float64, generator=generator)
    stats = class_statistics(features, labels, K)
    assert not stats.kept.is_empty
    assert stats.totals.root.shape == (0, D)
    expected = torch.tensor([by_loop(features, labels, v) for v in directions], dtype=torch.float64)
    # The loop's means are rounded at 1e-15 of features of size 10, against deviations of 1e-6.
    torch.testing.assert_close(stats.spread_along(directions), expected, rtol=1e-8, atol=0)
    torch.testing.assert_close(stats.folded.spread_along(directions), expected, rtol=1e-8, atol=0)
    assert stats.folded.kept.is_empty
    assert stats.folded.totals.root.shape == (D, D)


@pytest.mark.parametrize("most", [0, 1, 128])
def test_the_limit_on_samples_changes_no_value(most, generator, monkeypatch):
    features, labels = data(generator)
    expected = within_class_variability(class_statistics(features, labels, K))
    monkeypatch.setattr(samples, "_KEPT_PER_DIM", most)
    monkeypatch.setattr(samples, "_FEW_BYTES", 0)
    stats = collect(zip(features.split(30), labels.split(30), strict=True))
    assert stats.kept.is_empty == (most == 0)
    torch.testing.assert_close(within_class_variability(stats), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("folded", [(), (0,), (1,), (0, 1)])
def test_merging_is_of_all_samples_kept_or_folded(folded, generator):
    features, labels = data(generator)
    parts = [class_statistics(features[:50], labels[:50], K), class_statistics(features[50:], labels[50:], K)]
    for part in folded:
        parts[part] = parts[part].folded
    merged = parts[0].merge(parts[1])
    assert merged.kept.is_empty == (len(folded) == 2)
    whole = class_statistics(features, labels, K)
    torch.testing.assert_close(merged.scatter, whole.scatter, rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(within_class_variability(merged), within_class_variability(whole), rtol=1e-12, atol=0)


def test_exact_collapse_is_zero(generator):
    centres = torch.randn(K, D, dtype=torch.float64, generator=generator) + 1e3
    labels = torch.arange(21) % K
    stats = collect((centres[part], part) for part in labels.split(7))
    assert not stats.kept.is_empty
    assert within_class_variability(stats) == 0
    assert stats.scatter.abs().max() == 0


def test_samples_left_out_may_hold_anything(generator):
    features, labels = data(generator)
    expected = class_statistics(features, labels, K)
    spoiled = torch.cat([features, torch.full((2, D), torch.nan, dtype=features.dtype)])
    stats = class_statistics(spoiled, torch.cat([labels, torch.tensor([-100, 99])]), K, ignore_index=-100)
    assert stats.num_invalid == 1
    # Rows more change the blocks of the products, and so the order of sums.
    torch.testing.assert_close(stats.scatter, expected.scatter, rtol=1e-13, atol=1e-12)
    torch.testing.assert_close(within_class_variability(stats), within_class_variability(expected), rtol=1e-13, atol=0)


def test_the_callers_tensors_may_change_afterwards(generator):
    features, labels = data(generator)
    metric = NeuralCollapse(K, D)
    metric.update(features, labels)
    expected = metric.read(metric.statistics)["nc1"]
    features.zero_()
    labels.zero_()
    assert metric.compute()["nc1"] == expected


def test_statistics_outlive_a_reset(generator):
    metric = NeuralCollapse(K, D)
    metric.update(*data(generator))
    stats = metric.statistics
    expected = metric.compute()["nc1"]
    metric.reset()
    assert not metric.kept
    assert metric.root.shape == (0, D)
    assert within_class_variability(stats) == expected


def test_no_host_transfer():
    """Fake CUDA tensors raise on a host sync and on a mix of devices."""
    with FakeTensorMode():
        buffer = StatisticsBuffer(ClassStatistics.empty(K, D, device="cuda"))
        for _ in range(2):
            buffer.add(torch.empty(8, D, device="cuda"), torch.zeros(8, dtype=torch.int64, device="cuda"))
        stats = buffer.statistics
        assert not stats.kept.is_empty
        assert within_class_variability(stats).device.type == "cuda"
        assert stats.scatter.device.type == "cuda"
        buffer.fold()
        assert buffer.statistics.scatter.device.type == "cuda"


def test_compute_reads_the_samples_themselves(generator, monkeypatch):
    """The scatter, which is what costs, is formed for other processes only."""
    metric = NeuralCollapse(K, D)
    metric.update(*data(generator))
    monkeypatch.setattr(statistics, "triangular_factor", lambda *_: pytest.fail("the scatter was formed"))
    assert metric.compute()["nc1"] > 0
    assert metric.kept


def test_folding_one_does_not_empty_another(generator):
    """Metrics of a collection share states, and each is folded for itself."""
    stats = class_statistics(*data(generator), K)
    buffer, twin = StatisticsBuffer(stats), StatisticsBuffer(stats)
    buffer.fold()
    assert not twin.kept.is_empty
    assert torch.equal(twin.statistics.scatter, buffer.statistics.scatter)


READINGS = {
    "counts": lambda s: s.counts,
    "means": lambda s: s.means,
    "norms": lambda s: s.norms,
    "widths": lambda s: s.widths,
    "root": lambda s: s.root,
    "centred_means": lambda s: s.centred_means,
    "along": lambda s: s.norms_along(torch.eye(D, dtype=torch.float64)),
    "nc1": within_class_variability,
    "vci": variability_collapse_index,
}


@pytest.mark.parametrize("first", READINGS)
def test_what_is_read_first_changes_nothing(first, generator):
    """Reading the scatter once made later readings come from it, with other roundings."""
    stats = class_statistics(*data(generator), K)
    READINGS[first](stats)
    for name, read in READINGS.items():
        assert torch.equal(read(stats), read(replace(stats))), name


def test_statistics_are_a_value(generator):
    stats = class_statistics(*data(generator), K)
    with pytest.raises(FrozenInstanceError):
        stats.num_invalid = torch.zeros(())
    with pytest.raises(FrozenInstanceError):
        stats.kept.features = ()
    before = {name: read(stats).clone() for name, read in READINGS.items()}
    buffer = StatisticsBuffer(stats)
    buffer.add(*data(generator))
    buffer.fold()
    buffer.add(*data(generator))
    stats.merge(buffer.statistics)
    for name, read in READINGS.items():
        assert torch.equal(read(stats), before[name]), name
        assert torch.equal(read(replace(stats)), before[name]), name


@pytest.mark.parametrize("light", [False, True])
def test_a_pass_over_the_samples_is_made_once(light, generator, monkeypatch):
    """Those of all measures: the means, and the spread that comes with the spread along their directions."""
    passes, own = [], samples.Samples.rows
    monkeypatch.setattr(samples.Samples, "rows", lambda *args: passes.append(1) or own(*args))
    stats = class_statistics(*data(generator, dtype=torch.float32), K, scatter=not light)
    if not light:
        within_class_variability(stats)
    for name in ("norms", "widths", "counts", "means", "centred_means", "mean_offsets"):
        getattr(stats, name)
    assert len(passes) == 2


def test_the_scatter_is_formed_once(generator, monkeypatch):
    stats, formed = class_statistics(*data(generator), K), []
    own = statistics.triangular_factor
    monkeypatch.setattr(statistics, "triangular_factor", lambda parts: formed.append(1) or own(parts))
    assert torch.equal(stats.scatter, stats.scatter)
    assert formed == [1]


def test_empty_batches_are_not_kept(generator):
    metric = NeuralCollapse(K, D)
    metric.update(*data(generator))
    pieces = len(metric.kept)
    for _ in range(3):
        metric.update(torch.zeros(0, D), torch.zeros(0, dtype=torch.int64))
    assert len(metric.kept) == pieces


def test_few_bytes_are_kept_however_many_rows(generator, monkeypatch):
    features, labels = data(generator)
    expected = within_class_variability(class_statistics(features, labels, K))
    monkeypatch.setattr(samples, "_KEPT_PER_DIM", 0)
    for kept in (True, False):
        stats = collect(zip(features.split(45), labels.split(45), strict=True))
        assert stats.kept.is_empty != kept
        torch.testing.assert_close(within_class_variability(stats), expected, rtol=1e-12, atol=0)
        monkeypatch.setattr(samples, "_FEW_BYTES", 0)


@pytest.mark.parametrize("sizes", [[1] * 500, [1, 2, 3] * 80, [300, 1, 1, 100, 7] * 5])
def test_small_pieces_are_put_together(sizes, generator):
    """So many pieces would make each update cost more than the last."""
    features, labels = data(generator, sum(sizes))
    buffer, most = StatisticsBuffer(ClassStatistics.empty(K, D)), 0
    for h, y in zip(features.split(sizes), labels.split(sizes), strict=True):
        buffer.add(h, y)
        most = max(most, len(buffer.kept.features))
    assert most <= 2 + math.log2(sum(sizes))
    assert torch.equal(torch.cat(buffer.kept.features), features)
    assert torch.equal(torch.cat(buffer.kept.labels), labels)


@pytest.mark.parametrize(
    ("features_dtype", "dtype"),
    [
        *((dtype, torch.float64) for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)),
        *((dtype, torch.float32) for dtype in (torch.bfloat16, torch.float16, torch.float32)),
    ],
)
def test_exact_collapse_has_no_spread_in_any_dtype(features_dtype, dtype, generator):
    """The mean of equal numbers must be that number, whether or not their sum is rounded."""
    centres = (100 * torch.randn(K, D, generator=generator, dtype=torch.float64)).to(features_dtype)
    labels = torch.randint(K, (20_000,), generator=generator)
    stats = collect(((centres[part], part) for part in (labels[:7], labels[7:])), dtype)
    assert not stats.kept.is_empty
    assert torch.equal(stats.means, centres.to(dtype))
    assert not stats.spreads.any()
    assert not stats.spread_along(torch.eye(D, dtype=dtype)).any()
