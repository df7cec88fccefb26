"""Descent with momentum near the optimal set: predicted, and by iterations and matrices that are written out here."""

import math

import mpmath
import numpy as np
import pytest
import torch

from nclightning.problems import Eigenvalue, Rates
from nclightning.problems.contract import _View
from nclightning.problems.rates import decay_exponent
from nclightning.theory import UFMProblem
from tests.problems.cases import CASES

METHODS = [(0.0, False), (0.3, False), (0.9, False), (0.99, False), (0.3, True), (0.9, True), (0.99, True)]


def roots(curvature, momentum, nesterov):
    """Both roots of the recurrence that torch.optim.SGD makes of a mode, in 700 digits."""
    with mpmath.workdps(700):
        a, beta = mpmath.mpf(curvature), mpmath.mpf(momentum)
        shrunk = 1 - a
        total, product = ((1 + beta) * shrunk, beta * shrunk) if nesterov else (1 + beta - a, beta)
        apart = mpmath.sqrt(total**2 - 4 * product)
        return [(total + apart) / 2, (total - apart) / 2]


@pytest.mark.parametrize(("momentum", "nesterov"), [*METHODS, (1 - 1e-9, False), (1 - 1e-9, True), (1e-6, False)])
@pytest.mark.parametrize(
    "curvature", [1e-300, 1e-30, 1e-12, 1e-3, 0.2, 0.999, 1.0, 1.5, 1.9, 2.5, 3.5, 4.5, 1e9, 1e200]
)
def test_the_exponent_has_all_digits(curvature, momentum, nesterov):
    with mpmath.workdps(700):
        largest = max(abs(root) for root in roots(curvature, momentum, nesterov))
        expected = float(-mpmath.log(largest)) if largest else math.inf
    # A root that grows or shrinks by 1e-16 per iteration is within rounding of one that does neither.
    absolute = 1e-15 if curvature > 1 else 0
    assert decay_exponent(curvature, momentum, nesterov) == pytest.approx(expected, rel=1e-12, abs=absolute)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("kappa", [1.0, 1.001, 2.0, 1e2, 1e6, 1e10])
@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e150])
def test_the_best_constants_make_a_double_root_of_the_stated_factor(nesterov, kappa, scale):
    rates = Rates(scale, kappa * scale)
    best = rates.nesterov() if nesterov else rates.heavy_ball()
    root = math.sqrt(kappa)
    assert best.step * scale * kappa == pytest.approx(4 / (3 + 1 / kappa) if nesterov else 4 / (1 + 1 / root) ** 2)
    short = 2 / math.sqrt(3 * kappa + 1) if nesterov else 2 / (root + 1)  # 1 - factor.
    assert best.contraction == pytest.approx(1 - short, rel=1e-14, abs=1e-15)
    if kappa == 1:  # All is done in one step, up to rounding.
        assert best.momentum < 1e-15
        assert best.iterations_per_decade < 0.04
        return
    assert best.iterations_per_decade == pytest.approx(-math.log(10) / 2 / math.log1p(-short), rel=1e-14)
    assert best.nesterov is nesterov
    # By the general rule. A double root moves by the square root of what rounding moves its equation by.
    decay = rates.exponent(best.step, best.momentum, best.nesterov)
    assert decay == pytest.approx(-math.log1p(-short), rel=1e-6 if kappa < 1.01 else 0, abs=1e-7)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("kappa", [3.0, 100.0])
def test_no_other_constants_are_better(nesterov, kappa):
    rates = Rates(1.0, kappa)
    best = rates.nesterov() if nesterov else rates.heavy_ball()
    for step in np.linspace(0.05, 1.5, 60) * best.step:
        for momentum in np.linspace(0, 0.999, 60):
            assert rates.contraction(step, momentum, nesterov) >= best.contraction * (1 - 1e-9)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("part", [1e-6, 0.1, 0.5, 1.0])
def test_no_other_momentum_is_better_for_a_shorter_step(nesterov, part):
    rates = Rates(0.01, 1.0)
    find = rates.nesterov if nesterov else rates.heavy_ball
    best = find(part * find().step)
    assert best.contraction == pytest.approx(1 - math.sqrt(best.step * 0.01), rel=1e-14)
    assert rates.exponent(best.step, best.momentum, nesterov) == pytest.approx(-math.log(best.contraction), rel=1e-5)
    for momentum in (best.momentum * 0.99, best.momentum + 0.01 * (1 - best.momentum)):
        assert rates.contraction(best.step, momentum, nesterov) > best.contraction


def test_without_momentum_it_is_gradient_descent():
    rates = Rates(0.02, 1.7)
    for step in np.linspace(0.01, 3, 100):
        expected = max(abs(1 - step * 0.02), abs(1 - step * 1.7))
        for nesterov in (False, True):
            assert rates.contraction(step, 0.0, nesterov) == pytest.approx(expected, rel=1e-14)


def test_known_numbers():
    """Lessard, Recht and Packard (2016), Proposition 1, at kappa = 100."""
    rates = Rates(1.0, 100.0)
    assert rates.contraction() == pytest.approx(99 / 101, rel=1e-14)
    assert rates.nesterov(1 / 100).contraction == pytest.approx(0.9, rel=1e-14)
    assert rates.nesterov(1 / 100).momentum == pytest.approx(9 / 11, rel=1e-14)
    assert rates.nesterov().contraction == pytest.approx(1 - 2 / math.sqrt(301), rel=1e-14)
    assert rates.heavy_ball().contraction == pytest.approx(9 / 11, rel=1e-14)


def iteration_matrix(hessian, step, momentum, nesterov):
    """One step of torch.optim.SGD on a quadratic, of parameters and momentum buffer."""
    eye = torch.eye(len(hessian), dtype=hessian.dtype)
    below = [hessian, momentum * eye]
    if nesterov:
        above = [eye - step * (hessian + momentum * hessian), -step * momentum**2 * eye]
    else:
        above = [eye - step * hessian, -step * momentum * eye]
    return torch.cat([torch.cat(above, 1), torch.cat(below, 1)])


SMALL = ["balanced mse", "balanced ce, free bias", "unbalanced ce", "regression", "label smoothing", "multi-label bce"]


@pytest.mark.parametrize("name", SMALL)
def test_the_factor_is_the_spectral_radius_of_the_iteration(name, generator):
    problem = CASES[name]()
    view = _View(problem, generator)
    hessian = torch.func.hessian(view.value)(view.flat(view.optimum))
    values, vectors = torch.linalg.eigh((hessian + hessian.T) / 2)
    across = vectors[:, problem.dimension :]
    across_hessian = across.T @ hessian @ across
    along = vectors[:, : problem.dimension]
    for momentum, nesterov in METHODS:
        for step in (
            0.3 / problem.smoothness,
            1 / problem.smoothness,
            1.9 / problem.smoothness,
            5 / problem.smoothness,
        ):
            matrix = iteration_matrix(across_hessian, step, momentum, nesterov)
            radius = float(torch.linalg.eigvals(matrix).abs().max())
            # Round-off of dense eigenvalues of a matrix that is not normal.
            assert problem.contraction(step, momentum, nesterov) == pytest.approx(radius, rel=1e-7)
            slowest = problem.slowest_mode(step, momentum, nesterov)
            assert isinstance(slowest, Eigenvalue)
            worst = max(max(map(abs, roots(float(v), momentum, nesterov))) for v in step * values[problem.dimension :])
            own = max(map(abs, roots(step * slowest.value, momentum, nesterov)))
            assert float(own) == pytest.approx(float(worst), rel=1e-5)
        if momentum and problem.dimension:
            # Along the set the roots are 1 and the momentum: what moves there comes to rest.
            still = torch.linalg.eigvals(iteration_matrix(along.T @ hessian @ along, 1.0, momentum, nesterov)).abs()
            expected = torch.tensor([momentum] * problem.dimension + [1.0] * problem.dimension)
            torch.testing.assert_close(still.sort().values, expected.double(), atol=1e-6, rtol=0)


def test_which_mode_is_the_slowest():
    problem = CASES["balanced ce"]()
    spectrum = [entry for entry in problem.spectrum() if entry.value > 0]
    assert problem.slowest_mode() == spectrum[0]  # Both ends are equally slow.
    assert problem.slowest_mode(1.9 / problem.smoothness) == spectrum[-1]
    best = problem.heavy_ball()
    assert problem.slowest_mode(best.step, best.momentum) == spectrum[0]
    assert problem.slowest_mode(best.step, best.momentum * 0.9).value in (spectrum[0].value, spectrum[-1].value)
    threshold = UFMProblem("ce", 4, 4, 6, 0.125, 0.125)
    assert threshold.slowest_mode(1.0, 0.5).value == 0.0
    assert threshold.contraction(1.0, 0.5) == 1.0
    assert threshold.iterations_per_decade(1.0, 0.5) == math.inf


# Conditions from 5 to 500, all kinds of targets and losses.
TEN = [
    "balanced mse",
    "balanced ce",
    "two classes, one sample, one feature",
    "mse without bias",
    "penalized bias",
    "unbalanced mse",
    "unbalanced ce",
    "label smoothing",
    "multi-label bce, free bias",
    "regression",
]


@pytest.mark.parametrize("method", ["heavy_ball", "nesterov"])
@pytest.mark.parametrize("name", TEN)
def test_runs_contract_as_predicted(name, method, generator):
    """From a random start near the set, with torch's own optimizer."""
    problem = CASES[name]()
    view, best = _View(problem, generator), getattr(problem, method)()
    flat, direction = view.flat(view.optimum), view.draw()
    x = torch.nn.Parameter(flat + 1e-3 * (1 + float(flat.norm())) * direction / direction.norm())
    optimizer = torch.optim.SGD([x], lr=best.step, momentum=best.momentum, nesterov=best.nesterov)
    start, logs = distance(view, x), []
    while len(logs) < 2 or logs[-1] > math.log(1e-9 * start):
        x.grad = view.gradient(x)
        optimizer.step()
        logs.append(math.log(distance(view, x)))
        assert len(logs) < 5000
    # A double root leaves k factor^k, whose slope is off by 1/k at iteration k.
    corrected = np.array(logs) - np.log(1 + np.arange(1, len(logs) + 1) * (1 - best.contraction))
    half = len(logs) // 2
    slope = np.polyfit(np.arange(half, len(logs)), corrected[half:], 1)[0]
    # Other modes are still dying out: 0.8% where many are almost as slow.
    assert slope == pytest.approx(math.log(best.contraction), rel=0.02)


def distance(view, x):
    return float(view.problem.distance(*view.point(x.detach())))


def test_what_moves_along_the_set_comes_to_rest(generator):
    problem = CASES["balanced ce"]()
    view = _View(problem, generator)
    flat = view.flat(view.optimum)
    vectors = torch.linalg.eigh(torch.func.hessian(view.value)(flat)).eigenvectors
    tangent = vectors[:, : problem.dimension] @ torch.randn(problem.dimension, dtype=flat.dtype, generator=generator)
    best, x = problem.heavy_ball(), torch.nn.Parameter(flat.clone())
    optimizer = torch.optim.SGD([x], lr=best.step, momentum=best.momentum)
    optimizer.state[x]["momentum_buffer"] = 1e-3 * tangent / tangent.norm() / best.step
    for _ in range(400):
        x.grad = view.gradient(x)
        before = x.detach().clone()
        optimizer.step()
    moved = float((x.detach() - flat).norm())
    # Steps of 1e-3, less each time by the factor of the momentum.
    assert moved == pytest.approx(1e-3 * best.momentum / (1 - best.momentum), rel=0.05)
    assert float((x.detach() - before).norm()) < 1e-12
    assert distance(view, x) < 1e-12


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda p: p.contraction(1.0, 1.0), "momentum must be at least 0 and below 1, got 1.0"),
        (lambda p: p.contraction(1.0, -0.1), "momentum must be at least 0 and below 1, got -0.1"),
        (lambda p: p.iterations_per_decade(1.0, math.nan), "momentum must be at least 0 and below 1, got nan"),
        (lambda p: p.contraction(momentum=0.9), "step is missing: give it together with the momentum"),
        (lambda p: p.slowest_mode(-1.0, 0.9), "step must be positive and finite, got -1.0"),
        (lambda p: p.heavy_ball(1e9), r"step must be positive and at most the best one, .*, got 1e\+?0?9|1000000000"),
        (lambda p: p.nesterov(0.0), "step must be positive and at most the best one"),
        (lambda p: UFMProblem("ce", 4, 4, 6, 0.125, 0.125).heavy_ball(), "mu is 0: at a threshold"),
        (lambda p: Rates(2.0, 1.0), "0 <= mu <= smoothness, got 2.0 and 1.0"),
        (lambda p: Rates(-1e-9, 1.0), "0 <= mu <= smoothness, got -1e-09"),
        (lambda p: Rates(math.nan, 1.0), "0 <= mu <= smoothness, got nan"),
        (lambda p: Rates(1.0, math.inf), "0 <= mu <= smoothness, got 1.0 and inf"),
    ],
)
def test_what_cannot_be_is_refused(ask, message):
    with pytest.raises(ValueError, match=message):
        ask(CASES["balanced ce"]())
