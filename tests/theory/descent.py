"""Gradient descent on the unconstrained feature model, and NC1-NC3 of its iterates, in extended precision.

Plain arrays and the formulas as they are printed: nothing of the package. Where ``numpy.longdouble`` has no more digits
than float64, curves end earlier.
"""

import math

import numpy as np

EPS = float(np.finfo(np.longdouble).eps)
# Where round-off begins: NC1 is quadratic in the deviations.
FLOORS = {"nc1": (1e2 * EPS) ** 2, "nc2": 1e3 * EPS, "nc3": 1e3 * EPS}


class Descent:
    """Iterates from a start near an optimum, all classes in order."""

    def __init__(self, problem, point, step):
        as_long = lambda t: t.numpy().astype(np.longdouble)  # noqa: E731
        self.loss, self.K, self.n = problem.loss, problem.num_classes, problem.samples_per_class
        self.lambda_w, self.lambda_h, self.step = problem.lambda_w, problem.lambda_h, step
        self.W, self.H = as_long(point.weight), as_long(point.features)
        self.b = None if point.bias is None else as_long(point.bias)
        self.labels = np.repeat(np.arange(self.K), self.n)
        self.onehot = np.eye(self.K, dtype=np.longdouble)[self.labels]

    def advance(self, count):
        N = len(self.H)
        for _ in range(count):
            residual = self.H @ self.W.T
            if self.loss == "mse":
                residual += self.b
            else:
                residual = np.exp(residual - residual.max(axis=1, keepdims=True))
                residual /= residual.sum(axis=1, keepdims=True)
            residual = (residual - self.onehot) / N
            change_w = residual.T @ self.H + self.lambda_w * self.W
            self.H = self.H - self.step * (residual @ self.W + self.lambda_h * self.H)
            self.W = self.W - self.step * change_w
            if self.b is not None:
                self.b = self.b - self.step * residual.sum(axis=0)

    def read(self):
        means = self.H.reshape(self.K, self.n, -1).mean(axis=1)
        centred = means - means.mean(axis=0)
        return {
            "nc1": self._nc1(means, centred),
            "nc2": self._to_etf(self.W @ self.W.T),
            "nc3": self._to_etf(self.W @ centred.T),
        }

    def _to_etf(self, gram):
        target = (np.eye(self.K) - np.longdouble(1) / self.K) / np.sqrt(np.longdouble(self.K - 1))
        return float(np.sqrt(np.square(gram / np.sqrt(np.square(gram).sum()) - target).sum()))

    def _nc1(self, means, centred):
        """Mean square of the coordinates of the deviations in the centred means, ``tr(Sigma_W Sigma_B^+) / K``."""
        away = self.H - means[self.labels]
        d = away.shape[1]
        if d >= self.K - 1:  # y = (C C^T)^+ C x; the ones vector fills the kernel.
            square = centred @ centred.T
            coordinates = _solve(square + np.trace(square) / self.K**2, centred @ away.T)
            return float(np.square(coordinates).sum() / len(away))
        return float((away.T * _solve(centred.T @ centred, away.T)).sum() / len(away))


def exponents(problem, point, step):
    """Measure exponents per unit of time by quantity, over the last half of each curve above round-off."""
    steps = int(min(20_000, 120 / (step * problem.mu)))
    run, rows, each = Descent(problem, point, step), [], max(steps // 2000, 1)
    names = [name for name in FLOORS if _defined(problem, name)]
    for k in range(0, steps, each):
        rows.append((k * step, run.read()))
        if all(rows[-1][1][name] <= FLOORS[name] for name in names):
            break
        run.advance(each)
    found = {}
    for name in names:
        curve = [(time, math.log(values[name])) for time, values in rows if values[name] > FLOORS[name]]
        (start, high), (end, low) = curve[len(curve) // 2], curve[-1]
        found[name] = (high - low) / (end - start)
    return found


def _defined(problem, name):
    if name == "nc1":
        return problem.samples_per_class > 1
    return problem.feature_dim >= problem.num_classes - 1


def _solve(matrix, right):
    """Gauss and Jordan, for a positive definite matrix."""
    size = len(matrix)
    system = np.concatenate([matrix, right], axis=1)
    for i in range(size):
        system[i] /= system[i, i]
        for j in range(size):
            if j != i:
                system[j] -= system[j, i] * system[i]
    return system[:, size:]
