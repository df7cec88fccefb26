"""The study of the error bound, at a few numbers of classes."""

import importlib
import itertools
import math

import matplotlib.image
import pytest
import torch

from nclightning.reproduction import error_bound, reproduce
from nclightning.reproduction.claims import check_error_bound
from nclightning.reproduction.error_bound import (
    NEAR,
    Constants,
    Reading,
    read,
    study_constants,
    study_error_bound,
    study_problem,
    write,
)
from nclightning.theory import Solution
from tests.helpers import gradient_norm


@pytest.fixture(autouse=True)
def _few_classes(monkeypatch):
    monkeypatch.setattr(error_bound, "CLASSES", {"mse": (3,), "ce": (2, 5)})


@pytest.fixture(scope="module")
def readings():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(error_bound, "CLASSES", {"mse": (3,), "ce": (2, 5)})
        return study_error_bound()


@pytest.fixture(scope="module")
def constants():
    return study_constants()


def of(readings, kind, loss, K):
    return [r for r in readings if (r.kind, r.loss, r.num_classes) == (kind, loss, K)]


@pytest.mark.parametrize(("loss", "K"), [("mse", 3), ("ce", 2), ("ce", 5)])
def test_the_bound_holds_near_the_set_and_is_tight_on_descents(readings, loss, K):
    near = [
        r.ratio for kind in ("perturbation", "trajectory") for r in of(readings, kind, loss, K) if r.distance <= NEAR
    ]
    # To first order the quotient is at most 1; a relative distance of 1e-3 adds as much, and the rounding of mu less.
    assert max(near) <= 1 + 2 * NEAR
    assert max(r.ratio for r in of(readings, "trajectory", loss, K)) > 0.95


def test_a_perturbation_has_the_stated_distance_and_ratio():
    problem, generator = study_problem("mse", 3), torch.Generator().manual_seed(3)
    first = next(error_bound._perturb(problem, generator))
    generator = torch.Generator().manual_seed(3)
    optimum = problem.random_optimum(generator)
    parts = [optimum.weight, optimum.features, optimum.bias]
    noise = [torch.randn(p.shape, dtype=torch.float64, generator=generator) for p in parts]
    norm = torch.cat([n.flatten() for n in noise]).norm()
    moved = [p + problem.optimum_norm * n / norm for p, n in zip(parts, noise, strict=True)]
    point = Solution(moved[0], moved[1], optimum.labels, moved[2])
    distance = float(problem.distance(*moved[:2], optimum.labels, moved[2]))
    assert first.distance == pytest.approx(distance / problem.optimum_norm, rel=1e-12)
    assert first.ratio == pytest.approx(problem.mu * distance / gradient_norm(problem, point), rel=1e-12)


def test_at_the_threshold_the_quotient_grows_like_the_inverse_square(readings):
    for loss in ("mse", "ce"):
        points = of(readings, "threshold", loss, 4)
        assert len(points) == 11
        for far, near in itertools.pairwise(points[2:]):
            slope = math.log(near.ratio / far.ratio) / math.log(near.distance / far.distance)
            # The next order is the square of the distance, 1 % from 0.1 on; rounding of a gradient of 1e-15, 1 %.
            assert slope == pytest.approx(-2, abs=0.05)


def test_claims_follow_the_readings():
    good = [Reading("trajectory", loss, K, 1e-5, 0.99) for loss, K in (("mse", 2), ("ce", 2), ("ce", 3))]
    assert [c.held for c in check_error_bound(good)] == [True, True, True]
    bad = [*good, Reading("perturbation", "ce", 3, 1e-4, 1.02)]
    assert [c.held for c in check_error_bound(bad)] == [True, True, False]
    far = [*good, Reading("perturbation", "mse", 2, 0.1, 1.02)]
    assert [c.held for c in check_error_bound(far)] == [True, True, True]


def test_constants_of_fact_1_are_finite_and_ordered(constants):
    assert [each.loss for each in constants] == ["mse", "ce"]
    for each in constants:
        assert 0 < each.kappa_1 < math.inf
        assert 0 < each.kappa_2 < math.inf
        # Both are steps: the decrease is at least c1 = 0.3 times move^2 / step, the gradient move / step.
        assert each.kappa_1 <= each.kappa_3
        assert each.steps > 100


def test_tables_come_back_as_they_were(tmp_path, readings, constants):
    write(tmp_path / "a.csv", readings[:7])
    assert read(tmp_path / "a.csv", Reading) == readings[:7]
    write(tmp_path / "b.csv", constants[:1])
    assert read(tmp_path / "b.csv", Constants) == constants[:1]


def test_the_command_studies_once_and_draws_again(tmp_path, monkeypatch, readings, constants):
    module, studied = importlib.import_module("nclightning.reproduction.reproduce"), []
    monkeypatch.setattr(module, "study_error_bound", lambda: studied.append("bound") or readings)
    monkeypatch.setattr(module, "study_constants", lambda: studied.append("constants") or constants)
    report = reproduce(["error_bound"], out=tmp_path)
    text = report.read_text()
    assert "| Thm. 2 |" in text
    assert "| open |" in text
    assert matplotlib.image.imread(tmp_path / "error_bound.png").shape == (880, 2760, 4)
    assert reproduce(["error_bound"], out=tmp_path).read_text() == text
    assert studied == ["bound", "constants"]
