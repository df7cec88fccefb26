"""The measures in many digits, from the formulas as they are printed, for features taken as exact numbers."""

import mpmath
from mpmath import mp

DIGITS = 60


class Multiprecision:
    """Moments of one labelled set, all classes present."""

    def __init__(self, features, labels, weight, bias):
        exact = lambda rows: mp.matrix([[mp.mpf(x) for x in row] for row in rows.tolist()])  # noqa: E731
        rows, self.K = exact(features), len(weight)
        self.N, self.d = rows.rows, rows.cols
        self.W, self.bias = exact(weight), mp.matrix([mp.mpf(x) for x in bias.tolist()])
        groups = [[i for i, y in enumerate(labels.tolist()) if y == k] for k in range(self.K)]
        mean = lambda group, j: mpmath.fsum(rows[i, j] for i in group) / len(group)  # noqa: E731
        self.means = mp.matrix([[mean(group, j) for j in range(self.d)] for group in groups])
        self.sample_mean = [mean(range(self.N), j) for j in range(self.d)]
        self.class_mean = [mpmath.fsum(self.means[k, j] for k in range(self.K)) / self.K for j in range(self.d)]
        self.centred = mp.matrix(
            [[self.means[k, j] - self.class_mean[j] for j in range(self.d)] for k in range(self.K)]
        )
        deviations = mp.matrix(
            [[rows[i, j] - self.means[y, j] for j in range(self.d)] for i, y in enumerate(labels.tolist())]
        )
        self.within = deviations.T * deviations / self.N
        self.between = self.centred.T * self.centred / self.K
        self.variances = [
            mpmath.fsum(deviations[i, j] ** 2 for i in group for j in range(self.d)) / len(group) for group in groups
        ]

    def nc1(self):
        values, vectors = mpmath.eigsy(self.between)
        total = mp.mpf(0)
        for i in sorted(range(self.d), key=lambda i: -values[i])[: min(self.K - 1, self.d)]:
            v = vectors[:, i]
            total += (v.T * self.within * v)[0] / values[i]
        return total / self.K

    def nc1_ratio(self):
        trace = lambda m: mpmath.fsum(m[i, i] for i in range(self.d))  # noqa: E731
        return trace(self.within) / trace(self.between)

    def nc1_cdnv(self):
        pairs = [(i, j) for i in range(self.K) for j in range(self.K) if i != j]
        square = lambda i, j: mpmath.fsum((self.means[i, a] - self.means[j, a]) ** 2 for a in range(self.d))  # noqa: E731
        values = [(self.variances[i] + self.variances[j]) / (2 * square(i, j)) for i, j in pairs]
        return mpmath.fsum(values) / len(pairs)

    def _to_etf(self, gram):
        norm = mpmath.mnorm(gram, "f")
        target = (mp.eye(self.K) - mp.ones(self.K) / self.K) / mpmath.sqrt(self.K - 1)
        return mpmath.mnorm(gram / norm - target, "f")

    def nc2(self):
        return self._to_etf(self.W * self.W.T)

    def nc2_means(self):
        return self._to_etf(self.centred * self.centred.T)

    def nc3(self):
        return self._to_etf(self.W * self.centred.T)

    def nc3_difference(self):
        return (
            mpmath.mnorm(self.W / mpmath.mnorm(self.W, "f") - self.centred / mpmath.mnorm(self.centred, "f"), "f") ** 2
        )

    def bias_collapse(self):
        return mpmath.norm(self.W * mp.matrix(self.sample_mean) + self.bias, 2)


MEASURES = ("nc1", "nc1_ratio", "nc1_cdnv", "nc2", "nc2_means", "nc3", "nc3_difference", "bias_collapse")


def evaluate(name, *data):
    """Value of a measure in double precision, computed in many digits."""
    with mpmath.workdps(DIGITS):
        return float(getattr(Multiprecision(*data), name)())
