"""Near the points where a measure is zero, infinite or undefined."""

import math

import mpmath
import pytest
import torch

from nclightning.functional import class_statistics, self_duality, uniform_duality
from nclightning.metrics.measures import MEASURES, MeasureInput
from tests.functional.oracle import by_gram, stats_of


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("overlap", [1e-2, 1e-6, 1e-8, 1e-10])
@pytest.mark.parametrize(("K", "d"), [(9, 4), (300, 12)])
def test_a_head_nearly_orthogonal_to_more_means_than_fit(K, d, overlap):
    """Inner products are known to the rounding of the rows, 1e-16, and their norm is no worse."""
    head, means, turn = normal(K, d), normal(K, d, seed=1), torch.linalg.qr(normal(d, d, seed=2)).Q
    head[:, d // 2 :] *= overlap
    means[:, : d // 2] *= overlap
    stats = stats_of(means @ turn)
    value = float(self_duality(stats, head @ turn))
    assert value == pytest.approx(by_gram(head @ turn, stats.centred_means), rel=1e-12 + 1e-15 / overlap)


@pytest.mark.parametrize(("K", "d"), [(3, 4), (9, 4)])
def test_a_head_orthogonal_to_all_means_has_no_duality(K, d):
    head, means, turn = normal(K, d), normal(K, d, seed=1), torch.linalg.qr(normal(d, d, seed=2)).Q
    head[:, 2:], means[:, :2] = 0, 0
    assert self_duality(stats_of(means), head).isnan()
    assert self_duality(stats_of(1e-5 * means @ turn), head @ turn).isnan()


@pytest.mark.parametrize("deviation", [1.0, 1e-3, 1e-5, 1e-8, 1e-11])
def test_uniform_duality_near_duality(deviation):
    means, away = normal(4, 6), normal(4, 6, seed=1)
    labels = torch.arange(8) % 4
    stats = class_statistics(means[labels], labels, 4)
    head = stats.centred_means + deviation * away
    with mpmath.workdps(60):
        rows = [mpmath.matrix(each.tolist()) for each in (head, stats.centred_means)]
        cosines = [
            mpmath.fdot(w, m) / mpmath.norm(w) / mpmath.norm(m)
            for w, m in (tuple(each[k, :].T for each in rows) for k in range(4))
        ]
        mean = mpmath.fsum(cosines) / 4
        expected = float(mpmath.fsum((x - mean) ** 2 for x in cosines) / 3)
    # Head and means are known to their rounding, and so is their difference.
    assert float(uniform_duality(stats, head)) == pytest.approx(expected, rel=1e-12 + 1e-14 / deviation, abs=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_an_infinite_feature_makes_the_moments_of_its_class_nan(dtype):
    features = torch.ones(4, 2, dtype=dtype)
    features[0, 0] = math.inf
    stats = class_statistics(features, torch.arange(4) % 2, 2)
    assert stats.means.isnan().tolist() == [[True, False], [False, False]]
    assert MEASURES["bias_collapse"].read(MeasureInput(stats, torch.ones(2, 2).double())).isnan()
