"""The measures in many digits, from the formulas as they are printed, for features taken as exact numbers."""

from functools import cached_property

import mpmath
from mpmath import mp

DIGITS = 60
# Eigenvalues below this share of the largest are zeros of sixty digits.
ZERO = mpmath.mpf(10) ** -45


class Multiprecision:
    """Moments of one labelled set; classes without samples are left out.

    Args:
        features: ``(N, d)``.
        labels: ``(N,)``.
        weight: Head ``(K, d)``.
        bias: ``(K,)``.
        dims: Dimensions to which the features are confined but for their rounding; None is d.
    """

    def __init__(self, features, labels, weight, bias, dims=None):
        exact = lambda rows: mp.matrix([[mp.mpf(x) for x in row] for row in rows.tolist()])  # noqa: E731
        labels = labels.tolist()
        classes = sorted(set(labels))
        self.labels = [classes.index(y) for y in labels]
        self.head = exact(weight)
        self.W, self.bias = exact(weight[classes]), mp.matrix([mp.mpf(x) for x in bias.tolist()])
        self.classes, self.all = classes, len(weight)
        self._set(exact(features))
        self.dims = min(self.d, dims or self.d)
        self.rank = min(self.K - 1, self.dims)

    def _set(self, rows):
        self.rows, self.K = rows, len(self.classes)
        self.N, self.d = rows.rows, rows.cols
        self.groups = [[i for i, y in enumerate(self.labels) if y == k] for k in range(self.K)]
        mean = lambda group, j: mpmath.fsum(rows[i, j] for i in group) / len(group)  # noqa: E731
        self.means = mp.matrix([[mean(group, j) for j in range(self.d)] for group in self.groups])
        self.sample_mean = [mean(range(self.N), j) for j in range(self.d)]
        self.class_mean = [mpmath.fsum(self.means[k, j] for k in range(self.K)) / self.K for j in range(self.d)]
        self.centred = mp.matrix(
            [[self.means[k, j] - self.class_mean[j] for j in range(self.d)] for k in range(self.K)]
        )
        self.deviations = mp.matrix(
            [[rows[i, j] - self.means[y, j] for j in range(self.d)] for i, y in enumerate(self.labels)]
        )
        self.within = self.deviations.T * self.deviations / self.N
        self.between = self.centred.T * self.centred / self.K
        self.variances = [
            mpmath.fsum(self.deviations[i, j] ** 2 for i in group for j in range(self.d)) / len(group)
            for group in self.groups
        ]

    @cached_property
    def confined(self):
        """Deviations of samples from their mean, in the directions of largest spread to which they are confined."""
        away = mp.matrix([[self.rows[i, j] - self.sample_mean[j] for j in range(self.d)] for i in range(self.N)])
        values, vectors = mpmath.eigsy(away.T * away)
        top = sorted(range(self.d), key=lambda i: -values[i])[: self.dims]
        return away * mp.matrix([[vectors[j, i] for i in top] for j in range(self.d)])

    @cached_property
    def directions(self):
        values, vectors = mpmath.eigsy(self.between)
        return [(values[i], vectors[:, i]) for i in sorted(range(self.d), key=lambda i: -values[i])[: self.rank]]

    @staticmethod
    def inverse(matrix):
        values, vectors = mpmath.eigsy(matrix)
        least = ZERO * max(abs(v) for v in values)
        return vectors * mp.diag([1 / v if v > least else mp.mpf(0) for v in values]) * vectors.T

    def nc0(self):
        return mpmath.norm([mpmath.fsum(self.head[:, j]) for j in range(self.d)], 2)

    def nc1(self):
        return mpmath.fsum((v.T * self.within * v)[0] / value for value, v in self.directions) / self.K

    def nc1_rank(self):
        return self.rank

    def nc1_ratio(self):
        trace = lambda m: mpmath.fsum(m[i, i] for i in range(self.d))  # noqa: E731
        return trace(self.within) / trace(self.between)

    @property
    def pairs(self):
        return [(i, j) for i in range(self.K) for j in range(self.K) if i != j]

    @cached_property
    def cdnv(self):
        square = lambda i, j: mpmath.fsum((self.means[i, a] - self.means[j, a]) ** 2 for a in range(self.d))  # noqa: E731
        return [(self.variances[i] + self.variances[j]) / (2 * square(i, j)) for i, j in self.pairs]

    def nc1_cdnv(self):
        return mpmath.fsum(self.cdnv) / len(self.pairs)

    def nc1_cdnv_worst(self):
        return max(self.cdnv)

    def _averages(self, rows):
        return [
            [mpmath.fsum(rows[i, j] for i in group) / len(group) for j in range(rows.cols)] for group in self.groups
        ]

    def nc1_vci(self):
        rows = self.confined
        means = self._averages(rows)
        away = rows - mp.matrix([means[y] for y in self.labels])
        centre = [mpmath.fsum(mean[j] for mean in means) / self.K for j in range(rows.cols)]
        centred = mp.matrix(means) - mp.matrix([centre] * self.K)
        between = centred.T * centred / self.K
        product = self.inverse(away.T * away / self.N + between) * between
        return 1 - mpmath.fsum(product[i, i] for i in range(rows.cols)) / self.rank

    def _to_etf(self, gram):
        norm, K = mpmath.mnorm(gram, "f"), gram.rows
        target = (mp.eye(K) - mp.ones(K) / K) / mpmath.sqrt(K - 1)
        return mpmath.mnorm(gram / norm - target, "f")

    def nc2(self):
        return self._to_etf(self.head * self.head.T)

    def nc2_centred(self):
        centre = [mpmath.fsum(self.head[:, j]) / self.all for j in range(self.d)]
        rows = self.head - mp.matrix([centre] * self.all)
        return self._to_etf(rows * rows.T)

    def nc2_means(self):
        return self._to_etf(self.centred * self.centred.T)

    @staticmethod
    def unit(rows):
        norms = [mpmath.norm(rows[k, :], 2) for k in range(rows.rows)]
        return mp.matrix([[rows[k, j] / norms[k] for j in range(rows.cols)] for k in range(rows.rows)]), norms

    def _equinorm(self, rows):
        norms = self.unit(rows)[1]
        mean = mpmath.fsum(norms) / len(norms)
        return mpmath.sqrt(mpmath.fsum((x - mean) ** 2 for x in norms) / (len(norms) - 1)) / mean

    def _angles(self, rows):
        unit, K = self.unit(rows)[0], rows.rows
        gram = unit * unit.T
        return [abs(gram[i, j] + mp.mpf(1) / (K - 1)) for i in range(K) for j in range(K) if i != j]

    def nc2_equinorm_head(self):
        return self._equinorm(self.head)

    def nc2_equinorm_means(self):
        return self._equinorm(self.centred)

    def nc2_equiangularity_head(self):
        angles = self._angles(self.head)
        return mpmath.fsum(angles) / len(angles)

    def nc2_equiangularity_means(self):
        angles = self._angles(self.centred)
        return mpmath.fsum(angles) / len(angles)

    def nc2_equiangularity_worst(self):
        return max(self._angles(self.centred))

    @cached_property
    def energies(self):
        unit = self.unit(self.centred)[0]
        return [-mpmath.log(mpmath.norm(unit[i, :] - unit[j, :], 2)) for i, j in self.pairs]

    def gnc2_energy(self):
        return mpmath.fsum(self.energies) / len(self.pairs)

    def gnc2_energy_variance(self):
        mean = self.gnc2_energy()
        return mpmath.fsum((x - mean) ** 2 for x in self.energies) / len(self.pairs)

    def nc3(self):
        return self._to_etf(self.W * self.centred.T)

    def nc3_difference(self):
        return (
            mpmath.mnorm(self.W / mpmath.mnorm(self.W, "f") - self.centred / mpmath.mnorm(self.centred, "f"), "f") ** 2
        )

    @cached_property
    def alignment(self):
        head, means = self.unit(self.W)[0], self.unit(self.centred)[0]
        return [mpmath.fdot(head[k, :], means[k, :]) for k in range(self.K)]

    def nc3_cosine(self):
        return mpmath.fsum(self.alignment) / self.K

    def nc3_cosine_worst(self):
        return min(self.alignment)

    def nc3_uniform(self):
        mean = self.nc3_cosine()
        return mpmath.fsum((x - mean) ** 2 for x in self.alignment) / (self.K - 1)

    def bias_collapse(self):
        return mpmath.norm(self.head * mp.matrix(self.sample_mean) + self.bias, 2)

    def nc_distance(self):
        W, M = self.W, self.centred
        direction = W / mpmath.mnorm(W, "f") + M / mpmath.mnorm(M, "f")
        centre = [mpmath.fsum(direction[:, j]) / self.K for j in range(self.d)]
        left, values, right = mpmath.svd_r(direction - mp.matrix([centre] * self.K), full_matrices=False)
        top = sorted(range(len(values)), key=lambda i: -values[i])[: min(self.K - 1, self.d)]
        frame = sum((left[:, i] * right[i, :] for i in top), mp.zeros(self.K, self.d))
        counts = mp.diag([len(group) for group in self.groups])
        inner = lambda a, b: mpmath.fsum(a[k, j] * b[k, j] for k in range(self.K) for j in range(self.d))  # noqa: E731
        a = max(inner(W, frame) / len(top), 0)
        b = max(inner(counts * M, frame) / inner(counts * frame, frame), 0)
        spread = mpmath.fsum(v * len(g) for v, g in zip(self.variances, self.groups, strict=True))
        rest = M - b * frame
        head_part = mpmath.mnorm(W - a * frame, "f") ** 2 / mpmath.mnorm(W, "f") ** 2
        feature_part = (spread + inner(counts * rest, rest)) / (spread + inner(counts * M, M))
        return mpmath.sqrt((head_part + feature_part) / 2)

    @cached_property
    def decomposition(self):
        # With a free bias the fit goes through the means of features and targets.
        rows, targets = self.confined, mp.zeros(self.N, self.all)
        for i, y in enumerate(self.labels):
            targets[i, self.classes[y]] = 1
        mean = [mpmath.fsum(targets[:, k]) / self.N for k in range(self.all)]
        values = rows * (self.inverse(rows.T * rows) * (rows.T * targets)) + mp.matrix([mean] * self.N)
        means = self._averages(values)
        within = mpmath.fsum(
            (values[i, k] - means[y][k]) ** 2 for i, y in enumerate(self.labels) for k in range(self.all)
        )
        between = mpmath.fsum(
            (means[y][k] - targets[i, k]) ** 2 for i, y in enumerate(self.labels) for k in range(self.all)
        )
        own = self.rows * self.head.T + mp.matrix([self.bias.T.tolist()[0]] * self.N)
        away = mpmath.mnorm(own - values, "f") ** 2
        return [x / (2 * self.N) for x in (within, between, away)]

    def mse_nc1(self):
        return self.decomposition[0]

    def mse_nc2_nc3(self):
        return self.decomposition[1]

    def mse_perpendicular(self):
        return self.decomposition[2]


MEASURES = tuple(name for name in vars(Multiprecision) if name.startswith(("nc", "gnc2", "mse", "bias_")))


def evaluate_all(names, *data, dims=None):
    """Values of measures in double precision, computed in many digits."""
    with mpmath.workdps(DIGITS):
        case = Multiprecision(*data, dims=dims)
        return {name: float(getattr(case, name)()) for name in names}


def evaluate(name, *data):
    """Value of a measure in double precision, computed in many digits."""
    return evaluate_all((name,), *data)[name]
