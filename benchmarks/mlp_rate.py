"""What limits the rate of the two-layer network? Prints the tables of docs/mlp.md.

    python benchmarks/mlp_rate.py

First table: the kernel of initial networks. Second: at the end of three runs of mlp_search.py, rates per unit of step.

Kernel: J J^T of size N d, with J the derivative of all features by the parameters of the backbone; a step of gradient
descent moves the features by -step J J^T (gradient with respect to the features). Hessian: of the objective by all
parameters. Both are applied to vectors by automatic differentiation through the network and never formed; eigenvalues
are Lanczos', with the residual |A v - e v| / e printed next to them.
"""

import argparse
import math
import time
from dataclasses import replace

import numpy as np
import torch
from mlp_search import CE, MSE, PAPER, build, run
from scipy.linalg import eigh_tridiagonal
from scipy.sparse.linalg import LinearOperator, eigsh

from nclightning.figures import fit_rate
from nclightning.models import UFM


def feature_kernel(backbone, x):
    """J J^T as an operator on features of x, flattened."""
    parameters, features = list(backbone.parameters()), backbone(x)
    probe = torch.zeros_like(features, requires_grad=True)
    # Linear in the probe: its derivative, taken backwards once more, is J.
    pulled = torch.autograd.grad(features, parameters, probe, create_graph=True)

    def apply(vector):
        cotangent = torch.from_numpy(vector).view_as(features)
        back = torch.autograd.grad(features, parameters, cotangent, retain_graph=True)
        return torch.autograd.grad(pulled, probe, back, retain_graph=True)[0].reshape(-1).numpy()

    return LinearOperator((features.numel(),) * 2, matvec=apply, dtype=np.float64)


def hessian(model, batch):
    """Hessian of the objective as an operator on all parameters, flattened."""
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(model.evaluate_objective(batch), parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradient])

    def apply(vector):
        product = torch.autograd.grad(flat, parameters, torch.from_numpy(vector.reshape(-1)), retain_graph=True)
        return torch.cat([p.reshape(-1) for p in product]).numpy()

    return LinearOperator((len(flat),) * 2, matvec=apply, dtype=np.float64)


def start_vector(size):
    return np.random.default_rng(0).standard_normal(size)


def extremes(operator, which, count=1, tolerance=1e-3):
    """Return eigenvalues, largest first, and the largest relative residual."""
    size = operator.shape[0]
    basis = min(size - 1, 60 + count)
    values, vectors = eigsh(operator, count, which=which, tol=tolerance, ncv=basis, v0=start_vector(size))
    misfit = [np.linalg.norm(operator @ v - e * v) / abs(e) for e, v in zip(values, vectors.T, strict=True)]
    return values[::-1], max(misfit)


def least_curvature(operator, steps=300, zero=1e-6, tolerance=1e-2):
    """Return the smallest nonzero eigenvalue of a positive semidefinite operator, and its relative residual.

    Lanczos from a vector in the range, where the eigenvalue zero does not occur. It enters by round-off, late, so the
    iteration ends as soon as the smallest Ritz value above ``zero`` times the largest has the tolerance. All vectors
    are kept, for orthogonality.
    """
    size = operator.shape[0]
    vector = operator @ (operator @ start_vector(size))
    basis, diagonal, beside = [], [], [np.linalg.norm(vector)]
    while True:
        basis.append(vector / beside[-1])
        vector = operator @ basis[-1]
        diagonal.append(basis[-1] @ vector)
        for _ in range(2):  # Once is not enough.
            for old in basis:
                vector = vector - (old @ vector) * old
        beside.append(np.linalg.norm(vector))
        exhausted = len(basis) >= min(steps, size) or beside[-1] <= 1e-12 * beside[0]
        if exhausted or len(basis) % 10 == 0:
            values, vectors = eigh_tridiagonal(diagonal, beside[1:-1])
            first = int(np.argmax(values > zero * values[-1]))
            misfit = beside[-1] * abs(vectors[-1, first]) / values[first]
            if exhausted or misfit <= tolerance:
                return values[first], misfit


def ufm_curvature(problem, kappa=1.0):
    """Smallest nonzero curvature of the unconstrained feature model at its optimum, its features kappa times as fast.

    With kappa the smallest eigenvalue of a network's kernel it is a lower bound of the network's: the nonzero
    eigenvalues of its Hessian at an optimum are those of H^(1/2) T H^(1/2), with H the Hessian by features and head
    and T the kernel on features, the identity on the head; and T is at least diag(kappa, 1).
    """
    sizes = (problem.num_classes, problem.samples_per_class, problem.feature_dim)
    model = UFM(*sizes, problem.loss, problem.lambda_w, problem.lambda_h)
    optimum = problem.random_optimum(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.backbone.features.copy_(optimum.features)
        model.head.weight.copy_(optimum.weight)
        if optimum.bias is not None:
            model.head.bias.copy_(optimum.bias)
    plain = hessian(model, (torch.arange(problem.num_samples), optimum.labels))
    speed = np.ones(plain.shape[0])
    speed[: optimum.features.numel()] = math.sqrt(kappa)  # The backbone's parameters come first.
    scaled = LinearOperator(plain.shape, matvec=lambda v: speed * (plain @ (speed * v)), dtype=np.float64)
    return least_curvature(scaled, tolerance=1e-8)[0]  # Few eigenvalues, some of them close to each other.


def initial_row(first, sizes=PAPER):
    """Measure the kernel of an initial network."""
    model, (x, _) = build(replace(CE, first=first), sizes)
    kernel = feature_kernel(model.backbone, x)
    top, misfit = extremes(kernel, "LA", sizes["feature_dim"] + 1, 1e-2)
    (least,), misfit_least = extremes(kernel, "SA")
    return (
        f"| {first:g} | {top[0]:.3g} | {top[-2]:.3g} | {top[-1]:.3g} | {least:.3g} | {max(misfit, misfit_least):.0e} |"
    )


def final_column(setting, sizes=PAPER):
    """Measure kernel and Hessian at the end of a run, and the rate of its gap per unit of step."""
    model, batch, readings = run(setting, sizes)
    kernel, curvature = feature_kernel(model.backbone, batch[0]), hessian(model, batch)
    (least,), misfit_least = extremes(kernel, "SA")
    (most,), misfit_most = extremes(kernel, "LA")
    (sharpest,), misfit_sharpest = extremes(curvature, "LA", tolerance=1e-6)
    flattest, misfit_flattest = least_curvature(curvature)
    fall = -math.log(10) * fit_rate(readings[:, 0], readings[:, 1]).slope
    edge = -2 * math.log(abs(1 - setting.step * sharpest)) / setting.step
    return {
        "loss": setting.loss,
        "lambda": f"{setting.lam:g}",
        "iterations": f"{readings[-1, 0]:.0f}",
        "gap": f"{readings[-1, 1]:.0e}",
        "kernel, smallest: kappa": f"{least:.3g}",
        "kernel, largest": f"{most:.3g}",
        "rate of the gap, measured": f"{fall / setting.step:.3g}",
        "2 x least curvature of F": f"{2 * flattest:.3g}",
        "2 lambda kappa": f"{2 * setting.lam * least:.3g}",
        "2 mu, features kappa times as fast": f"{2 * ufm_curvature(model.problem, least):.3g}",
        "2 mu of the UFM itself": f"{2 * ufm_curvature(model.problem):.3g}",
        "greatest curvature of F": f"{sharpest:.4g}",
        "2 / greatest": f"{2 / sharpest:.4g}",
        "-2 ln(abs(1 - step x greatest)) / step": f"{edge:.3g}",
        "step": f"{setting.step:g}",
        "largest residual": f"{max(misfit_least, misfit_most, misfit_sharpest, misfit_flattest):.0e}",
    }


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    print("| first layer | kernel: largest | 20th | 21st | smallest | residual |\n|---|---|---|---|---|---|")
    for first in (1.0, 0.1):
        print(initial_row(first), flush=True)
    columns = [final_column(setting) for setting in (CE, replace(CE, lam=9e-4, iterations=3500), MSE)]
    print("\n| | run 1 | run 2 | run 3 |\n|---|---|---|---|")
    for name in columns[0]:
        print(f"| {name} | {' | '.join(column[name] for column in columns)} |")
    print(f"\ntorch {torch.__version__}, one thread, {(time.perf_counter() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
