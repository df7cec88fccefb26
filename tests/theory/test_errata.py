"""One test per erratum of docs/paper.md: what is printed fails, what we hold is true."""

import math

import lightning as L
import pytest
import torch
from torch import nn

from nclightning.functional import class_statistics, etf_deviation, self_duality
from nclightning.models import RegularizedClassifier
from nclightning.objective import Objective
from nclightning.theory import UFMProblem
from tests.helpers import dense_hessian, gradient_norm

PAPER = UFMProblem("mse", 10, 10, 20, 5e-2, 5e-3)


def hessian_spectrum(problem, generator):
    """Eigenvalues of the objective's dense Hessian at a random optimum, by autograd, ascending."""
    return torch.linalg.eigvalsh(dense_hessian(problem, problem.random_optimum(generator)))


def smallest_nonzero(spectrum):
    return float(spectrum[spectrum > 1e-10 * spectrum[-1]][0])


def test_e1_nc2_and_nc3_need_one_over_k(generator):
    K, optimum = 10, PAPER.random_optimum(generator)
    gram = optimum.weight @ optimum.weight.T
    eye, ones = torch.eye(K, dtype=torch.float64), torch.ones(K, K, dtype=torch.float64)
    printed = torch.linalg.matrix_norm(gram / torch.linalg.matrix_norm(gram) - (eye - ones) / math.sqrt(K - 1))
    assert float(printed) == pytest.approx(math.sqrt(K - 1), rel=1e-12)
    # Round-off of K^2 entries of size 1/3.
    assert float(etf_deviation(optimum.weight)) <= 1e-14
    stats = class_statistics(optimum.features, optimum.labels, K)
    assert float(self_duality(stats, optimum.weight)) <= 1e-14


def test_e2_the_zero_block_of_proposition_1_does_not_fit(generator):
    d, K = PAPER.feature_dim, PAPER.num_classes
    U = torch.linalg.qr(torch.randn(d, K - 1, dtype=torch.float64, generator=generator)).Q
    basis = torch.linalg.qr(torch.eye(K, dtype=torch.float64) - 1 / K).Q[:, : K - 1]
    printed = torch.cat([U @ basis.T, torch.zeros(1, K, dtype=torch.float64)])
    assert len(printed) > d
    scale = (10 * PAPER.lambda_h / PAPER.lambda_w) ** 0.25 * math.sqrt(1 - K * PAPER.q)
    held = scale * (U @ basis.T).T
    assert held.shape == (K, d)
    features = PAPER.ratio * held[PAPER.labels()]
    bias = torch.full((K,), 1 / K, dtype=torch.float64)
    assert float(PAPER.optimality_gap(held, features, PAPER.labels(), bias)) <= 1e-28


def test_e3_proposition_3_holds_for_d_equal_to_k_minus_1(generator):
    problem = UFMProblem("ce", 4, 2, 3, 0.02, 0.02)
    # As printed the solutions need U with K orthonormal columns in R^d: there is none for d = K - 1.
    assert torch.linalg.matrix_rank(torch.randn(3, 4, generator=generator)) < 4
    optimum = problem.random_optimum(generator)
    assert gradient_norm(problem, optimum) <= 1e-13
    wide = UFMProblem("ce", 4, 2, 9, 0.02, 0.02)
    assert problem.optimal_value == wide.optimal_value


def test_e4_fact_1_also_admits_the_saddle_at_zero():
    labels = PAPER.labels()
    saddle = (
        torch.zeros(10, 20, dtype=torch.float64),
        torch.zeros(100, 20, dtype=torch.float64),
        labels,
        torch.full((10,), 0.1, dtype=torch.float64),
    )
    point = PAPER.random_optimum()._replace(weight=saddle[0], features=saddle[1], bias=saddle[3])
    # The constant sequence at this point satisfies (i) and (iii) with both sides zero, and (ii) trivially ...
    assert gradient_norm(PAPER, point) <= 1e-16
    # ... and does not converge to the minimum.
    assert float(PAPER.optimality_gap(*saddle)) > 0.1


@pytest.mark.parametrize("num_classes", [3, 4])
def test_e5_cross_entropy_has_an_error_bound_beyond_two_classes(num_classes, generator):
    K, d = num_classes, num_classes + 1
    spectrum = hessian_spectrum(UFMProblem("ce", K, 2, d, 0.02, 0.02), generator)
    zeros = int((spectrum.abs() <= 1e-10 * spectrum[-1]).sum())
    assert zeros == d * (K - 1) - K * (K - 1) // 2  # The dimension of the optimal set: no other flat direction.
    assert smallest_nonzero(spectrum) > 0


def test_e6_the_rate_depends_on_the_penalties(generator):
    spectra = [hessian_spectrum(UFMProblem("mse", 3, 2, 3, 2 * lam, lam), generator) for lam in (5e-2, 5e-3)]
    conditions = [float(s[-1]) / smallest_nonzero(s) for s in spectra]
    assert conditions[1] > 5 * conditions[0]


def test_e7_the_error_bound_constant_depends_on_n_and_k(generator):
    constants = [
        1 / smallest_nonzero(hessian_spectrum(UFMProblem("ce", K, n, 4, 0.08, 0.08), generator))
        for K, n in ((3, 6), (3, 9), (4, 6))
    ]
    assert max(constants) > 1.05 * min(constants)
    assert len({round(c, 6) for c in constants}) == 3


def test_e8_inputs_have_a_dimension_of_their_own():
    input_dim, feature_dim = 1000, 20
    model = RegularizedClassifier(
        nn.Linear(input_dim, feature_dim), nn.Linear(feature_dim, 10), Objective("ce", 0.1, 0.1), 5
    )
    assert isinstance(model, L.LightningModule)
    assert model(torch.zeros(5, input_dim)).shape == (5, 10)


def test_e9_labels_drawn_uniformly_are_not_balanced(generator):
    drawn = torch.randint(10, (100,), generator=generator)
    with pytest.raises(ValueError, match="exactly 10 times"):
        PAPER.check_labels(drawn)
    PAPER.check_labels(PAPER.labels()[torch.randperm(100, generator=generator)])
