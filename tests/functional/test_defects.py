"""Inputs on which measures of neural collapse are known to go wrong, each shown to break the naive way."""

import math

import pytest
import torch

from nclightning.functional import (
    StatisticsBuffer,
    class_distance_normalized_variance,
    class_statistics,
    duality_difference,
    equiangularity,
    equinorm,
    etf_deviation,
    hyperspherical_energy,
    one_vs_rest_distance,
    self_duality,
    within_class_variability,
)
from nclightning.metrics import NearestClassCentre, NeuralCollapse
from tests.functional.inputs import draw, etf


def nc1(features, labels, K):
    return float(within_class_variability(class_statistics(features, labels, K)))


def naive_nc1(features, labels, K):
    """The pseudo-inverse of the between-class covariance, in the dtype of the features."""
    means = torch.stack([features[labels == k].mean(0) for k in range(K)])
    deviations, centred = features - means[labels], means - means.mean(0)
    return float(
        torch.trace(deviations.T @ deviations / len(features) @ torch.linalg.pinv(centred.T @ centred / K)) / K
    )


@pytest.mark.parametrize("inside", [1e-3, 1e-5])
def test_noise_outside_the_span_of_the_means_does_not_make_nc1_negative(inside):
    """In float32 the rounding of the pseudo-inverse meets the noise outside and outweighs what is inside."""
    K, d, naive = 4, 30, []
    for seed in range(20):
        labels, noise = torch.arange(200) % K, draw(200, d, seed=seed)
        noise[:, : K - 1] *= inside
        means = torch.zeros(K, d, dtype=torch.float64)
        means[:, : K - 1] = draw(K, K - 1, seed=seed + 100)
        # Centred in each class outside the span, so that the means stay in it.
        noise = noise - torch.stack([noise[labels == k].mean(0) for k in range(K)])[labels]
        Q = torch.linalg.qr(draw(d, d, seed=seed + 200)).Q
        features = (means[labels] + noise) @ Q
        truth = nc1(features, labels, K)
        single = features.float()
        value = nc1(single, labels, K)
        assert value >= 0
        # Rounding the features to float32 turns the span of the means by that over their least singular value.
        least = float(torch.linalg.svdvals(class_statistics(features, labels, K).centred_means)[K - 2])
        assert value == pytest.approx(truth, rel=10 * 6e-8 / inside / least)
        naive.append(naive_nc1(single, labels, K))
    if inside == 1e-5:
        assert min(naive) < 0


@pytest.mark.parametrize("smallest", [1e-2, 1e-4, 1e-6])
def test_a_small_direction_of_the_means_is_neither_dropped_nor_blown_up(smallest):
    K, d = 4, 8
    scales = torch.tensor([1.0, 0.3, smallest], dtype=torch.float64)
    basis = torch.linalg.qr(torch.cat([torch.ones(K, 1, dtype=torch.float64), draw(K, 3)], dim=1)).Q[:, 1:]
    means = (basis * scales) @ torch.linalg.qr(draw(d, 3, seed=2)).Q.T
    labels = torch.arange(400) % K
    noise = 1e-3 * smallest * draw(400, d, seed=3)
    features = means[labels] + noise
    stats = class_statistics(features, labels, K)
    # By hand: the singular values of the sample means are those of the means up to the noise.
    singular, right = torch.linalg.svd(stats.centred_means, full_matrices=False)[1:]
    expected = (
        sum(float(v @ stats.scatter @ v) / float(s) ** 2 for s, v in zip(singular[:3], right, strict=False)) / 400
    )
    assert nc1(features, labels, K) == pytest.approx(expected, rel=1e-9)
    if smallest <= 1e-4:
        assert naive_nc1(features.float(), labels, K) != pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(("K", "d"), [(4, 4), (5, 4), (40, 4)])
def test_as_many_classes_as_dimensions_and_more(K, d):
    labels = torch.arange(3 * K) % K
    assert math.isfinite(nc1(draw(K, d)[labels] + 0.1 * draw(3 * K, d), labels, K))


def test_features_are_not_written_to():
    """A mean accumulated in a view of a sample overwrites it."""
    features, labels = draw(20, 5), torch.arange(20) % 4
    before = features.clone(), labels.clone()
    metric = NeuralCollapse(4, 5, draw(4, 5), measures=("all",))
    metric.update(features, labels)
    metric.compute()
    assert torch.equal(features, before[0])
    assert torch.equal(labels, before[1])


def test_a_perfect_etf_has_no_nc2():
    rows = etf(5, 7)
    assert float(etf_deviation(rows)) <= 1e-14
    assert float(equinorm(rows)) <= 1e-14
    assert float(equiangularity(rows)) <= 1e-14


def test_gaussian_clusters_on_an_etf():
    """NC1 = (K-1)^2 sigma^2 / (K rho^2) with rho the norm of the means: a total scatter would miss it."""
    K, d, sigma, rho, n = 5, 9, 0.1, 2.0, 40_000
    means = rho * etf(K, d) / math.sqrt((K - 1) / K)
    labels = torch.arange(K * n) % K
    value = nc1(means[labels] + sigma * draw(K * n, d), labels, K)
    # 200,000 samples: relative deviation sqrt(2 / (N (K - 1))) = 0.0016, three times.
    assert value == pytest.approx((K - 1) ** 2 * sigma**2 / (K * rho**2), rel=0.005)


def test_the_bias_decides():
    head = torch.nn.Linear(3, 3, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(torch.eye(3))
        head.bias.copy_(torch.tensor([10.0, 0.0, 0.0]))
    features, labels = torch.eye(3, dtype=torch.float64), torch.arange(3)
    metric = NearestClassCentre(class_statistics(features, labels, 3), head)
    metric.update(features, labels)
    assert float(metric.compute()["ncc_mismatch"]) == pytest.approx(2 / 3)


def test_labels_to_ignore_are_no_index_from_the_end():
    features, labels = draw(40, 5), torch.arange(40) % 4
    masked = torch.where(torch.arange(40) < 20, labels, -100)
    stats = class_statistics(features, masked, 4, ignore_index=-100)
    reference = class_statistics(features[:20], labels[:20], 4)
    assert int(stats.counts.sum()) == 20
    assert int(stats.num_invalid) == 0
    torch.testing.assert_close(stats.scatter, reference.scatter, rtol=1e-13, atol=1e-13)


def test_an_absent_class_is_no_zero_mean():
    labels = torch.tensor([0, 1, 2, 4, 5] * 8)
    features = draw(40, 7) + 10
    renumbered = torch.where(labels > 3, labels - 1, labels)
    stats = class_statistics(features, labels, 6)
    torch.testing.assert_close(stats.global_mean(), class_statistics(features, renumbered, 5).global_mean())
    assert nc1(features, labels, 6) == pytest.approx(nc1(features, renumbered, 5), rel=1e-12)


@pytest.mark.parametrize("tile", range(1, 7))
def test_every_size_of_tile_and_a_batch_of_one(tile):
    rows = draw(5, 8)
    for kernel in ("log", "riesz"):
        expected = hyperspherical_energy(rows, kernel)
        for value, reference in zip(hyperspherical_energy(rows, kernel, tile=tile), expected, strict=True):
            torch.testing.assert_close(value, reference, rtol=1e-12, atol=0)
    torch.testing.assert_close(one_vs_rest_distance(rows, tile=tile), one_vs_rest_distance(rows), rtol=1e-5, atol=0)
    metric = NeuralCollapse(5, 8)
    metric.update(rows[:1], torch.tensor([2]))
    assert int(metric.statistics.counts.sum()) == 1


def test_energies_keep_their_dtype_and_do_not_underflow():
    rows = draw(20, 512)
    assert hyperspherical_energy(rows).mean.dtype == torch.float64
    mean, variance = hyperspherical_energy(rows.float(), "riesz", exponent=510, log=True)
    exact = hyperspherical_energy(rows, "riesz", exponent=510, log=True)
    assert float(mean) == pytest.approx(float(exact.mean), rel=1e-4)
    assert math.isfinite(variance)
    distance = torch.pdist(torch.nn.functional.normalize(rows)).float()
    assert float((distance**-510).var()) == 0.0  # What the plain form makes of it.


@pytest.mark.parametrize("arguments", [("log",), ("riesz",), ("riesz", 3.0, True)])
def test_two_equal_directions_have_an_infinite_energy(arguments):
    rows = draw(4, 5)
    rows[1] = 2 * rows[0]
    value = hyperspherical_energy(rows, *arguments)
    assert float(value.mean) == math.inf
    assert value.variance.isnan()
    rows[2] = 0
    assert hyperspherical_energy(rows, *arguments).mean.isnan()


@pytest.mark.parametrize("offset", [1.0, 5.0, 1e3])
def test_an_offset_of_all_features_does_not_matter(offset):
    """Second moments around the origin lose the variance; uncentred means move NC3."""
    features, labels, weight = (
        draw(5, 6)[torch.arange(100) % 5] + 1e-3 * draw(100, 6, seed=1),
        torch.arange(100) % 5,
        draw(5, 6),
    )
    near, far = class_statistics(features, labels, 5), class_statistics(features + offset, labels, 5)
    for measure in (
        within_class_variability,
        class_distance_normalized_variance,
        lambda stats: self_duality(stats, weight),
        lambda stats: duality_difference(stats, weight),
    ):
        assert float(measure(far)) == pytest.approx(float(measure(near)), rel=1e-6)
    single = (features + offset).float()
    naive = (single.square().mean(0) - single.mean(0).square()).sum()
    if offset == 1e3:
        assert float(naive) != pytest.approx(float((features - features.mean(0)).square().mean(0).sum()), rel=1e-3)


@pytest.mark.parametrize("sigma", [1.0, 1e-2, 1e-4, 1e-6, 1e-8])
def test_deep_collapse_over_batches(sigma):
    """Raw second moments go negative here."""
    labels, noise = torch.arange(300) % 3, draw(300, 4)
    means = 3 * draw(3, 4, seed=1)
    features = means[labels] + sigma * noise
    buffer = StatisticsBuffer(class_statistics(features[:0], labels[:0], 3))
    for part in torch.randperm(300, generator=torch.Generator().manual_seed(2)).split(7):
        buffer.add(features[part], labels[part])
    stats = buffer.statistics
    exact = sum((g - g.mean(0)).square().sum() for g in (noise[labels == k] for k in range(3))) * sigma**2
    # Rounding of the features, 3 eps, in units of the noise.
    assert float(stats.spreads.sum()) == pytest.approx(float(exact), rel=1e-12 + 2e-15 / sigma)
    assert float(torch.trace(stats.scatter)) == pytest.approx(float(stats.spreads.sum()), rel=1e-12)


def test_more_classes_than_an_etf_takes():
    """Rows cut out of a larger identity are no ETF; the measure says by how much."""
    K, d = 60, 51
    rows = etf(K, K)[:, :d]
    assert float(etf_deviation(rows)) >= math.sqrt(2 - 2 * math.sqrt(d / (K - 1))) - 1e-12
