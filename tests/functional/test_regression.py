"""Neural regression collapse: against the formulas in many digits, at optima, along a descent, and where nothing is."""

import math

import mpmath
import pytest
import torch
from mpmath import mp
from torch.nn.functional import linear

from nclightning.errors import UserError
from nclightning.functional import (
    class_statistics,
    gram_deviation,
    principal_residual,
    row_space_residual,
    sample_statistics,
    target_rank,
    unit_residuals,
)
from nclightning.problems import regression

N, D, K = 12, 6, 3
SCALES = torch.tensor([3.0, 1.0, 0.4], dtype=torch.float64)


def draw(generator, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


@pytest.fixture
def targets(generator):
    return draw(generator, N, K) * SCALES + 2


@pytest.fixture
def weight(generator):
    return draw(generator, K, D)


class Exact:
    """The formulas as they are printed, in sixty digits, for numbers taken as exact."""

    def __init__(self, features, targets, weight, centred=True):
        with mpmath.workdps(60):
            self.H, self.Y, self.W = (mp.matrix(each.double().tolist()) for each in (features, targets, weight))
            self.H = self._away(self.H)
            self.Y = self._away(self.Y) if centred else self.Y

    @staticmethod
    def _away(rows):
        mean = [mpmath.fsum(rows[:, j]) / rows.rows for j in range(rows.cols)]
        return rows - mp.matrix([mean] * rows.rows)

    @mpmath.workdps(60)
    def nrc1(self, n):
        values = sorted(mpmath.eigsy(self.H.T * self.H, eigvals_only=True))
        return float(mpmath.fsum(values[: self.H.cols - n]) / mpmath.fsum(values))

    @mpmath.workdps(60)
    def nrc2(self):
        off = self.H - self.H * self.W.T * mpmath.inverse(self.W * self.W.T) * self.W
        return float(mpmath.mnorm(off, "f") ** 2 / mpmath.mnorm(self.H, "f") ** 2)

    @mpmath.workdps(60)
    def nrc3(self, gamma):
        values, vectors = mpmath.eigsy(self.Y.T * self.Y / self.Y.rows)
        kept = [max(mpmath.sqrt(max(each, 0)) - mpmath.sqrt(gamma), 0) for each in values]
        form, gram = vectors * mp.diag(kept) * vectors.T, self.W * self.W.T
        return float(mpmath.mnorm(gram / mpmath.mnorm(gram, "f") - form / mpmath.mnorm(form, "f"), "f") ** 2)


def optimum(targets, lambda_w, lambda_h, bias="free", dim=D):
    problem = regression(targets, dim, lambda_w, lambda_h, bias)
    return problem.random_optimum(torch.Generator().manual_seed(1))


@pytest.mark.parametrize("scale", [1.0, 1e4, 1e-150, 1e150], ids=str)
@pytest.mark.parametrize("centred", [True, False], ids=["centred", "around zero"])
def test_random_points(centred, scale, targets, weight, generator):
    features = scale * (draw(generator, N, D) + 5)
    stats, exact = sample_statistics(features), Exact(features, targets, weight, centred)
    # Round-off of a dozen numbers of size 1; an offset of five times the spread takes one digit.
    assert float(principal_residual(stats, K)) == pytest.approx(exact.nrc1(K), rel=1e-13)
    assert float(row_space_residual(stats, weight * scale)) == pytest.approx(exact.nrc2(), rel=1e-13)
    deviation, gamma = map(float, gram_deviation(sample_statistics(targets), weight * scale, centred))
    assert deviation == pytest.approx(exact.nrc3(gamma), rel=1e-13)


@pytest.mark.parametrize("seed", range(6))
def test_no_other_gamma_is_nearer(seed):
    generator = torch.Generator().manual_seed(seed)
    targets, weight = draw(generator, N, K) * SCALES, draw(generator, K, D) * SCALES.unsqueeze(1).sqrt()
    deviation, gamma = map(float, gram_deviation(sample_statistics(targets), weight))
    exact, largest = (
        Exact(weight, targets, weight),
        float(torch.linalg.matrix_norm(targets - targets.mean(0), 2)) / N**0.5,
    )
    others = [exact.nrc3((0.999 * largest * i / 100) ** 2) for i in range(101)]
    assert deviation <= min(others) + 1e-15  # Rounding of numbers up to 2.
    # The grid comes within half of a step of the minimum, and near that the distance is flat.
    assert deviation == pytest.approx(min(others), abs=2e-3)
    assert math.isnan(gamma) or 0 <= gamma**0.5 < largest


# Penalties, and directions that are left of three.
PENALTIES = {"all": (1e-4, 1e-3, 3), "unequal": (1e-1, 1e-4, 3), "two": (0.05, 0.8, 2), "one": (0.2, 0.8, 1)}


@pytest.mark.parametrize("bias", ["free", "none"])
@pytest.mark.parametrize("name", PENALTIES)
def test_all_vanish_at_the_optimum_and_gamma_is_predicted(name, bias, targets):
    lambda_w, lambda_h, left = PENALTIES[name]
    targets = targets - (1.5 if bias == "none" else 0)
    point = optimum(targets, lambda_w, lambda_h, bias)
    assert torch.linalg.matrix_rank(point.weight, rtol=1e-9) == left
    stats, centred = sample_statistics(point.features), bias == "free"
    deviation, gamma = map(float, gram_deviation(sample_statistics(targets), point.weight, centred))
    # Squares of round-off.
    assert float(principal_residual(stats, K)) < 1e-29
    assert float(row_space_residual(stats, point.weight)) < 1e-29
    assert max(map(float, unit_residuals(point.features, K, point.weight))) < 1e-29
    assert deviation < 1e-28
    if left > 1:
        assert gamma == pytest.approx(N * lambda_w * lambda_h, rel=1e-9)
    else:  # One direction is the same for each gamma that leaves it.
        assert math.isnan(gamma)


@pytest.mark.parametrize("size", [1e-3, 1e-8, 1e-12], ids=str)
@pytest.mark.parametrize("offset", [0.0, 100.0], ids=["", "offset"])
def test_digits_near_collapse(size, offset, targets, generator):
    point = optimum(targets, 1e-3, 1e-3)
    features, weight = point.features + size * draw(generator, N, D) + offset, point.weight + size
    stats, exact = sample_statistics(features), Exact(features, targets, weight)
    # What is measured is as small as size times the features, whose round-off is 1e-16, or 1e-14 with the offset.
    rel = 10 * (1 + offset) * 2e-16 / size + 1e-13
    assert float(principal_residual(stats, K)) == pytest.approx(exact.nrc1(K), rel=rel)
    assert float(row_space_residual(stats, weight)) == pytest.approx(exact.nrc2(), rel=rel)
    deviation, gamma = map(float, gram_deviation(sample_statistics(targets), weight))
    assert deviation == pytest.approx(exact.nrc3(gamma), rel=100 * rel, abs=1e-29)


def test_along_a_descent(targets, generator):
    """Gradient descent from a random point: the values are right on the way, and fall to those of the optimum."""
    lambda_w, lambda_h, step = 0.02, 0.5, 0.05
    weight, features, bias = 0.5 * draw(generator, K, D), 0.5 * draw(generator, N, D), torch.zeros(K).double()
    stats = sample_statistics(targets)
    for i in range(12001):
        if i in (0, 10, 100, 300, 1000, 3000, 12000):
            of_features, exact = sample_statistics(features), Exact(features, targets, weight)
            found = principal_residual(of_features, K), row_space_residual(of_features, weight)
            deviation, gamma = gram_deviation(stats, weight)
            # Absolute errors are those of squares of round-off.
            assert list(map(float, found)) == pytest.approx([exact.nrc1(K), exact.nrc2()], rel=1e-3, abs=1e-29)
            assert float(deviation) == pytest.approx(exact.nrc3(float(gamma)), rel=1e-3, abs=1e-28)
        residual = (linear(features, weight, bias) - targets) / N
        weight, features, bias = (
            weight - step * (residual.T @ features + lambda_w * weight),
            features - N * step * (residual @ weight + lambda_h / N * features),
            bias - step * residual.sum(dim=0),
        )
    assert max(map(float, (*found, deviation))) < 1e-27
    assert float(gamma) == pytest.approx(lambda_w * lambda_h, rel=1e-9)  # Of a penalty lambda_h / N.


def test_unit_residuals_by_a_loop(weight, generator):
    features = draw(generator, 3 * N, D) + 7
    away = features - features.mean(dim=0)
    leading, space = torch.linalg.svd(away).Vh[:2], torch.linalg.qr(weight.T).Q.T
    sums = [0.0, 0.0]
    for row in away:
        unit = row / row.norm()
        for i, basis in enumerate((leading, space)):
            sums[i] += float((unit - basis.T @ (basis @ unit)).square().sum()) / len(away)
    assert list(map(float, unit_residuals(features, 2, weight))) == pytest.approx(sums, rel=1e-12)


def test_a_sample_in_the_mean_has_no_direction(weight):
    rows = torch.cat([torch.eye(D), -torch.eye(D), torch.zeros(1, D)]).double()
    with_it, without = unit_residuals(rows, 2, weight), unit_residuals(rows[:-1], 2, weight)
    assert float(with_it.row_space) == pytest.approx(float(without.row_space), rel=1e-13)


# Columns made of three independent ones, and the rank that they have.
COLUMNS = {
    "independent": (lambda y: y, 3),
    "other scales": (lambda y: y * torch.tensor([1e8, 1.0, 1e-8]), 3),
    "twice the same": (lambda y: y[:, [0, 1, 2, 1]], 3),
    "a constant one": (lambda y: torch.cat([y, torch.full((len(y), 1), 0.1)], dim=1), 3),
    "a sum of others": (lambda y: torch.cat([y, y.sum(dim=1, keepdim=True)], dim=1), 3),
    "a sum of others, at another scale": (lambda y: torch.cat([y, 1e6 * y.sum(dim=1, keepdim=True)], dim=1), 3),
    "nearly the same": (lambda y: torch.stack([y[:, 0], y[:, 0] + 1e-3 * y[:, 1]], dim=1), 2),
    "one": (lambda y: y[:, :1], 1),
    "constant": (lambda y: torch.full_like(y, 0.1), 0),
}


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("offset", [0.0, 30.0], ids=["", "offset"])
def test_rank_of_the_targets(dtype, name, offset, generator):
    make, rank = COLUMNS[name]
    columns = make(torch.randn(200, 3, generator=generator).to(dtype) + offset).to(dtype)
    assert float(target_rank(sample_statistics(columns))) == rank


def test_features_that_need_more_directions_than_targets_have(generator):
    """With twice the same column there is one direction, and two of the features are too many."""
    column, features = draw(generator, 50, 1), draw(generator, 50, 2)
    rank = target_rank(sample_statistics(column.expand(-1, 2)))
    assert float(principal_residual(sample_statistics(features), rank)) > 0.1


def test_variance_that_is_the_same_in_all_directions_tells_no_gamma(weight):
    targets = torch.cat([torch.eye(K), -torch.eye(K)]).double()
    found = gram_deviation(sample_statistics(targets), torch.eye(K, D))
    assert float(found.deviation) < 1e-30
    assert found.gamma.isnan()
    turned = torch.linalg.qr(weight[:, :K]).Q
    for dtype in (torch.float64, torch.float32):  # Rounding makes them differ.
        found = gram_deviation(sample_statistics((targets @ turned).to(dtype)), weight)
        gram = weight @ weight.T / (weight @ weight.T).norm()
        assert float(found.deviation) == pytest.approx(float((gram - torch.eye(K) / K**0.5).square().sum()), rel=1e-5)
        assert found.gamma.isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_that_rounding_makes_independent_do_not_count(dtype, weight, generator):
    features = draw(generator, 100, D)
    doubled = torch.cat([weight.to(dtype), 1e-2 * weight[:1].to(dtype), torch.zeros(1, D, dtype=dtype)])
    found = row_space_residual(sample_statistics(features), doubled)
    expected = row_space_residual(sample_statistics(features), weight.to(dtype))
    assert float(found) == pytest.approx(float(expected), rel=4 * torch.finfo(dtype).eps)


def test_a_small_row_counts_like_a_large_one(weight, generator):
    features, sizes = draw(generator, 100, D), torch.tensor([[1.0], [1e-6], [1e6]])
    values = [float(row_space_residual(sample_statistics(features), each)) for each in (weight, weight * sizes)]
    assert values[0] == pytest.approx(values[1], rel=1e-12)
    values = [float(row_space_residual(sample_statistics(features), each.float())) for each in (weight, weight * sizes)]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def nothing_to_measure(generator):
    wide, rows = draw(generator, N, D), draw(generator, K, D)
    y = draw(generator, N, K)
    bad = wide.clone()
    bad[0, 0] = torch.nan
    same = torch.full((N, D), 0.1) + torch.linspace(-1, 1, N).unsqueeze(1) * 1e-8
    return {
        "as many directions as features": (wide[:, :K], y, rows[:, :K], "nrc1 nrc2"),
        "more rows than features": (wide[:, :2], y, rows[:, :2], "nrc1 nrc2"),
        "few samples": (wide[:4], y[:4], rows, "nrc1"),
        "one sample": (wide[:1], y[:1], rows, "nrc1 nrc2 nrc3"),
        "equal features": (same, y, rows, "nrc1 nrc2"),
        "features that are not finite": (bad, y, rows, "nrc1 nrc2"),
        "targets that are not finite": (wide, y / torch.tensor([1.0, 0.0, 1.0]), rows, "nrc1 nrc3"),
        "constant targets": (wide, torch.full_like(y, 0.1), rows, "nrc1 nrc3"),
        "one target": (wide, y[:, :1], rows[:1], "nrc3"),
        "a zero head": (wide, y, 0 * rows, "nrc2 nrc3"),
        "a head that is not finite": (wide, y, rows / 0, "nrc2 nrc3"),
        "no samples": (wide[:0], y[:0], rows, "nrc1 nrc2 nrc3"),
    }


@pytest.mark.parametrize("name", nothing_to_measure(torch.Generator()))
def test_where_there_is_nothing_to_measure(name, generator):
    features, targets, weight, undefined = nothing_to_measure(generator)[name]
    stats, of_targets = sample_statistics(features), sample_statistics(targets)
    rank = target_rank(of_targets)
    values = {
        "nrc1": principal_residual(stats, rank),
        "nrc2": row_space_residual(stats, weight),
        "nrc3": gram_deviation(of_targets, weight).deviation,
    }
    assert {name for name, value in values.items() if value.isnan()} == set(undefined.split())
    if len(features) and "nrc1" not in undefined and "nrc2" not in undefined:
        assert not any(value.isnan() for value in unit_residuals(features, int(rank), weight))


def test_wrong_shapes_are_refused(targets, weight, generator):
    stats = sample_statistics(draw(generator, N, D))
    with pytest.raises(UserError, match=r"weight must have shape \(K, 6\) as features have 6 columns, got \(6, 3\)"):
        row_space_residual(stats, weight.T)
    with pytest.raises(UserError, match=r"weight must have shape \(3, d\), a row for each target, got \(6, 3\)"):
        gram_deviation(sample_statistics(targets), weight.T)
    with pytest.raises(UserError, match="one class, got 2: make them with sample_statistics"):
        principal_residual(class_statistics(targets, torch.arange(N) % 2, 2), 1)
