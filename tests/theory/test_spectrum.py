"""The closed-form spectrum, against dense Hessians by autograd and in 70 digits."""

import itertools
import math

import pytest
import torch

from nclightning.objective import Objective
from nclightning.theory import UFMProblem
from tests.cases import EXTREME, SPECTRUM, name_of
from tests.helpers import Largest, dense_hessian, random_point
from tests.theory import multiprecision
from tests.theory.multiprecision import exact_spectrum

EPS = torch.finfo(torch.float64).eps


def expand(problem):
    """Eigenvalues with multiplicities, ascending."""
    return torch.tensor([e.value for e in problem.spectrum() for _ in range(e.multiplicity)], dtype=torch.float64)


def flat_directions(problem):
    """Zeros of the Hessian: the optimal set's dimension, and at the threshold the directions of the pitchfork."""
    return problem.feature_dim * (problem.num_classes - 1) if problem.slack == 0 else problem.dimension


def test_grid_is_as_wide_as_it_should_be():
    assert len(SPECTRUM) >= 200
    assert {p.loss for p in SPECTRUM} == {"mse", "ce"}
    assert {p.collapses for p in SPECTRUM} == {True, False}
    assert any(p.slack == 0 for p in SPECTRUM)
    assert any(p.rank < p.num_classes - 1 for p in SPECTRUM)


def parts_of(point):
    return [t for t in (point.weight, point.features, point.bias) if t is not None]


def hessians(problems, points):
    """Dense Hessians of problems of one loss and one size, by autograd, all in one call: their size is not the cost."""
    shapes = [t.shape for t in parts_of(points[0])]
    loss = Objective(problems[0].loss, 0.0, 0.0)

    def value(flat, labels, lambda_w, lambda_h):
        pieces = flat.split([shape.numel() for shape in shapes])
        W, H, *bias = (piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True))
        penalties = lambda_w / 2 * W.square().sum() + lambda_h / 2 * H.square().sum()
        return loss(W, H, labels, *bias) + penalties

    penalties = torch.tensor([(p.lambda_w, p.lambda_h) for p in problems], dtype=torch.float64)
    flat = torch.stack([torch.cat([t.flatten() for t in parts_of(point)]) for point in points])
    labels = torch.stack([point.labels for point in points])
    return torch.func.vmap(torch.func.hessian(value))(flat, labels, *penalties.T)


OF_ONE_SIZE = {
    "-".join(map(str, key)): list(problems)
    for key, problems in itertools.groupby(
        SPECTRUM, lambda p: (p.loss, p.num_classes, p.samples_per_class, p.feature_dim)
    )
}


@pytest.mark.parametrize("size", OF_ONE_SIZE)
def test_spectrum_is_that_of_the_dense_hessian(size, generator):
    problems = OF_ONE_SIZE[size]
    spectra = torch.linalg.eigvalsh(hessians(problems, [p.random_optimum(generator) for p in problems]))
    for problem, dense in zip(problems, spectra, strict=True):
        predicted = expand(problem)
        assert len(dense) == len(predicted)
        largest, zeros = float(predicted[-1]), predicted == 0
        # eigvalsh, and the Hessian that it is given, are off by roundings of L whatever the eigenvalue: 59 of them at
        # most were seen. No eigenvalue of the grid is below 7e-5 L, where 1e-9 of it are 300 roundings; the zeros get
        # 200.
        noise = 200 * EPS * largest
        assert ((dense - predicted).abs() <= torch.where(zeros, noise, 1e-9 * predicted)).all(), problem
        assert int(zeros.sum()) == flat_directions(problem), problem
        # Nothing else is small: the count of zeros is not one of tolerance.
        assert float(predicted[~zeros].min()) > 1000 * noise, problem


@pytest.mark.parametrize("problem", EXTREME, ids=name_of)
def test_spectrum_agrees_with_70_digits(problem):
    exact, predicted = exact_spectrum(problem), expand(problem)
    for ours, theirs in zip(predicted.tolist(), exact, strict=True):
        # A handful of roundings in products and quotients of positive numbers, at any size; 5e-16 was the worst seen.
        assert abs(ours - theirs) <= (1e-14 * theirs if ours else 1e-60)


@pytest.mark.parametrize(
    ("lambda_w", "lambda_h"), [(1e-170, 1e-170), (1e-200, 1e-150), (1e-10, 1e-300), (1e-300, 1e-10)]
)
@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_penalties_whose_product_is_below_the_range(loss, lambda_w, lambda_h, monkeypatch):
    problem = UFMProblem(loss, 3, 1, 2, lambda_w, lambda_h)
    monkeypatch.setattr(multiprecision, "DIGITS", 700)  # Eigenvalues are up to 450 decades apart.
    # The largest first; the zeros of the exact spectrum are what 700 digits leave of them.
    for ours, theirs in zip(reversed(expand(problem).tolist()), reversed(exact_spectrum(problem)), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-14, abs=0) or (ours == 0 and abs(theirs) < 1e-310)


@pytest.mark.parametrize("problem", [p for p in SPECTRUM if p.collapses][::7], ids=name_of)
def test_hessian_at_the_origin_below_the_threshold_has_a_way_out(problem, generator):
    """The same formula as above the threshold, now with a negative root: the origin is a strict saddle."""
    K, n, lw, lh = problem.num_classes, problem.samples_per_class, problem.lambda_w, problem.lambda_h
    zero = random_point(problem, generator, 0.0)
    if zero.bias is not None:
        zero = zero._replace(bias=torch.full((K,), 1 / K, dtype=torch.float64))
    dense = torch.linalg.eigvalsh(dense_hessian(problem, zero))
    lowest = (lw + lh - math.hypot(lw - lh, 2 / (K * math.sqrt(n)))) / 2
    assert lowest < 0
    # Half the difference of numbers of the size of L.
    assert (dense[: problem.feature_dim * (K - 1)] - lowest).abs().max() <= 200 * EPS * dense[-1]
    assert (dense[problem.feature_dim * (K - 1) :] > 0).all()


EVERY_SIZE = [
    UFMProblem(loss, K, n, d, lam * n, lam)
    for loss, K, n, d, lam in itertools.product(
        ("mse", "ce"), (2, 3, 4, 7, 1000), (1, 2, 1300), (1, 3, 6, 999, 1000, 2048), (1e-9, 1e-4, 1.0)
    )
    if loss == "mse" or d >= K - 1
]


def test_multiplicities_sum_to_the_number_of_free_variables():
    for problem in EVERY_SIZE:
        free = problem.feature_dim * (problem.num_classes + problem.num_samples)
        entries = problem.spectrum()
        assert sum(e.multiplicity for e in entries) == free + (problem.num_classes if problem.loss == "mse" else 0)
        assert all(e.multiplicity > 0 for e in entries)
        assert sum(e.multiplicity for e in entries if e.value == 0) == problem.dimension
        assert list(entries) == sorted(entries)


@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_sizes_of_imagenet_take_no_time(loss):
    problem = UFMProblem(loss, 1000, 1300, 2048, 1300 * 5e-9, 5e-9)
    with Largest() as largest:
        entries = problem.spectrum()
    # Tens of floating-point operations and a 3x3 eigenproblem. A dense Hessian would have 2.7e9 rows.
    assert largest.elements <= 64
    assert len(entries) < 25
    assert 0 < problem.mu < problem.smoothness


def test_spectrum_of_the_paper_sizes_in_numbers():
    """K = n = 10, d = 20, lambda = 5e-4: digits of the dense Hessian of 2210 and 2200 variables."""
    mse = {
        (float(f"{e.value:.6e}"), e.sector): e.multiplicity
        for e in UFMProblem("mse", 10, 10, 20, 5e-3, 5e-4).spectrum()
    }
    assert mse[4.952924e-4, "mean of the features with bias"] == 9
    assert mse[1.755282e-3, "symmetric"] == 45
    assert mse[0.1082447, "symmetric"] == 45
    ce = {
        (float(f"{e.value:.6e}"), e.sector): e.multiplicity for e in UFMProblem("ce", 10, 10, 20, 5e-3, 5e-4).spectrum()
    }
    assert ce[6.814690e-4, "symmetric, zero diagonal"] == 35
    assert ce[7.568730e-4, "symmetric with mean of the features"] == 9
    assert ce[3.149496e-2, "symmetric, scale"] == 1


@pytest.mark.parametrize("problem", [p for p in SPECTRUM if p.collapses], ids=name_of)
def test_mu_is_above_the_bound_of_the_error_bound_theorem(problem):
    """The statement of docs/theory.md: positive for every K, n, d below the threshold."""
    lw, lh, K, s = problem.lambda_w, problem.lambda_h, problem.num_classes, problem.logit_scale
    if problem.loss == "ce":
        bound = min(lw, lh, 4 * s * lw * lh / ((K + s) * (lw + lh)))
    else:
        bound = min(lw, lh / (1 + lh / (K * problem.q)), 4 * problem.slack * lw * lh / (lw + lh))
    # For K = 2 and MSE with its smallest sector the bound may be attained, up to roundings.
    assert problem.mu >= bound * (1 - 10 * EPS)


def test_slack_keeps_its_digits_at_the_threshold():
    """Penalties exact in binary: ``1 - (K q)^2`` is known in closed form."""
    tiny = 2.0**-40
    problem = UFMProblem("mse", 4, 4, 5, lambda_w=2.0**-3 * (1 - tiny), lambda_h=2.0**-3)
    # 1 - sqrt(1 - x) = x / 2 + x^2 / 8 + ...
    assert problem.slack == pytest.approx(tiny / 2 + tiny**2 / 8, rel=1e-15)
    # Closer than the roundings of K q: at the threshold.
    problem = UFMProblem("mse", 4, 4, 5, lambda_w=2.0**-3 * (1 - tiny), lambda_h=2.0**-3 * (1 + tiny))
    assert problem.slack == 0.0
    assert not problem.collapses
