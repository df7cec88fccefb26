r"""Eigenvalues of the Hessian of F at its optimal set, in closed form.

The Hessian splits into repeated blocks: deviations within classes; means orthogonal to the range of the head; and means
in that range, where deviations of head and features form square matrices that split into symmetric and skew ones. A
block is a number, or, with :math:`\Pi = \lambda_W\lambda_H`, a copy of

.. math:: B(\rho) = \begin{pmatrix} (1+\rho)\lambda_W & (\rho-1)\sqrt\Pi \\ \cdot & (1+\rho)\lambda_H \end{pmatrix},

of a 2x2 block that couples the mean feature with the bias (MSE), or of one 3x3 block (CE). Small eigenvalues are
computed as products and quotients of positive terms, never as differences. So their relative error is a few roundings,
however small they are. Derivation in ``docs/theory.md``; legend in :mod:`nclightning.theory.problem`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from nclightning.problems import Eigenvalue

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nclightning.theory.constants import UFMConstants

__all__ = ["spectrum"]


def spectrum(problem: UFMConstants) -> tuple[Eigenvalue, ...]:
    """List the eigenvalues, ordered by value and then by sector. The cost does not depend on the sizes.

    Args:
        problem: Sizes and penalties.

    Returns:
        Entries whose multiplicities sum to the number of variables: ``(K + N) d``, and for MSE K more. Several sectors
        may have the same value.
    """
    if problem.collapses:
        in_range = _mse(problem) if problem.loss == "mse" else _cross_entropy(problem)
        entries = [*_orthogonal(problem), *in_range]
    else:
        entries = _at_zero(problem)
    return tuple(sorted(e for e in entries if e.multiplicity > 0))


def _at_zero(problem: UFMConstants) -> list[Eigenvalue]:
    """List the eigenvalues at and above the threshold, where the optimum is zero and only means and head couple."""
    K, n, d = problem.num_classes, problem.samples_per_class, problem.feature_dim
    lw, lh = problem.lambda_w, problem.lambda_h
    large = (lw + lh + math.hypot(lw - lh, 2 / (K * math.sqrt(n)))) / 2
    small = -problem.slack * (1 + K * problem.q) / (K**2 * n * large)
    return [
        Eigenvalue(abs(small), d * (K - 1), "head and feature means"),
        Eigenvalue(large, d * (K - 1), "head and feature means"),
        Eigenvalue(lw, d, "mean of the head"),
        Eigenvalue(lh, d, "mean of the features"),
        Eigenvalue(lh, (n - 1) * K * d, "within-class"),
        Eigenvalue(1.0, K if problem.loss == "mse" else 0, "bias"),
    ]


def _orthogonal(problem: UFMConstants) -> Iterator[Eigenvalue]:
    """Yield the eigenvalues of deviations whose rows are orthogonal to the range of the head, for both losses."""
    K, n = problem.num_classes, problem.samples_per_class
    lw, lh, r = problem.lambda_w, problem.lambda_h, problem.rank
    m = problem.feature_dim - r
    yield Eigenvalue(lh, (n - 1) * K * m, "within-class, orthogonal")
    yield Eigenvalue(0.0, m * r, "means, orthogonal")
    yield Eigenvalue(lw + lh, m * r, "means, orthogonal")
    yield Eigenvalue(lw, m, "mean of the head, orthogonal")
    yield Eigenvalue(lh, m, "mean of the features, orthogonal")


def _mse(problem: UFMConstants) -> Iterator[Eigenvalue]:
    """Yield the eigenvalues in the range of the head. With ``d < K - 1``, ``e`` directions of the optimum vanish."""
    K, n = problem.num_classes, problem.samples_per_class
    lw, lh, r = problem.lambda_w, problem.lambda_h, problem.rank
    e, Kq = K - 1 - r, K * problem.q
    rho = problem.slack / Kq
    yield Eigenvalue(lh / Kq, (n - 1) * K * r, "within-class, in range")
    yield from _pair(problem, rho, r * (r + 1) // 2, "symmetric")
    yield Eigenvalue(0.0, r * (r - 1) // 2, "skew")
    yield Eigenvalue((lw + lh) / Kq, r * (r - 1) // 2, "skew")
    yield Eigenvalue(0.0, r * e, "left out")
    yield Eigenvalue((lw + lh) / Kq, r * e, "left out")
    yield Eigenvalue(lw / Kq, r, "mean of the head, in range")
    x = lh / Kq
    large = (1 + x + math.hypot(1 - x, 2 * math.sqrt(lh * rho))) / 2  # Of [[x, sqrt(lh rho)], [., 1]]: determinant lh.
    yield Eigenvalue(lh / large, r, "mean of the features with bias")
    yield Eigenvalue(large, r, "mean of the features with bias")
    yield Eigenvalue(1.0, 1 + e, "bias")


def _cross_entropy(problem: UFMConstants) -> Iterator[Eigenvalue]:
    """Yield the eigenvalues in the range of the head for cross-entropy."""
    K, n, s = problem.num_classes, problem.samples_per_class, problem.logit_scale
    lw, lh = problem.lambda_w, problem.lambda_h
    own = s * (problem.slack + problem.q)  # s p, with p = 1 - (K - 1) q the probability of the true class.
    yield Eigenvalue((1 + s / K) * lh, (n - 1) * K * (K - 2), "within-class, in range, wrong classes")
    yield Eigenvalue((1 + own) * lh, (n - 1) * K, "within-class, in range, own class")
    yield Eigenvalue(lw, K - 1, "mean of the head, in range")
    yield from _pair(problem, own, 1, "symmetric, scale")
    if K == 2:
        yield Eigenvalue((1 + own) * lh, 1, "mean of the features, in range")
    else:
        for value in _triple(problem):
            yield Eigenvalue(value, K - 1, "symmetric with mean of the features")
    yield from _pair(problem, s / K, K * (K - 3) // 2, "symmetric, zero diagonal")
    yield Eigenvalue(0.0, (K - 1) * (K - 2) // 2, "skew")
    yield Eigenvalue((1 + s / K) * (lw + lh), (K - 1) * (K - 2) // 2, "skew")


def _pair(problem: UFMConstants, rho: float, multiplicity: int, sector: str) -> Iterator[Eigenvalue]:
    """Yield both eigenvalues of B(rho). The smaller one is computed from the determinant, 4 rho Pi."""
    lw, lh = problem.lambda_w, problem.lambda_h
    # The product of both penalties, and its quotient by the larger eigenvalue, may underflow.
    mixed = 2 * math.sqrt(lw) * math.sqrt(lh) * (1 - rho)
    large = ((1 + rho) * (lw + lh) + math.hypot((1 + rho) * (lw - lh), mixed)) / 2
    yield Eigenvalue(4 * rho * max(lw, lh) / large * min(lw, lh), multiplicity, sector)
    yield Eigenvalue(large, multiplicity, sector)


def _triple(problem: UFMConstants) -> tuple[float, float, float]:
    r"""Compute the eigenvalues of the 3x3 block of CE, each to a few roundings of its own size.

    With :math:`D = \mathrm{diag}(\sqrt{\lambda_W}, \sqrt{\lambda_H}, \sqrt{\lambda_H})` the block is D G D, where G is
    a sum of four weighted squares. Its adjugate is a sum of squares, too, and its determinant a sum of positive terms.
    A symmetric eigensolver computes only the largest eigenvalue to full relative accuracy. So the largest eigenvalue is
    taken from the block, the smallest from the adjugate, and the middle one from the determinant.
    """
    K, s, theta = problem.num_classes, problem.logit_scale, problem.slack
    lw, lh = problem.lambda_w, problem.lambda_h
    g, rho = math.sqrt(K - 2), s / K
    scale = torch.tensor([math.sqrt(lw), math.sqrt(lh), math.sqrt(lh)], dtype=torch.float64)
    rows = torch.tensor([[1, -1, 0], [1, 1, 0], [0, 0, 1], [g, g, 1]], dtype=torch.float64)
    weights = torch.tensor([1, rho, 1 + rho, rho * theta], dtype=torch.float64)
    i, j = torch.triu_indices(4, 4, 1)
    normals = torch.linalg.cross(rows[i], rows[j])
    # The adjugate of D G D is det(D)^2 D^-1 adj(G) D^-1; the factor det(D)^2 = lw lh^2 cancels against that of det.
    inverse = _largest((normals / scale).T * (weights[i] * weights[j]) @ (normals / scale))
    determinant = 4 * rho * (1 + rho + theta * ((K - 2) * (1 + rho) + rho))
    small, large = determinant / inverse, _largest((rows * scale).T * weights @ (rows * scale))
    return small, max(lw, lh) * (lh / large) * (min(lw, lh) * inverse), large


def _largest(matrix: torch.Tensor) -> float:
    """Return the largest eigenvalue of a symmetric matrix."""
    return float(torch.linalg.eigvalsh(matrix)[-1])
