"""One test per erratum of docs/paper.md: what is printed fails, what we hold is true."""

import math
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml

from nclightning.data import GaussianDataModule
from nclightning.functional import class_statistics, etf_deviation, self_duality
from nclightning.models import TwoLayerMLP
from nclightning.theory import UFMProblem
from tests.helpers import dense_hessian, gradient_norm
from tests.trainers import quiet_trainer

ROOT = Path(__file__).resolve().parents[2]
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


def objective(problem, W, H, b=None):
    """Problem (5) or (8) in the columns of the paper, written anew: ``W (d, K)``, ``H (d, N)`` class after class."""
    K, N = W.shape[1], H.shape[1]
    labels = torch.arange(K).repeat_interleave(N // K)
    logits = W.T @ H + (0 if b is None else b.unsqueeze(1))
    if problem.loss == "mse":
        loss = (logits - torch.eye(K, dtype=W.dtype)[:, labels]).square().sum() / (2 * N)
    else:
        loss = (logits.logsumexp(dim=0) - logits[labels, torch.arange(N)]).mean()
    return loss + problem.lambda_w / 2 * W.square().sum() + problem.lambda_h / 2 * H.square().sum()


def least_value(problem, generator):
    """Minimum of the objective as an optimizer finds it, the least of several starts."""
    K, d, N = problem.num_classes, problem.feature_dim, problem.num_samples
    values = []
    for _ in range(3):
        draw = lambda *s: torch.randn(*s, dtype=torch.float64, generator=generator).requires_grad_()  # noqa: E731
        parts = [draw(d, K), draw(d, N)] + ([draw(K)] if problem.loss == "mse" else [])
        search = torch.optim.LBFGS(
            parts, max_iter=3000, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
        )

        def closure(search=search, parts=parts):
            search.zero_grad()
            value = objective(problem, *parts)
            value.backward()
            return value

        search.step(closure)
        values.append(float(objective(problem, *parts).detach()))
    return min(values)


def orthonormal(rows, columns, generator):
    """A random ``U`` with orthonormal columns, or rows where there are fewer of those."""
    drawn = torch.randn(max(rows, columns), min(rows, columns), dtype=torch.float64, generator=generator)
    return torch.linalg.qr(drawn).Q if rows >= columns else torch.linalg.qr(drawn).Q.T


def test_e2_the_zero_block_of_proposition_1_does_not_fit(generator):
    problem = UFMProblem("mse", 4, 2, 6, 5e-2, 3e-2)
    K, n, d = 4, 2, 6
    U = orthonormal(d, K - 1, generator)
    vectors = torch.linalg.eigh(torch.eye(K, dtype=torch.float64) - 1 / K).eigenvectors[:, 1:]  # Of P: V bar.
    gamma = 1 - K * (n * problem.lambda_w * problem.lambda_h) ** 0.5
    scale = (n * problem.lambda_h / problem.lambda_w) ** 0.25 * gamma**0.5
    ratio, bias = (problem.lambda_w / (n * problem.lambda_h)) ** 0.5, torch.full((K,), 1 / K, dtype=torch.float64)
    features = (ratio * scale * U @ vectors.T).repeat_interleave(n, dim=1)
    assert features.shape == (d, n * K)
    # As printed, U with K - 1 columns and a zero block below it: the logits W^T h of features in R^d do not exist.
    printed = scale * torch.cat([U @ vectors.T, torch.zeros(1, K, dtype=torch.float64)])
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        objective(problem, printed, features, bias)
    # Without it they do, and no optimizer finds less.
    held = float(objective(problem, scale * U @ vectors.T, features, bias))
    assert held == pytest.approx(least_value(problem, generator), rel=1e-10)
    assert held == pytest.approx(problem.optimal_value, rel=1e-12)


def test_e3_proposition_3_holds_for_d_equal_to_k_minus_1(generator):
    K, n, d = 4, 2, 3
    problem = UFMProblem("ce", K, n, d, 0.02, 0.03)
    least = least_value(problem, generator)
    q = (n * problem.lambda_w * problem.lambda_h) ** 0.5
    s, ratio = math.log(1 / q - K + 1), (problem.lambda_w / (n * problem.lambda_h)) ** 0.5
    centring = torch.eye(K, dtype=torch.float64) - 1 / K

    def value_of(frame):
        W = (s / ratio) ** 0.5 * frame
        return float(objective(problem, W, ratio * W.repeat_interleave(n, dim=1)))

    # As printed, U P with U of K columns in R^d: they cannot be orthonormal, and with orthonormal rows it misses.
    U = orthonormal(d, K, generator)
    assert torch.linalg.matrix_norm(U.T @ U - torch.eye(K, dtype=torch.float64)) >= 1 - 1e-12
    assert value_of(U @ centring) > least + 1e-3
    # U of K - 1 columns, times the eigenvectors of P, attains the minimum that an optimizer finds.
    vectors = torch.linalg.eigh(centring).eigenvectors[:, 1:]
    assert value_of(orthonormal(d, K - 1, generator) @ vectors.T) == pytest.approx(least, rel=1e-10)
    assert problem.optimal_value == pytest.approx(least, rel=1e-10)


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


def test_e8_inputs_have_a_dimension_of_their_own(tmp_path):
    """The data of Sec. 3, as shipped: D = 1000 inputs, and features of d = 20."""
    settings = yaml.safe_load((ROOT / "configs" / "mlp_mse.yaml").read_text())["model"]["init_args"]
    model = TwoLayerMLP(**{k: v for k, v in settings.items() if k not in ("optimizer", "lambda")}, lambda_=1e-3)
    seen = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(batch[0])

    quiet_trainer(tmp_path, max_steps=1, callbacks=[Watch()]).fit(model, GaussianDataModule())
    (inputs,) = seen
    assert inputs.shape[1] == 1000
    assert model.features_of(inputs).shape == (len(inputs), 20)
    # As printed, x lies in the R^d of the features: no such network takes these inputs.
    printed = TwoLayerMLP(10, 10, 20, "mse", lambda_=1e-3, input_dim=20)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        printed(inputs)


def test_e9_labels_drawn_uniformly_are_not_balanced(generator):
    drawn = torch.randint(10, (100,), generator=generator)
    with pytest.raises(ValueError, match="exactly 10 times"):
        PAPER.check_labels(drawn)
    PAPER.check_labels(PAPER.labels()[torch.randperm(100, generator=generator)])
