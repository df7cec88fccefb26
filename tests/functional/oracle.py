"""The measures once more, by loops over samples and classes in NumPy, from the formulas as they are printed."""

import itertools
from types import SimpleNamespace

import numpy as np
import torch


class Oracle:
    """Moments of one labelled set; classes without samples are left out everywhere."""

    def __init__(self, features, labels, weight, bias=None):
        features, labels = np.asarray(features, dtype=np.float64), np.asarray(labels)
        self.classes = sorted(set(labels.tolist()))
        self.groups = [features[labels == k] for k in self.classes]
        self.counts = np.array([len(g) for g in self.groups])
        self.means = np.stack([g.mean(0) for g in self.groups])
        self.W = np.asarray(weight, dtype=np.float64)[self.classes]
        self.bias = None if bias is None else np.asarray(bias)
        self.K, self.N, self.d = len(self.classes), len(features), features.shape[1]
        self.features, self.labels, self.weight = features, labels, np.asarray(weight, dtype=np.float64)
        away = np.vstack([g - m for g, m in zip(self.groups, self.means, strict=True)])
        self.within = away.T @ away / self.N

    def centred(self, convention="class"):
        centre = self.means.mean(0) if convention == "class" else self.counts @ self.means / self.N
        return self.means - centre

    def between(self, convention="class", weights="uniform"):
        w = np.full(self.K, 1 / self.K) if weights == "uniform" else self.counts / self.N
        centred = self.centred(convention)
        return centred.T @ (w[:, None] * centred)

    def pairs(self):
        return itertools.permutations(range(self.K), 2)

    def nc1(self, convention="class", weights="uniform"):
        values, vectors = np.linalg.eigh(self.between(convention, weights))
        top = np.argsort(values)[::-1][: min(self.K - 1, self.d)]
        return sum(vectors[:, j] @ self.within @ vectors[:, j] / values[j] for j in top) / self.K

    def ratio(self, convention="class", weights="uniform"):
        return np.trace(self.within) / np.trace(self.between(convention, weights))

    def cdnv_pairs(self):
        v = [np.mean(np.sum((g - m) ** 2, axis=1)) for g, m in zip(self.groups, self.means, strict=True)]
        return [(v[i] + v[j]) / (2 * np.sum((self.means[i] - self.means[j]) ** 2)) for i, j in self.pairs()]

    def vci(self):
        total = self.within + self.between()
        return 1 - np.trace(np.linalg.pinv(total) @ self.between()) / min(self.d, self.K - 1)

    def etf_gram(self, left, right):
        gram = left @ right.T
        target = (np.eye(self.K) - 1 / self.K) / np.sqrt(self.K - 1)
        return np.linalg.norm(gram / np.linalg.norm(gram) - target)

    @staticmethod
    def equinorm(rows):
        norms = np.linalg.norm(rows, axis=1)
        return norms.std(ddof=1) / norms.mean()

    def angles(self, rows):
        cos = lambda i, j: rows[i] @ rows[j] / np.linalg.norm(rows[i]) / np.linalg.norm(rows[j])  # noqa: E731
        return [abs(cos(i, j) + 1 / (self.K - 1)) for i, j in self.pairs()]

    def energies(self):
        unit = [m / np.linalg.norm(m) for m in self.centred()]
        return [-np.log(np.linalg.norm(unit[i] - unit[j])) for i, j in self.pairs()]

    def difference(self):
        means = self.centred()
        return np.sum((self.W / np.linalg.norm(self.W) - means / np.linalg.norm(means)) ** 2)

    def cosines(self):
        return [w @ m / np.linalg.norm(w) / np.linalg.norm(m) for w, m in zip(self.W, self.centred(), strict=True)]

    def bias_collapse(self):
        return np.linalg.norm(self.weight @ self.features.mean(0) + (0 if self.bias is None else self.bias))

    def mse(self, part):
        """Loss of the least-squares head by class variability and by the means, and what the head adds."""
        targets = np.eye(len(self.weight))[self.labels]
        rows, head, centres = self.features, self.weight, self.means
        if self.bias is not None:
            rows = np.hstack([rows, np.ones((self.N, 1))])
            centres = np.hstack([centres, np.ones((self.K, 1))])
            head = np.hstack([head, self.bias[:, None]])
        best = np.linalg.lstsq(rows, targets, rcond=None)[0].T
        loss = lambda w: np.sum((rows @ w.T - targets) ** 2) / (2 * self.N)  # noqa: E731
        of_means = sum(
            n * np.sum((best @ m - np.eye(len(head))[k]) ** 2)
            for n, m, k in zip(self.counts, centres, self.classes, strict=True)
        ) / (2 * self.N)
        return {"nc1": loss(best) - of_means, "nc2_nc3": of_means, "perpendicular": loss(head) - loss(best)}[part]


MEASURES = {
    "nc0": lambda o: np.linalg.norm(o.weight.sum(0)),
    "nc1": Oracle.nc1,
    "nc1_rank": lambda o: np.linalg.matrix_rank(o.centred()),
    "nc1_ratio": Oracle.ratio,
    "nc1_cdnv": lambda o: np.mean(o.cdnv_pairs()),
    "nc1_cdnv_worst": lambda o: max(o.cdnv_pairs()),
    "nc1_vci": Oracle.vci,
    "nc2_means": lambda o: o.etf_gram(o.centred(), o.centred()),
    "nc2_equinorm_head": lambda o: Oracle.equinorm(o.weight),
    "nc2_equinorm_means": lambda o: Oracle.equinorm(o.centred()),
    "nc2_equiangularity_means": lambda o: np.mean(o.angles(o.centred())),
    "nc2_equiangularity_worst": lambda o: max(o.angles(o.centred())),
    "gnc2_energy": lambda o: np.mean(o.energies()),
    "gnc2_energy_variance": lambda o: np.var(o.energies()),
    "nc3": lambda o: o.etf_gram(o.W, o.centred()),
    "nc3_difference": Oracle.difference,
    "nc3_cosine": lambda o: np.mean(o.cosines()),
    "nc3_cosine_worst": lambda o: min(o.cosines()),
    "nc3_uniform": lambda o: np.var(o.cosines(), ddof=1),
    "bias_collapse": Oracle.bias_collapse,
    "mse_nc1": lambda o: o.mse("nc1"),
    "mse_nc2_nc3": lambda o: o.mse("nc2_nc3"),
    "mse_perpendicular": lambda o: o.mse("perpendicular"),
}
# Over all rows of the head, absent classes included: compared where all classes are present.
MEASURES_OF_THE_HEAD = {
    "nc2": lambda o: o.etf_gram(o.W, o.W),
    "nc2_centred": lambda o: o.etf_gram(o.W - o.W.mean(0), o.W - o.W.mean(0)),
    "nc2_equiangularity_head": lambda o: np.mean(o.angles(o.W)),
}


def stats_of(means, present=None):
    """What the geometry reads of the statistics."""
    present = torch.ones(len(means), dtype=torch.bool) if present is None else present
    kept = means * present.unsqueeze(1)
    centred = (kept - kept.sum(dim=0) / present.sum()) * present.unsqueeze(1)
    return SimpleNamespace(
        means=kept,
        centred_means=centred,
        mean_offsets=centred,
        present=present,
        counts=present.long(),
        norms=0 * centred[:, 0],
    )


def by_gram(left, right, present=None):
    """The formula as it is printed, with the K x K matrix, in float64."""
    if present is not None:
        left, right = left[present], right[present]
    left, right, K = left.double(), right.double(), len(left)
    gram = left @ right.T
    target = (torch.eye(K, dtype=torch.float64) - 1 / K) / (K - 1) ** 0.5
    return float(torch.linalg.matrix_norm(gram / torch.linalg.matrix_norm(gram) - target))
