"""More classes than features: what is formed grows with K d, not with the square of K, and the values stay."""

import math

import mpmath
import pytest
import torch

from nclightning import functional as F
from nclightning.theory import UFMProblem
from tests.functional.oracle import by_gram, stats_of
from tests.helpers import Largest


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def nearly_tight(K, d, noise=0.0):
    """Rows whose Gram matrix is as near to that of an ETF as rank d allows."""
    basis = torch.linalg.qr(torch.cat([torch.ones(K, 1, dtype=torch.float64), draw(K, d, seed=1)], 1)).Q
    return basis[:, 1:] + noise * draw(K, d, seed=2)


# K, d: d + 1 is the last for which an ETF fits.
SIZES = [(4, 3), (5, 3), (6, 3), (9, 8), (10, 8), (40, 8), (300, 64), (66, 64), (65, 64), (50, 1)]


@pytest.mark.parametrize(("K", "d"), SIZES)
@pytest.mark.parametrize("make", [draw, nearly_tight], ids=["random", "tight"])
def test_values_are_those_of_the_gram_matrix(K, d, make):
    head, means = make(K, d), make(K, d) + 0.1 * draw(K, d, seed=3)
    stats = stats_of(means)
    assert float(F.etf_deviation(head)) == pytest.approx(by_gram(head, head), rel=1e-12, abs=1e-14)
    centred = head - head.mean(dim=0)
    assert float(F.etf_deviation(head, centred=True)) == pytest.approx(by_gram(centred, centred), rel=1e-12, abs=1e-14)
    assert float(F.self_duality(stats, head)) == pytest.approx(by_gram(head, stats.centred_means), rel=1e-12)


@pytest.mark.parametrize(("K", "d"), [(5, 3), (10, 8), (40, 8), (200, 64)])
def test_the_least_value_is_that_of_the_docstring(K, d):
    least = (2 - 2 * (d / (K - 1)) ** 0.5) ** 0.5
    assert float(F.etf_deviation(nearly_tight(K, d))) == pytest.approx(least, rel=1e-12)


def test_an_etf_that_just_fits_reads_zero_to_all_digits():
    K, d = 65, 64
    for noise in (1e-3, 1e-6, 1e-9, 1e-12):
        rows = nearly_tight(K, d, noise)
        with mpmath.workdps(40):
            exact = mpmath.matrix(rows.tolist())
            gram = exact * exact.T
            target = (mpmath.eye(K) - mpmath.ones(K) / K) / mpmath.sqrt(K - 1)
            value = float(mpmath.mnorm(gram / mpmath.mnorm(gram, "f") - target, "f"))
        # The Gram matrix of rows near an ETF is known to its round-off, 1e-15.
        assert float(F.etf_deviation(rows)) == pytest.approx(value, rel=1e-9, abs=3e-15)


@pytest.mark.parametrize("count", [30, 9, 8, 3, 2, 1, 0])
def test_absent_classes_are_left_out(count):
    """Of 40 classes in 8 dimensions so few are present that an ETF fits again: the value may vanish."""
    K, d = 40, 8
    present = torch.zeros(K, dtype=torch.bool)
    present[torch.randperm(K, generator=torch.Generator().manual_seed(0))[:count]] = True
    rows, head = draw(K, d), draw(K, d, seed=4)
    if 2 <= count <= d + 1:
        rows[present] = nearly_tight(count, count - 1) @ torch.eye(d, dtype=torch.float64)[: count - 1]
    stats = stats_of(rows, present)
    values = float(F.etf_deviation(stats.centred_means, present=present)), float(F.self_duality(stats, head))
    if count < 2:
        assert all(math.isnan(value) for value in values)
        return
    expected = by_gram(stats.centred_means, stats.centred_means, present), by_gram(head, stats.centred_means, present)
    assert values == pytest.approx(expected, rel=1e-12, abs=3e-15)
    assert count > d + 1 or values[0] <= 3e-15


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_lower_precision_is_kept_and_summed_in_float64(dtype, scale):
    rows = (scale * nearly_tight(300, 64)).to(dtype)
    value = F.etf_deviation(rows)
    assert value.dtype == dtype
    # One rounding of the result, and those of a scale.
    assert float(value) == pytest.approx(by_gram(rows, rows), rel=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("scale", [1e-150, 1e150])
@pytest.mark.parametrize(("K", "d"), [(40, 8), (9, 8)])
def test_no_scale_leaves_the_range(K, d, scale):
    head, means = draw(K, d), draw(K, d, seed=1)
    plain, scaled = (F.self_duality(stats_of(s * means), s * head) for s in (1.0, scale))
    assert float(scaled) == pytest.approx(float(plain), rel=1e-12)
    assert float(F.etf_deviation(scale * head)) == pytest.approx(float(F.etf_deviation(head)), rel=1e-12)


@pytest.mark.parametrize(
    "make", [torch.zeros, lambda *s: torch.full(s, torch.nan), lambda *s: torch.full(s, torch.inf)]
)
def test_rows_without_a_direction_read_nan(make):
    rows = make(40, 8)
    assert F.etf_deviation(rows).isnan()
    assert F.self_duality(stats_of(draw(40, 8)), rows.double()).isnan()


K_MANY, D_FEW = 6_000, 12
MEASURES = {
    "etf_deviation": lambda stats, head: F.etf_deviation(head),
    "etf_deviation of means": lambda stats, head: F.etf_deviation(stats.centred_means, present=stats.present),
    "etf_deviation centred": lambda stats, head: F.etf_deviation(head, centred=True),
    "self_duality": F.self_duality,
    "self_duality centred": lambda stats, head: F.self_duality(stats, head, centred=True),
    "duality_difference": F.duality_difference,
    "class_alignment": F.class_alignment,
    "uniform_duality": F.uniform_duality,
    "equinorm": lambda stats, head: F.equinorm(head),
    "equiangularity": lambda stats, head: F.equiangularity(head),
    "hyperspherical_energy": lambda stats, head: F.hyperspherical_energy(head),
    "head_sum": lambda stats, head: F.head_sum(head),
    "distance_to_collapse": F.distance_to_collapse,
    "nearest optimum": lambda stats, head: UFMProblem("mse", K_MANY, 1, D_FEW, 1e-5, 1e-5).distance_from_moments(
        head, stats.means, torch.zeros(()), torch.zeros(K_MANY)
    ),
}


@pytest.mark.parametrize("name", MEASURES)
def test_no_tensor_is_as_large_as_all_pairs_of_classes(name):
    stats, head = stats_of(draw(K_MANY, D_FEW)), draw(K_MANY, D_FEW, seed=1)
    with Largest() as largest:
        MEASURES[name](stats, head)
    # Tiles have 2**23 entries, less than a quarter of all pairs; what has none is some times the rows at most.
    tiled = name in ("equiangularity", "hyperspherical_energy")
    assert largest.elements <= (2**23 if tiled else 4 * K_MANY * D_FEW) < K_MANY**2 / 4


@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_the_divergence_of_a_batch_forms_nothing_of_all_pairs(loss):
    problem = UFMProblem(loss, 3000, 1, 3000, 1e-5, 1e-5)
    with Largest() as largest:
        problem.divergence(draw(4, 3000), torch.tensor([0, 7, 7, 2999]))
    assert largest.elements <= 4 * 3000
