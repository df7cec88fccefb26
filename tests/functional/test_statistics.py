"""Class statistics: against a loop, in deep collapse, and over every split."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nclightning.functional import ClassStatistics, class_statistics


def by_loop(features, labels, num_classes):
    """Means and scatter, sample by sample."""
    features, d = features.double(), features.shape[1]
    means = torch.zeros(num_classes, d, dtype=torch.float64)
    scatter = torch.zeros(d, d, dtype=torch.float64)
    for k in range(num_classes):
        rows = features[labels == k]
        if len(rows):
            means[k] = rows.mean(0)
        for row in rows:
            scatter += torch.outer(row - means[k], row - means[k])
    return means, scatter


def sample(generator, N=60, K=5, d=4, spread=1.0, offset=0.0):
    labels = torch.randint(K, (N,), generator=generator)
    centres = torch.randn(K, d, dtype=torch.float64, generator=generator) + offset
    return centres[labels] + spread * torch.randn(N, d, dtype=torch.float64, generator=generator), labels


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("spread", [1.0, 1e-4, 1e-8])
def test_agrees_with_a_loop(offset, spread, generator):
    features, labels = sample(generator, spread=spread, offset=offset)
    means, scatter = by_loop(features, labels, 5)
    stats = class_statistics(features, labels, 5)
    torch.testing.assert_close(stats.means, means, rtol=1e-13, atol=1e-13)
    # The means' own rounding, eps * offset, is the limit: relative to the spread, twice, since the scatter is a square.
    limit = 10 * 2.3e-16 * max(offset, 1) / spread
    assert float((stats.scatter - scatter).norm()) <= max(limit, 1e-13) * float(scatter.norm())


def test_exact_collapse_has_no_scatter():
    centres = torch.tensor([[1.0, 2.0], [-3.0, 0.5]], dtype=torch.float64)
    labels = torch.tensor([0, 1, 1, 0, 1, 1])
    stats = class_statistics(centres[labels], labels, 2)
    assert torch.count_nonzero(stats.scatter) == 0
    torch.testing.assert_close(stats.means, centres, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_accumulates_in_float64_whatever_comes(dtype, generator):
    features, labels = sample(generator)
    features = features.to(dtype)
    stats = class_statistics(features, labels, 5)
    assert stats.scatter.dtype == torch.float64
    torch.testing.assert_close(stats.scatter, by_loop(features, labels, 5)[1], rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), cuts=st.lists(st.integers(0, 60), max_size=6), offset=st.sampled_from([0.0, 100.0]))
def test_any_split_in_any_order_gives_the_same(seed, cuts, offset):
    generator = torch.Generator().manual_seed(seed)
    features, labels = sample(generator, spread=1e-3, offset=offset)
    whole = class_statistics(features, labels, 5)
    order = torch.randperm(60, generator=generator)
    edges = [0, *sorted(cuts), 60]
    merged = ClassStatistics.empty(5, 4)
    for a, b in itertools.pairwise(edges):
        part = class_statistics(features[order[a:b]], labels[order[a:b]], 5)
        merged = merged.merge(part) if a % 2 else part.merge(merged)
    torch.testing.assert_close(merged.counts, whole.counts, rtol=0, atol=0)
    torch.testing.assert_close(merged.means, whole.means, rtol=1e-13, atol=1e-13)
    # Rounding of the means (eps * offset = 2e-14) against a spread of 1e-3, over 60 samples.
    torch.testing.assert_close(merged.scatter, whole.scatter, rtol=1e-9, atol=1e-15)


def test_labels_out_of_range_are_counted_and_enter_nothing_else(generator):
    features, labels = sample(generator)
    clean = class_statistics(features, labels, 5)
    strange = torch.full((3, 4), torch.nan, dtype=torch.float64)
    dirty = class_statistics(torch.cat([features, strange]), torch.cat([labels, torch.tensor([-100, 5, -1])]), 5)
    assert int(dirty.num_invalid) == 3
    assert int(clean.num_invalid) == 0
    torch.testing.assert_close(dirty.scatter, clean.scatter, rtol=1e-15, atol=0)
    torch.testing.assert_close(dirty.means, clean.means, rtol=1e-15, atol=0)


def test_absent_classes_stay_out_of_the_centre():
    features = torch.tensor([[1.0, 0.0], [3.0, 0.0]], dtype=torch.float64)
    stats = class_statistics(features, torch.tensor([0, 2]), 4)
    assert stats.present.tolist() == [True, False, True, False]
    assert stats.centred_means.tolist() == [[-1, 0], [0, 0], [1, 0], [0, 0]]


def test_inputs_are_left_as_they_are(generator):
    features, labels = sample(generator)
    before = features.clone(), labels.clone()
    class_statistics(features, labels, 5)
    assert torch.equal(features, before[0])
    assert torch.equal(labels, before[1])


@pytest.mark.parametrize(
    ("features", "labels", "error", "message"),
    [
        (torch.zeros(3), torch.zeros(3, dtype=torch.int64), ValueError, r"features must be \(N, d\)"),
        (torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64), ValueError, "same N"),
        (torch.zeros(3, 2), torch.zeros(3), TypeError, "labels int64"),
        (
            torch.zeros(3, 2, dtype=torch.int64),
            torch.zeros(3, dtype=torch.int64),
            TypeError,
            "features must be floating",
        ),
    ],
)
def test_bad_input_is_refused(features, labels, error, message):
    with pytest.raises(error, match=message):
        class_statistics(features, labels, 2)


def test_merging_other_shapes_is_refused():
    with pytest.raises(ValueError, match="same classes and feature dimension"):
        ClassStatistics.empty(2, 3).merge(ClassStatistics.empty(3, 3))


def test_features_without_columns_are_refused_by_name():
    with pytest.raises(ValueError, match=r"features must be \(N, d\) with d at least 1 .* got \(5, 0\)"):
        class_statistics(torch.zeros(5, 0), torch.zeros(5, dtype=torch.int64), 3)
