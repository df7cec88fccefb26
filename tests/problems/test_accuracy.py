"""The gap in sixty digits: optima refined from those in float64, points taken as exact numbers."""

import mpmath
import pytest
import torch
from mpmath import mp, mpf

from nclightning.problems.contract import _View
from tests.problems.cases import CASES
from tests.problems.multiprecision import LOSSES

DIGITS = 60


def exact(problem, flat):
    """F and its gradient at a list of numbers."""
    K, N, d = problem.num_classes, problem.num_samples, problem.feature_dim
    rows = lambda part, count: [part[i * d : (i + 1) * d] for i in range(count)]  # noqa: E731
    W, H, b = rows(flat[: K * d], K), rows(flat[K * d : (K + N) * d], N), flat[(K + N) * d :]
    lw, lh = mpf(problem.lambda_w), mpf(problem.lambda_h)
    lb = mpf(problem.lambda_b or 0)
    targets = [[mpf(t) for t in row] for row in problem.targets.tolist()]
    value, dW, dH, db = (
        mpf(0),
        [[lw * w for w in row] for row in W],
        [[lh * h for h in row] for row in H],
        [lb * x for x in b],
    )
    for i, label in enumerate(problem.labels().tolist()):
        z = [mpmath.fdot(row, H[i]) + (b[k] if b else 0) for k, row in enumerate(W)]
        loss, residual = LOSSES[type(problem.loss).__name__](z, targets[label], problem.loss)
        value += loss / N
        for k, r in enumerate(residual):
            for j in range(d):
                dW[k][j] += r * H[i][j] / N
                dH[i][j] += r * W[k][j] / N
            if b:
                db[k] += r / N
    value += lw / 2 * mpmath.fsum(w * w for row in W for w in row) + lh / 2 * mpmath.fsum(
        h * h for row in H for h in row
    )
    value += lb / 2 * mpmath.fsum(x * x for x in b)
    return value, [x for row in (*dW, *dH, db) for x in row]


NAMES = [
    "balanced ce",
    "mse without bias",
    "penalized bias, unbalanced",
    "unbalanced mse",
    "unbalanced ce",
    "unbalanced ce, free bias, d = r",
    "unbalanced ce, penalized bias",
    "soft labels",
    "weighted ce",
    "logit-adjusted ce",
    "multi-label bce, free bias",
    "squared hinge",
]


@pytest.mark.parametrize("name", NAMES)
def test_gap_down_to_its_last_digits(name, generator):
    problem = CASES[name]()
    view = _View(problem, generator)
    start = view.flat(view.optimum)
    hessian = torch.func.hessian(view.value)(start)
    inverse = torch.linalg.pinv((hessian + hessian.T) / 2, rtol=1e-10, hermitian=True).tolist()
    with mp.workdps(DIGITS):
        at = [mpf(x) for x in start.tolist()]
        # The inverse is right to ten digits, and so every step gains ten.
        for _ in range(8):
            minimum, gradient = exact(problem, at)
            if max(map(abs, gradient)) < mpf(10) ** -40:
                break
            at = [x - mpmath.fdot(row, gradient) for x, row in zip(at, inverse, strict=True)]
        assert max(map(abs, gradient)) < mpf(10) ** -30
        for size, tolerance in ((1.0, 1e-13), (1e-4, 1e-10), (1e-8, 1e-6)):
            direction = torch.randn(start.shape, dtype=torch.float64, generator=generator)
            flat = start + size * direction / direction.norm()
            check(problem, view, flat, minimum, tolerance)
        direction = torch.randn(start.shape, dtype=torch.float64, generator=generator)
        curvature = float(direction @ hessian @ direction)
        flat = start + direction * (2e-24 / curvature) ** 0.5
        gap = check(problem, view, flat, minimum, 1e-3)
        assert 2e-25 < gap < 5e-24


def check(problem, view, flat, minimum, tolerance):
    gap = exact(problem, [mpf(x) for x in flat.tolist()])[0] - minimum
    found = float(problem.gap(*view.point(flat)))
    assert abs(found / gap - 1) <= tolerance, (found, gap)
    return gap
