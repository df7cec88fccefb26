"""Gradient descent on the unconstrained feature model, and NC1-NC3 of its iterates, in extended precision.

Plain arrays and the formulas as they are printed: nothing of the package. Where ``numpy.longdouble`` has no more digits
than float64, curves end earlier.
"""

import numpy as np

EPS = float(np.finfo(np.longdouble).eps)
# Where round-off begins: NC1 is quadratic in the deviations.
FLOORS = {"nc1": (1e2 * EPS) ** 2, "nc2": 1e3 * EPS, "nc3": 1e3 * EPS}
AT_ONCE = 50  # Iterates that are read together.


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

    def read(self, count, each):
        """Read ``count`` iterates, ``each`` steps apart, all at once: a call takes longer than its small arrays."""
        heads, features = [], []
        for _ in range(count):
            heads.append(self.W)
            features.append(self.H)
            self.advance(each)
        W, H = np.stack(heads), np.stack(features)
        means = H.reshape(count, self.K, self.n, -1).mean(axis=2)
        centred = means - means.mean(axis=1, keepdims=True)
        return {
            "nc1": self._nc1(H - means[:, self.labels], centred),
            "nc2": self._to_etf(W @ _turned(W)),
            "nc3": self._to_etf(W @ _turned(centred)),
        }

    def _to_etf(self, gram):
        target = (np.eye(self.K) - np.longdouble(1) / self.K) / np.sqrt(np.longdouble(self.K - 1))
        norm = np.sqrt(np.square(gram).sum(axis=(1, 2), keepdims=True))
        return np.sqrt(np.square(gram / norm - target).sum(axis=(1, 2)))

    def _nc1(self, away, centred):
        """Mean square of the coordinates of the deviations in the centred means, ``tr(Sigma_W Sigma_B^+) / K``."""
        N, d = away.shape[1:]
        if d >= self.K - 1:  # y = (C C^T)^+ C x; the ones vector fills the kernel.
            square = centred @ _turned(centred)
            filled = square + np.trace(square, axis1=1, axis2=2)[:, None, None] / self.K**2
            return np.square(_solve(filled, centred @ _turned(away))).sum(axis=(1, 2)) / N
        return (_turned(away) * _solve(_turned(centred) @ centred, _turned(away))).sum(axis=(1, 2)) / N


def exponents(problem, point, step):
    """Measure exponents per unit of time by quantity, over the last half of each curve above round-off."""
    steps = int(min(20_000, 120 / (step * problem.mu)))
    run, parts, each = Descent(problem, point, step), [], max(steps // 2000, 1)
    names = [name for name in FLOORS if _defined(problem, name)]
    while len(parts) * AT_ONCE * each < steps:
        parts.append(run.read(AT_ONCE, each))
        if all(parts[-1][name][-1] <= FLOORS[name] for name in names):
            break
    found = {}
    for name in names:
        curve = np.concatenate([part[name] for part in parts])
        (above,) = np.nonzero(curve > FLOORS[name])
        start, end = above[len(above) // 2], above[-1]
        found[name] = float(np.log(curve[start] / curve[end])) / ((end - start) * each * step)
    return found


def _defined(problem, name):
    if name == "nc1":
        return problem.samples_per_class > 1
    return problem.feature_dim >= problem.num_classes - 1


def _turned(matrices):
    return matrices.swapaxes(1, 2)


def _solve(matrices, right):
    """Gauss and Jordan, for positive definite matrices."""
    size = matrices.shape[1]
    system = np.concatenate([matrices, right], axis=2)
    for i in range(size):
        system[:, i] /= system[:, i, i, None]
        for j in range(size):
            if j != i:
                system[:, j] -= system[:, j, i, None] * system[:, i]
    return system[:, :, size:]
