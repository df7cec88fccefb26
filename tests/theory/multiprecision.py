"""Objective, minimum, distance and Hessian in 70 digits, written from the paper and not from the code."""

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


def exact_spectrum(problem):
    """Eigenvalues of the Hessian of F at an optimum, ascending: assembled sample by sample, no block split off."""
    with mp.workdps(DIGITS):
        lw, lh, _, c, s = _constants(problem)
        K, n, d, r = problem.num_classes, problem.samples_per_class, problem.feature_dim, problem.rank
        N, size = problem.num_samples, d * (K + problem.num_samples)
        a = mpmath.sqrt(s / c)
        frame = mpmath.zeros(K, d)  # Columns of Helmert's matrix: orthonormal, with zero sums.
        for j in range(1, r + 1):
            for k in range(j + 1):
                frame[k, j - 1] = (1 if k < j else -j) / mpmath.sqrt(j * (j + 1))
        hessian = mpmath.zeros(size + (K if problem.loss == "mse" else 0))
        for i in range(size):
            hessian[i, i] = lw if i < K * d else lh
        for i in range(N):
            y, h, own = i // n, a * c * frame[i // n, :], K * d + i * d
            z = [mpmath.fsum(a * frame[k, j] * h[j] for j in range(d)) for k in range(K)]
            if problem.loss == "mse":
                g = [z[k] + mpf(1) / K - (k == y) for k in range(K)]
                curvature = mpmath.eye(K)
            else:
                total = mpmath.fsum(mpmath.exp(x) for x in z)
                p = [mpmath.exp(x) / total for x in z]
                g = [p[k] - (k == y) for k in range(K)]
                curvature = mpmath.diag(p) - mpmath.matrix(p) * mpmath.matrix(p).T
            jacobian = [
                {k * d + j: h[j] for j in range(d)}
                | {own + j: a * frame[k, j] for j in range(d)}
                | ({size + k: mpf(1)} if problem.loss == "mse" else {})
                for k in range(K)
            ]
            for k, row in enumerate(jacobian):
                for other, column in enumerate(jacobian):
                    if curvature[k, other] != 0:
                        for u, x in row.items():
                            for v, w in column.items():
                                hessian[u, v] += curvature[k, other] * x * w / N
                for j in range(d):
                    hessian[k * d + j, own + j] += g[k] / N
                    hessian[own + j, k * d + j] += g[k] / N
        return sorted(mpmath.eigsy(hessian, eigvals_only=True))
