"""NC1-NC3: degenerate points first, then against the printed formulas in many digits."""

import math

import mpmath
import pytest
import torch

from nclightning.functional import (
    class_statistics,
    etf_deviation,
    self_duality,
    within_class_variability,
)


def etf(K, d, generator, scale=1.0):
    """Rows of a simplex ETF in a random orientation."""
    basis = torch.linalg.qr(torch.randn(d, K, dtype=torch.float64, generator=generator)).Q
    return scale * (torch.eye(K, dtype=torch.float64) - 1 / K) @ basis.T


def nc1_by_formula(features, labels, K, digits=50):
    """trace(Sigma_W pinv(Sigma_B)) / K with an eigendecomposition in many digits."""
    with mpmath.mp.workdps(digits):
        rows = [[mpmath.mpf(x) for x in row] for row in features.tolist()]
        d, N = len(rows[0]), len(rows)
        groups = [[r for r, y in zip(rows, labels.tolist(), strict=True) if y == k] for k in range(K)]
        groups = [g for g in groups if g]
        means = [[mpmath.fsum(r[j] for r in g) / len(g) for j in range(d)] for g in groups]
        centre = [mpmath.fsum(m[j] for m in means) / len(means) for j in range(d)]
        between, within = mpmath.zeros(d), mpmath.zeros(d)
        for g, m in zip(groups, means, strict=True):
            for i in range(d):
                for j in range(d):
                    between[i, j] += (m[i] - centre[i]) * (m[j] - centre[j]) / len(means)
                    within[i, j] += mpmath.fsum((r[i] - m[i]) * (r[j] - m[j]) for r in g) / N
        values, vectors = mpmath.eigsy(between)
        top = max(values)
        total = mpmath.mpf(0)
        for i in range(d):
            if values[i] > top * mpmath.mpf(10) ** (-digits // 2):
                v = vectors[:, i]
                total += (v.T * within * v)[0] / values[i]
        return float(total / len(means))


@pytest.mark.parametrize(("K", "d"), [(2, 1), (3, 2), (4, 7), (6, 3)])
@pytest.mark.parametrize("noise", [1e-1, 1e-4, 1e-8])
def test_nc1_agrees_with_its_formula_in_50_digits(K, d, noise, generator):
    labels = torch.arange(5 * K) % K
    means = (
        torch.randn(K, d, dtype=torch.float64, generator=generator)
        * torch.logspace(0, 2, K, dtype=torch.float64)[:, None]
    )
    features = means[labels] + noise * torch.randn(len(labels), d, dtype=torch.float64, generator=generator)
    value = float(within_class_variability(class_statistics(features, labels, K)))
    # Rounding of the means, 100 eps, against the noise; and the means' spread of 100 twice in the smallest direction.
    assert value == pytest.approx(nc1_by_formula(features, labels, K), rel=max(1e-12, 1e-14 / noise * 100))


def test_nc1_leaves_out_absent_classes(generator):
    labels = torch.tensor([0, 0, 3, 3, 4, 4, 4])
    features = torch.randn(7, 6, dtype=torch.float64, generator=generator)
    value = float(within_class_variability(class_statistics(features, labels, 6)))
    assert value == pytest.approx(nc1_by_formula(features, labels, 6), rel=1e-12)


def test_nc1_is_zero_at_exact_collapse(generator):
    labels = torch.arange(12) % 4
    features = etf(4, 6, generator)[labels]
    assert float(within_class_variability(class_statistics(features, labels, 4))) == 0.0


@pytest.mark.parametrize(("spread", "value"), [(1.0, math.inf), (0.0, math.nan)])
def test_nc1_where_the_class_means_coincide(spread, value):
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    features = spread * rows.repeat(3, 1)
    stats = class_statistics(features, torch.arange(3).repeat_interleave(4), 3)
    assert float(within_class_variability(stats)) == pytest.approx(value, nan_ok=True)


def test_nc1_needs_two_classes():
    stats = class_statistics(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64), 2)
    assert math.isnan(within_class_variability(stats))


@pytest.mark.parametrize(("K", "d"), [(2, 1), (3, 4), (10, 20)])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_nc2_and_nc3_vanish_at_self_dual_etfs(K, d, scale, generator):
    weight = etf(K, max(d, K), generator)
    stats = class_statistics(scale * weight[torch.arange(2 * K) % K] + 3.0 * scale, torch.arange(2 * K) % K, K)
    # K^2 entries with a few roundings each.
    assert float(etf_deviation(weight)) <= 1e-15 * K
    assert float(self_duality(stats, weight)) <= 1e-14 * K


def test_nc2_of_an_orthogonal_frame_by_hand():
    """W W^T = I: entries I/sqrt(K) against P/sqrt(K-1); <I, P> = K - 1, so the square is 2 - 2 sqrt((K-1)/K)."""
    K = 4
    expected = math.sqrt(2 - 2 * math.sqrt((K - 1) / K))
    assert float(etf_deviation(torch.eye(K, dtype=torch.float64))) == pytest.approx(expected, rel=1e-14)


def test_nc3_is_two_for_an_opposite_head(generator):
    weight = etf(5, 6, generator)
    stats = class_statistics(-weight, torch.arange(5), 5)
    assert float(self_duality(stats, weight)) == pytest.approx(2.0, rel=1e-14)


def test_zero_weights_and_coinciding_means_give_nan():
    stats = class_statistics(torch.ones(4, 3), torch.arange(4) % 2, 2)
    assert math.isnan(etf_deviation(torch.zeros(2, 3)))
    assert math.isnan(self_duality(stats, torch.ones(2, 3)))


def test_nc3_leaves_out_absent_classes(generator):
    """With class 2 of 4 absent, a 3-class ETF of the others is fully dual."""
    weight = torch.randn(4, 6, dtype=torch.float64, generator=generator)
    weight[[0, 1, 3]] = etf(3, 6, generator)
    stats = class_statistics(weight[[0, 1, 3]], torch.tensor([0, 1, 3]), 4)
    assert float(self_duality(stats, weight)) <= 1e-14


@pytest.mark.parametrize("measure", ["nc1", "nc2", "nc3"])
def test_invariances(measure, generator):
    """Rotation, scaling, shift of all features, relabelling and order of the samples."""
    K, d = 4, 6
    labels = torch.arange(20) % K
    weight = torch.randn(K, d, dtype=torch.float64, generator=generator)
    features = torch.randn(20, d, dtype=torch.float64, generator=generator)

    def value(weight, features, labels):
        stats = class_statistics(features, labels, K)
        return float(
            {
                "nc1": lambda: within_class_variability(stats),
                "nc2": lambda: etf_deviation(weight),
                "nc3": lambda: self_duality(stats, weight),
            }[measure]()
        )

    Q = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator)).Q
    shift = torch.randn(d, dtype=torch.float64, generator=generator)
    order, classes = torch.randperm(20, generator=generator), torch.randperm(K, generator=generator)
    expected = value(weight, features, labels)
    assert value(weight @ Q, features @ Q, labels) == pytest.approx(expected, rel=1e-12)
    assert value(3 * weight, 5 * features, labels) == pytest.approx(expected, rel=1e-12)
    assert value(weight, features + shift, labels) == pytest.approx(expected, rel=1e-12)
    assert value(weight, features[order], labels[order]) == pytest.approx(expected, rel=1e-12)
    assert value(weight[torch.argsort(classes)], features, classes[labels]) == pytest.approx(expected, rel=1e-12)


def test_bad_shapes_are_refused():
    stats = class_statistics(torch.randn(4, 3), torch.arange(4) % 2, 2)
    with pytest.raises(ValueError, match="K >= 2"):
        etf_deviation(torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"weight must have shape \(2, 3\)"):
        self_duality(stats, torch.ones(3, 3))
