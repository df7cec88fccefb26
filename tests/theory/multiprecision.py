"""Objective, minimum and distance in 70 digits, written from the paper and not from the code."""

import mpmath
from mpmath import mp, mpf

DIGITS = 70


def _rows(tensor):
    return mpmath.matrix([[mpf(x) for x in row] for row in tensor.tolist()])


def _constants(problem):
    n, K = problem.samples_per_class, problem.num_classes
    lw, lh = mpf(problem.lambda_w), mpf(problem.lambda_h)
    q, c = mpmath.sqrt(n * lw * lh), mpmath.sqrt(lw / (n * lh))
    s = mpf(0)
    if K * q < 1:
        s = 1 - K * q if problem.loss == "mse" else mpmath.log(1 / q - K + 1)
    return lw, lh, q, c, s


def exact_objective(problem, point):
    """F at the float64 point, sample by sample."""
    with mp.workdps(DIGITS):
        lw, lh, *_ = _constants(problem)
        weight = [[mpf(x) for x in row] for row in point.weight.tolist()]
        total = mpf(0)
        for h, y in zip(point.features.tolist(), point.labels.tolist(), strict=True):
            z = [mpmath.fsum(w * mpf(x) for w, x in zip(row, h, strict=True)) for row in weight]
            if problem.loss == "mse":
                z = [a + mpf(b) for a, b in zip(z, point.bias.tolist(), strict=True)]
                total += mpmath.fsum((a - (k == y)) ** 2 for k, a in enumerate(z)) / 2
            else:
                top = max(z)
                total += top + mpmath.log(mpmath.fsum(mpmath.exp(a - top) for a in z)) - z[y]
        total /= problem.num_samples
        total += lw / 2 * mpmath.fsum(w**2 for row in weight for w in row)
        return total + lh / 2 * mpmath.fsum(mpf(x) ** 2 for row in point.features.tolist() for x in row)


def exact_minimum(problem):
    """F* by evaluating the one-dimensional profile of the optimum at its scale s."""
    with mp.workdps(DIGITS):
        _, _, q, _, s = _constants(problem)
        K, r = problem.num_classes, problem.rank
        if problem.loss == "ce":
            return mpmath.log(mpmath.exp(s) + K - 1) - s + (K - 1) * s * q
        return (r * (1 - s) ** 2 + (K - 1 - r)) / (2 * mpf(K)) + r * s * q


def exact_gap(problem, point):
    with mp.workdps(DIGITS):
        return exact_objective(problem, point) - exact_minimum(problem)


def exact_distance(problem, point):
    """Orthogonal Procrustes: the squared distance is |x|^2 + |x*|^2 - 2 a (sum of the r largest singular values)."""
    with mp.workdps(DIGITS):
        _, _, _, c, s = _constants(problem)
        K, n, r = problem.num_classes, problem.samples_per_class, problem.rank
        weight, features = _rows(point.weight), _rows(point.features)
        a = mpmath.sqrt(s / c)
        gathered = weight.copy()
        for i, y in enumerate(point.labels.tolist()):
            for j in range(problem.feature_dim):
                gathered[y, j] += c * features[i, j]
        for j in range(problem.feature_dim):
            mean = mpmath.fsum(gathered[k, j] for k in range(K)) / K
            for k in range(K):
                gathered[k, j] -= mean
        gram = gathered * gathered.T if problem.feature_dim >= K else gathered.T * gathered
        eigenvalues = sorted(mpmath.eigsy(gram, eigvals_only=True), reverse=True)[:r]
        nuclear = mpmath.fsum(mpmath.sqrt(max(v, mpf(0))) for v in eigenvalues)
        squared = mpmath.fsum(x**2 for x in weight) + mpmath.fsum(x**2 for x in features)
        squared += r * (a**2 + n * (c * a) ** 2) - 2 * a * nuclear
        if point.bias is not None:
            squared += mpmath.fsum((mpf(b) - 1 / mpf(K)) ** 2 for b in point.bias.tolist())
        return mpmath.sqrt(squared)
