"""Predicted rates beside gradient descent."""

import math

import pytest
import torch

from nclightning.functional import class_statistics, etf_deviation, self_duality, within_class_variability
from nclightning.theory import UFMProblem
from tests.cases import SPECTRUM, at_strength, name_of
from tests.helpers import dense_hessian, gradient, moved, norm, perturb


def descend(problem, point, step):
    """Yield the iterates of gradient descent at a fixed step."""
    while True:
        yield point
        parts = [-step * g.flatten() for g in gradient(problem, point)]
        point = moved(point, torch.cat(parts))


def measured_factors(problem, point, step):
    """Factors per iteration of gap and distance while the gap falls from 1e-15 to 1e-25 of its scale."""
    ends, scale = [], problem.smoothness * max(problem.optimum_norm, 1) ** 2
    for k, iterate in enumerate(descend(problem, point, step)):
        gap = float(problem.optimality_gap(*iterate))
        if gap <= (1e-15, 1e-25)[len(ends)] * scale:
            ends.append((k, math.log(gap), math.log(float(problem.distance(*iterate)))))
            if len(ends) == 2:
                break
        assert k < 20_000
    (first, *start), (last, *end) = ends
    return [math.exp((b - a) / (last - first)) for a, b in zip(start, end, strict=True)]


# Loss, sizes, K q, c, step (times L, or the best).
DESCENTS = [
    ("mse", (4, 3, 6), 0.5, 0.3, 1.0),
    ("mse", (4, 3, 6), 0.5, 0.3, "best"),
    ("mse", (5, 1, 4), 0.3, 4.0, 1.0),
    ("mse", (3, 2, 1), 0.5, 0.4, 1.0),
    ("mse", (6, 2, 3), 0.8, 1.0, 1.5),
    ("mse", (4, 3, 6), 0.97, 1.0, 1.0),
    ("ce", (4, 3, 6), 0.5, 0.3, 1.9),
    ("ce", (4, 3, 6), 0.3, 3.0, 0.5),
    ("ce", (10, 10, 20), 0.5, 1.0, "best"),
    ("ce", (3, 2, 2), 0.9, 1.0, 1.0),
    ("ce", (2, 3, 4), 0.2, 0.5, 1.0),
    ("mse", (3, 2, 3), 1.4, 2.0, 1.0),
    ("ce", (3, 2, 3), 1.4, 0.5, "best"),
]


def step_of(problem, step):
    return problem.best_step if step == "best" else step / problem.smoothness


@pytest.mark.parametrize(("loss", "sizes", "kq", "ratio", "step"), DESCENTS)
def test_gradient_descent_contracts_as_predicted(loss, sizes, kq, ratio, step, generator):
    problem = at_strength(loss, sizes, kq, ratio)
    step = step_of(problem, step)
    start = perturb(problem.random_optimum(generator), generator, 0.02 * max(problem.optimum_norm, 1))
    gap, distance = measured_factors(problem, start, step)
    # The other modes are still dying out: 0.8% of the exponent where the next one is close, 3e-5 where it is not.
    assert math.log(distance) == pytest.approx(math.log(problem.contraction(step)), rel=1e-2)
    assert math.log(gap) == pytest.approx(2 * math.log(problem.contraction(step)), rel=1e-2)
    assert problem.iterations_per_decade(step) == pytest.approx(-math.log(10) / math.log(gap), rel=1e-2)


# The next eigenvalue is within 1-10% of mu, and a generic start shows their mixture until round-off.
CLUSTERED = [("mse", (4, 3, 6), 0.3, 1.0), ("mse", (3, 2, 5), 0.2, 1.0), ("ce", (4, 3, 6), 0.5, 0.3)]


@pytest.mark.parametrize(("loss", "sizes", "kq", "ratio"), CLUSTERED)
def test_the_slowest_mode_contracts_as_predicted_among_close_ones(loss, sizes, kq, ratio, generator):
    problem = at_strength(loss, sizes, kq, ratio)
    optimum = problem.random_optimum(generator)
    slow = torch.linalg.eigh(dense_hessian(problem, optimum)).eigenvectors[:, problem.dimension]
    step = 1 / problem.smoothness
    gap, distance = measured_factors(problem, moved(optimum, 1e-4 * norm(optimum) * slow), step)
    # What is not the slowest mode is of second order in the start, 1e-4 of it.
    assert math.log(distance) == pytest.approx(math.log(problem.contraction(step)), rel=1e-3)
    assert math.log(gap) == pytest.approx(2 * math.log(problem.contraction(step)), rel=1e-3)


def test_error_bound_is_attained_along_the_slowest_mode_and_nowhere_exceeded(generator):
    for problem in (at_strength("mse", (4, 3, 6), 0.5, 0.3), at_strength("ce", (4, 3, 6), 0.3, 2.0)):
        optimum = problem.random_optimum(generator)
        vectors = torch.linalg.eigh(dense_hessian(problem, optimum)).eigenvectors
        size = 1e-6 * norm(optimum)
        ratio = lambda point, p=problem: float(  # noqa: E731
            p.distance(*point) / torch.cat([g.flatten() for g in gradient(p, point)]).norm()
        )
        # The radius is 1e-6 relative: so is what curvature of higher order adds, times a constant of a few.
        assert ratio(moved(optimum, size * vectors[:, problem.dimension])) == pytest.approx(
            problem.error_bound_constant, rel=1e-4
        )
        for _ in range(20):
            assert ratio(perturb(optimum, generator, size)) <= problem.error_bound_constant * (1 + 1e-4)


@pytest.mark.parametrize("problem", [p for p in SPECTRUM if p.slack == 0][::5], ids=name_of)
def test_at_the_threshold_there_is_no_rate_and_no_error_bound(problem, generator):
    assert problem.mu == 0.0
    assert problem.error_bound_constant == math.inf
    assert problem.contraction(1 / problem.smoothness) == 1.0
    assert problem.iterations_per_decade(1 / problem.smoothness) == math.inf
    assert problem.decay_rates()[:2] == (0.0, 0.0)
    # Along (e M, [c e M ..]) the gap is of fourth order and the gradient of third: kappa grows without bound.
    frame = at_strength(problem.loss, sizes_of(problem), 0.5, problem.ratio).random_optimum(generator)
    ratios = []
    for size in (1e-2, 1e-3):
        factor = size / norm(frame)
        point = frame._replace(weight=factor * frame.weight, features=factor * frame.features)
        gradients = torch.cat([g.flatten() for g in gradient(problem, point)])
        ratios.append(float(problem.distance(*point) / gradients.norm()))
    # Distance over its cube: a hundred times larger at a tenth of the distance; 1% for the next order of CE.
    assert ratios[1] / ratios[0] == pytest.approx(100, rel=0.05)


def sizes_of(problem):
    return problem.num_classes, problem.samples_per_class, problem.feature_dim


@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_mu_vanishes_linearly_towards_the_threshold(loss):
    for side in (-1, 1):
        problem = at_strength(loss, (4, 3, 6), 1 + side * 1e-7, 2.0)
        lw, lh = problem.lambda_w, problem.lambda_h
        assert abs(problem.slack) == pytest.approx(1e-7, rel=1e-6)
        # 4 (1 - Kq) Pi / T below; above, half of it, because nothing pulls back but the excess itself. The next order
        # is 1e-7 relative.
        limit = (4 if side < 0 else 2) * abs(problem.slack) * lw * lh / (lw + lh)
        assert problem.mu == pytest.approx(limit, rel=1e-6)


def test_steps():
    problem = at_strength("ce", (4, 3, 6), 0.3, 2.0)
    mu, smoothness = problem.mu, problem.smoothness
    best = problem.contraction(problem.best_step)
    assert best == pytest.approx((smoothness - mu) / (smoothness + mu), rel=1e-14)
    for step in (0.5 * problem.best_step, 0.99 * problem.best_step, 1.01 * problem.best_step):
        assert problem.contraction(step) > best
    assert problem.contraction(2 / smoothness) == pytest.approx(1, rel=1e-15)
    assert problem.contraction(3 / smoothness) > 1
    assert problem.iterations_per_decade(3 / smoothness) == math.inf
    # A tiny step loses no digits: ln(10) / (2 step mu).
    assert problem.iterations_per_decade(1e-14) == pytest.approx(math.log(10) / 2e-14 / mu, rel=1e-12)
    assert problem.iterations_per_decade(1 / smoothness) == pytest.approx(
        -1 / (2 * math.log10(problem.contraction(1 / smoothness))), rel=1e-12
    )
    assert problem.decay_rates().gap == 2 * mu
    assert problem.decay_factors(problem.best_step)[:2] == pytest.approx((best**2, best), rel=1e-15)


@pytest.mark.parametrize("method", ["contraction", "iterations_per_decade", "decay_factors"])
@pytest.mark.parametrize("step", [0.0, -1.0, math.nan, math.inf])
def test_steps_that_are_none_are_refused(method, step):
    with pytest.raises(ValueError, match=f"step must be positive and finite, got {step}"):
        getattr(at_strength("ce", (4, 3, 6), 0.3, 2.0), method)(step)


# Loss, sizes, K q, c, and the metrics whose leading mode shows before round-off (the docstring of decay_rates says
# which do not): from the spectrum's point of view no other candidate is near.
METRICS = [
    ("ce", (4, 3, 6), 0.3, 3.0, ("nc1", "nc2", "nc3")),
    ("ce", (10, 5, 12), 0.05, 1.0, ("nc1", "nc2", "nc3")),
    ("ce", (5, 2, 7), 0.02, 1.0, ("nc1", "nc2", "nc3")),
    ("ce", (3, 3, 4), 0.6, 1.5, ("nc1", "nc2", "nc3")),
    ("ce", (2, 3, 1), 0.2, 0.5, ("nc1", "nc2", "nc3")),
    ("ce", (2, 2, 3), 0.3, 1.0, ("nc1", "nc2", "nc3")),
    ("mse", (4, 3, 6), 0.5, 0.3, ("nc1", "nc2", "nc3")),
    ("mse", (4, 2, 5), 0.6, 2.0, ("nc1", "nc2", "nc3")),
    ("mse", (2, 2, 1), 0.4, 1.0, ("nc1", "nc2", "nc3")),
    ("mse", (5, 2, 4), 0.3, 1.0, ("nc1",)),
    ("mse", (6, 2, 3), 0.3, 1.0, ("nc1",)),
]
WINDOWS = {"nc1": (1e-12, 1e-22), "nc2": (1e-7, 1e-12), "nc3": (1e-7, 1e-12)}


@pytest.mark.parametrize(("loss", "sizes", "kq", "ratio", "names"), METRICS)
def test_metrics_decay_by_the_modes_that_lead_them(loss, sizes, kq, ratio, names, generator):
    problem = at_strength(loss, sizes, kq, ratio)
    step = 1 / problem.smoothness
    ends = {name: [] for name in names}
    start = perturb(problem.random_optimum(generator), generator, 0.05 * problem.optimum_norm)
    for k, point in enumerate(descend(problem, start, step)):
        if all(len(found) == 2 for found in ends.values()):
            break
        stats = class_statistics(point.features, point.labels, problem.num_classes)
        read = {
            "nc1": lambda stats=stats: within_class_variability(stats),
            "nc2": lambda point=point: etf_deviation(point.weight),
            "nc3": lambda point=point, stats=stats: self_duality(stats, point.weight),
        }
        for name, found in ends.items():
            if len(found) < 2 and (value := float(read[name]())) <= WINDOWS[name][len(found)]:
                found.append((k, math.log(value)))
        assert k < 20_000
    for name, ((first, high), (last, low)) in ends.items():
        predicted = math.log(getattr(problem.decay_factors(step), name))
        # Heuristic: other modes of the same quantity mix in over the ten decades that there are.
        assert (low - high) / (last - first) == pytest.approx(predicted, rel=0.06), name


def test_metrics_without_a_rate():
    def undefined(problem):
        return [name for name, rate in problem.decay_rates()._asdict().items() if math.isnan(rate)]

    assert undefined(at_strength("ce", (4, 1, 6), 0.3, 1.0)) == ["nc1"]
    assert undefined(at_strength("mse", (6, 2, 3), 0.3, 1.0)) == ["nc2", "nc3"]
    assert undefined(at_strength("mse", (4, 2, 6), 1.3, 1.0)) == ["nc1", "nc2", "nc3"]
    assert undefined(at_strength("mse", (4, 2, 6), 0.3, 1.0)) == []


def test_rates_of_the_paper_sizes_in_numbers():
    """Exponents measured in long runs at K = n = 10, d = 20, to the digits given."""
    ce = UFMProblem("ce", 10, 10, 20, 5e-3, 5e-4).decay_rates()
    assert ce.nc1 == pytest.approx(1.525e-3, abs=1e-6)
    assert ce.nc2 == ce.nc3 == pytest.approx(6.815e-4, abs=1e-7)
    mse = UFMProblem("mse", 10, 10, 20, 5e-3, 5e-4).decay_rates()
    assert mse.nc1 == pytest.approx(2.991e-3, abs=1e-6)
    assert mse.nc2 == pytest.approx(9.906e-4, abs=1e-7)
    paper = UFMProblem("mse", 10, 10, 20, 5e-2, 5e-3)
    assert paper.iterations_per_decade(1 / paper.smoothness) == pytest.approx(232, abs=0.5)
    assert paper.iterations_per_decade(paper.best_step) == pytest.approx(116, abs=0.5)
