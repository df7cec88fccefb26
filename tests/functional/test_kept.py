"""Statistics that keep their samples instead of forming the scatter: never another value, never another's data."""

import math
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nclightning.functional import ClassStatistics, class_statistics, samples, statistics, within_class_variability
from nclightning.metrics import NeuralCollapse

K, D = 4, 40


def data(generator, N=90, spread=1.0, dtype=torch.float64):
    labels = torch.randint(K, (N,), generator=generator)
    centres = 10 * torch.randn(K, D, dtype=torch.float64, generator=generator)
    noise = spread * torch.randn(N, D, dtype=torch.float64, generator=generator)
    return (centres[labels] + noise).to(dtype), labels


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
    assert stats.kept
    assert stats.folded.root.shape == (0, D)
    expected = torch.tensor([by_loop(features, labels, v) for v in directions], dtype=torch.float64)
    # The loop's means are rounded at 1e-15 of features of size 10, against deviations of 1e-6.
    torch.testing.assert_close(stats.spread_along(directions), expected, rtol=1e-8, atol=0)
    torch.testing.assert_close(stats.fold_().spread_along(directions), expected, rtol=1e-8, atol=0)
    assert not stats.kept
    assert stats.folded.root.shape == (D, D)


@pytest.mark.parametrize("most", [0, 1, 128])
def test_the_limit_on_samples_changes_no_value(most, generator, monkeypatch):
    features, labels = data(generator)
    expected = within_class_variability(class_statistics(features, labels, K))
    monkeypatch.setattr(samples, "_KEPT_PER_DIM", most)
    monkeypatch.setattr(samples, "_FEW_BYTES", 0)
    stats = ClassStatistics.empty(K, D)
    for h, y in zip(features.split(30), labels.split(30), strict=True):
        stats.add_(h, y)
    assert bool(stats.kept) == (most > 0)
    torch.testing.assert_close(within_class_variability(stats), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("folded", [(), (0,), (1,), (0, 1)])
def test_merging_leaves_both_as_they_are(folded, generator):
    features, labels = data(generator)
    parts = [class_statistics(features[:50], labels[:50], K), class_statistics(features[50:], labels[50:], K)]
    for part in folded:
        parts[part].fold_()
    sizes = [len(part.kept) for part in parts]
    merged = parts[0].merge(parts[1])
    assert [len(part.kept) for part in parts] == sizes
    assert bool(merged.kept) == (len(folded) < 2)
    whole = class_statistics(features, labels, K)
    torch.testing.assert_close(merged.scatter, whole.scatter, rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(within_class_variability(merged), within_class_variability(whole), rtol=1e-12, atol=0)


def test_exact_collapse_is_zero(generator):
    centres = torch.randn(K, D, dtype=torch.float64, generator=generator) + 1e3
    labels = torch.arange(21) % K
    stats = ClassStatistics.empty(K, D)
    for part in labels.split(7):
        stats.add_(centres[part], part)
    assert stats.kept
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
        stats = ClassStatistics.empty(K, D, device="cuda")
        for _ in range(2):
            stats.add_(torch.empty(8, D, device="cuda"), torch.zeros(8, dtype=torch.int64, device="cuda"))
        assert stats.kept
        assert within_class_variability(stats).device.type == "cuda"
        assert stats.fold_().scatter.device.type == "cuda"


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
    twin = replace(stats)
    stats.fold_()
    assert twin.kept
    assert torch.equal(twin.scatter, stats.scatter)


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
        stats = ClassStatistics.empty(K, D)
        for h, y in zip(features.split(45), labels.split(45), strict=True):
            stats.add_(h, y)
        assert bool(stats.kept) == kept
        torch.testing.assert_close(within_class_variability(stats), expected, rtol=1e-12, atol=0)
        monkeypatch.setattr(samples, "_FEW_BYTES", 0)


@pytest.mark.parametrize("sizes", [[1] * 500, [1, 2, 3] * 80, [300, 1, 1, 100, 7] * 5])
def test_small_pieces_are_put_together(sizes, generator):
    """So many pieces would make each update cost more than the last."""
    features, labels = data(generator, sum(sizes))
    stats, most = ClassStatistics.empty(K, D), 0
    for h, y in zip(features.split(sizes), labels.split(sizes), strict=True):
        stats.add_(h, y)
        most = max(most, len(stats.kept) // 2)
    assert most <= 2 + math.log2(sum(sizes))
    assert torch.equal(torch.cat(stats.kept[::2]), features)
    assert torch.equal(torch.cat(stats.kept[1::2]), labels)


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
    stats = ClassStatistics.empty(K, D, dtype)
    for part in (labels[:7], labels[7:]):
        stats.add_(centres[part], part)
    assert stats.kept
    assert torch.equal(stats.means, centres.to(dtype))
    assert not stats.spreads.any()
    assert not stats.spread_along(torch.eye(D, dtype=dtype)).any()
