"""Energies and hull distances: by hand, and against a quadratic program solved otherwise."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import lsq_linear

from nclightning.functional import hyperspherical_energy, one_vs_rest_distance
from tests.functional.inputs import draw, etf


def hull_distances_by_least_squares(rows):
    """Bounded least squares with a heavy row that makes the coefficients sum to one."""
    unit, heavy = torch.nn.functional.normalize(rows, dim=1).numpy(), 1e4
    values = []
    for k, target in enumerate(unit):
        others = np.delete(unit, k, 0)
        system = np.vstack([others.T, heavy * np.ones(len(others))])
        coefficients = lsq_linear(system, np.append(target, heavy), (0, np.inf), method="bvls", tol=1e-14).x
        values.append(np.linalg.norm(others.T @ coefficients - target))
    return values


@pytest.mark.parametrize(("K", "d"), [(3, 2), (4, 6), (20, 3), (40, 8)])
def test_hull_distances(K, d):
    rows = draw(K, d)
    values = one_vs_rest_distance(rows, "none")
    # The default accuracy 1e-6; the heavy row is good for 1e-7.
    assert values.tolist() == pytest.approx(hull_distances_by_least_squares(rows), rel=2e-6, abs=1e-6)
    assert float(one_vs_rest_distance(rows)) == float(values.min())


@pytest.mark.parametrize("K", [2, 3, 10])
def test_an_etf_has_the_largest_margin(K):
    """A vertex is K/(K-1) from the centroid of the others, and that is the nearest point."""
    assert float(one_vs_rest_distance(3 * etf(K, K + 1))) == pytest.approx(K / (K - 1), rel=1e-6)


def test_equal_directions_have_no_margin():
    rows = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    assert float(one_vs_rest_distance(rows)) <= 1e-6


def test_what_no_solver_can_do_is_said():
    rows = draw(10, 4)
    with pytest.raises(ValueError, match="did not reach rtol=1e-06 in 50 steps"):
        one_vs_rest_distance(rows, max_iterations=50)
    with pytest.raises(ValueError, match="reduction must be"):
        one_vs_rest_distance(rows, "mean")
    assert one_vs_rest_distance(torch.zeros(3, 2)).isnan()


def test_energies_of_an_etf_by_hand():
    """All distances are sqrt(2K/(K-1))."""
    K = 5
    distance = math.sqrt(2 * K / (K - 1))
    rows = etf(K, 6)
    for kernel, exponent, expected in (("log", 1.0, -math.log(distance)), ("riesz", 3.0, distance**-3)):
        mean, variance = hyperspherical_energy(rows, kernel, exponent)
        assert float(mean) == pytest.approx(expected, rel=1e-13)
        assert float(variance) <= 1e-28
    assert float(hyperspherical_energy(rows, "riesz", 3.0, log=True).mean) == pytest.approx(-3 * math.log(distance))


def test_riesz_energies_by_a_loop():
    rows = draw(6, 4)
    unit = rows / rows.norm(dim=1, keepdim=True)
    values = [float((unit[i] - unit[j]).norm()) ** -2.5 for i in range(6) for j in range(6) if i != j]
    mean, variance = hyperspherical_energy(rows, "riesz", 2.5)
    assert float(mean) == pytest.approx(np.mean(values), rel=1e-12)
    assert float(variance) == pytest.approx(np.var(values), rel=1e-10)


def test_equal_directions_have_infinite_energy():
    rows = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    assert hyperspherical_energy(rows).mean == math.inf
    assert hyperspherical_energy(torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 1.0]])).mean.isnan()


@pytest.mark.slow
def test_ten_thousand_classes_fit():
    rows = draw(10_000, 3, dtype=torch.float32)
    assert math.isfinite(hyperspherical_energy(rows).variance)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "gauss"}, "kernel must be 'log' or 'riesz'"),
        ({"kernel": "log", "log": True}, "log=True needs 'riesz'"),
        ({"exponent": 0.0}, "exponent must be positive"),
        ({"present": torch.ones(3)}, "present must be bool"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        hyperspherical_energy(draw(4, 2), **options)
