"""Predicted rates beside gradient descent."""

import math

import pytest
import torch

from nclightning.theory import UFMProblem
from tests.cases import SPECTRUM, at_strength, name_of
from tests.helpers import dense_hessian, gradient, moved, norm, perturb
from tests.theory.descent import exponents


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


ALL = ("nc1", "nc2", "nc3")
# Loss, sizes, K q, c, and the metrics whose leading product shows above round-off (the docstring of decay_rates says
# which do not): from the spectrum's point of view no other candidate is near.
METRICS = [
    ("ce", (4, 3, 6), 0.3, 3.0, ALL),
    ("ce", (10, 5, 12), 0.05, 1.0, ALL),
    ("ce", (3, 3, 4), 0.6, 1.5, ALL),
    ("ce", (5, 2, 5), 0.95, 1.0, ALL),
    ("ce", (3, 6, 3), 0.3, 4.0, ALL),
    ("ce", (5, 1, 8), 0.1, 1.0, ALL[1:]),
    ("ce", (2, 3, 1), 0.2, 0.5, ALL),
    ("ce", (2, 1, 4), 0.9, 3.0, ALL[1:]),
    # Logits so large that deviations within classes along the means die out before their tilt does.
    ("ce", (2, 3, 4), 0.002, 1.0, ALL),
    ("ce", (2, 2, 2), 0.0005, 0.3, ALL),
    ("ce", (3, 2, 6), 0.001, 0.5, ("nc1",)),
    # Two classes, and room for their means to tilt: by the mean feature, by the head's mean, by both.
    ("mse", (2, 6, 4), 0.1, 1.29, ALL),
    ("mse", (2, 2, 2), 0.1, 4.0, ("nc1",)),
    ("mse", (2, 3, 4), 0.1, 1.0, ("nc1",)),
    ("mse", (2, 6, 2), 0.5, 0.4, ALL),
    ("mse", (2, 3, 4), 0.9, 0.3, ALL),
    ("mse", (2, 2, 1), 0.4, 1.0, ALL),
    ("mse", (2, 1, 1), 0.6, 4.0, ALL[1:]),
    ("mse", (4, 3, 6), 0.5, 0.3, ("nc2", "nc3")),
    ("mse", (4, 2, 5), 0.6, 2.0, ALL),
    ("mse", (3, 6, 6), 0.9, 1.0, ALL),
    ("mse", (3, 2, 3), 0.1, 3.0, ("nc1", "nc2")),
    ("mse", (5, 2, 4), 0.95, 1.0, ALL),
    ("mse", (5, 2, 4), 0.3, 1.0, ("nc1",)),
    # Fewer dimensions than an ETF needs.
    ("mse", (6, 2, 3), 0.3, 1.0, ("nc1",)),
    ("mse", (4, 2, 2), 0.3, 1.0, ("nc1",)),
    ("mse", (5, 6, 3), 0.9, 0.3, ("nc1",)),
]


def ratios(problem, seed=0):
    """Measured exponents by predicted ones, at half of the largest step at which no mode alternates."""
    generator, step = torch.Generator().manual_seed(seed), 0.5 / problem.smoothness
    start = perturb(problem.random_optimum(generator), generator, 0.1 * problem.optimum_norm)
    factors = problem.decay_factors(step)
    return {
        name: measured * step / -math.log(getattr(factors, name))
        for name, measured in exponents(problem, start, step).items()
    }


@pytest.mark.parametrize(("loss", "sizes", "kq", "ratio", "names"), METRICS)
def test_metrics_decay_by_the_modes_that_lead_them(loss, sizes, kq, ratio, names):
    found = ratios(at_strength(loss, sizes, kq, ratio))
    # Heuristic: other modes of the same quantity mix in over the decades that there are.
    assert {name: found[name] for name in names} == pytest.approx(dict.fromkeys(names, 1), rel=0.05)


SHAPES = [
    (loss, (K, n, d))
    for loss in ("mse", "ce")
    for K in (2, 3, 5)
    for n in (1, 2, 6)
    for d in (K - 2, K - 1, K, 2 * K)
    if K * n < 30 and (d >= K - 1 or (loss == "mse" and d > 0))
]
RATIOS = (0.4, 1.3, 3.0)
# Each shape with each strength, and another of the ratios each time: in a Latin square over three shapes in a row.
GRID = [(*shape, kq, RATIOS[(i + j) % 3]) for i, shape in enumerate(SHAPES) for j, kq in enumerate((0.03, 0.3, 0.95))]


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_nothing_decays_slower_than_predicted_on_a_grid(loss):
    """A product that is missing from the candidates would be measured: the smaller exponent wins in the end."""
    found = {
        (*case, name): value for case in GRID if case[0] == loss for name, value in ratios(at_strength(*case)).items()
    }
    assert len(found) > 180
    assert {case: value for case, value in found.items() if not value >= 0.85} == {}
    # A faster mode of larger amplitude hides the slowest product of MSE down to round-off in some of its cases.
    near = sum(value <= 1.05 for value in found.values()) / len(found)
    assert near >= (0.75 if loss == "mse" else 0.995)


def test_exponents_of_gradient_flow_are_the_limit_of_factors():
    for case in METRICS[::4]:
        problem = at_strength(*case[:4])
        step = 1e-7 / problem.smoothness
        limits = [-math.log(factor) / step for factor in problem.decay_factors(step)]
        assert limits == pytest.approx(list(problem.decay_rates()), rel=1e-5, nan_ok=True)


def test_two_classes_in_numbers():
    """The case of two classes whose tilt was left out: it was predicted to fall at 20 lambda_h."""
    problem = UFMProblem("mse", 2, 6, 4, lambda_w=0.05 * math.sqrt(10 / 6), lambda_h=0.05 / math.sqrt(60))
    assert problem.lambda_w / problem.lambda_h == pytest.approx(10)
    assert 2 * problem.q == pytest.approx(0.1)
    # 2 (2 + tau_- / lambda_h), measured as 5.89 in 33 digits.
    assert problem.decay_rates().nc1 / problem.lambda_h == pytest.approx(5.89, abs=5e-3)


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
