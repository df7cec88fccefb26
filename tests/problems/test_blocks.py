"""Two blocks of alike classes, where the problem is one of a few scalars: solved in forty digits, and the thresholds.

With m classes of p samples each and k classes of q samples each, permutations within the blocks leave the optimum
alone. So its logits are a multiple of the identity on the differences within each block, and a matrix (2, 2) between
the blocks. The thresholds at which a block merges follow: on the differences within a merged block the multipliers are
what the target alone leaves of the residual.
"""

import math

import mpmath
import pytest
import torch
from mpmath import mp, mpf

from nclightning.problems import (
    BinaryCrossEntropy,
    Problem,
    SquaredError,
    label_smoothing,
    logit_adjusted_ce,
    mse_without_bias,
    rank_thresholds,
    unbalanced_ce,
    weighted_ce,
)
from tests.problems.cases import one_against_rest
from tests.problems.multiprecision import LOSSES

DIGITS = 40


class Blocks:
    """The reduced problem, written from the definition of F and of the blocks.

    Its scalars are the multiples within the blocks, those of the matrix between them, and the bias of the blocks. The
    norm of a matrix of lower rank has no derivative: it is then given by its singular value and two angles, or is zero.
    """

    def __init__(self, problem, majority):
        counts = problem.counts.tolist()
        m, k = self.sizes = majority, len(counts) - majority
        self.problem, self.counts = problem, (counts[0], counts[-1])
        # With cross-entropy the rows of the logits sum to zero, and one vector across the blocks is left.
        self.across = problem.loss.shift_invariant
        self.difference = math.sqrt(k / (m + k)), -math.sqrt(m / (m + k))

    def scalars(self, optimum):
        """Those of an optimum in float64, with zeros for what has vanished."""
        (m, k), scaled, bias = self.sizes, optimum.factors.scaled_logits, optimum.factors.bias
        sums = torch.tensor([[1.0] * m + [0.0] * k, [0.0] * m + [1.0] * k], dtype=torch.float64)
        sums = sums / sums.norm(dim=1, keepdim=True)
        between = sums @ scaled @ sums.T
        left, singular, right = torch.linalg.svd(between)
        self.rank = int((singular > 1e-9).sum())
        if self.rank == 2:
            numbers = between.flatten().tolist()
        elif self.rank and self.across:
            numbers = (between @ torch.tensor(self.difference, dtype=torch.float64)).tolist()
        elif self.rank:
            angles = torch.atan2(left[1, 0], left[0, 0]), torch.atan2(right[0, 1], right[0, 0])
            numbers = [float(singular[0]), *map(float, angles)]
        else:
            numbers = []
        within = [scaled[i, i] - scaled[i, i + 1] for i in (0, m)]
        within = [float(s) / math.sqrt(n) for s, n in zip(within, self.counts, strict=True)]
        within = [s if abs(s) > 1e-9 else 0.0 for s in within]
        bias = [] if bias is None else (sums @ bias).tolist()
        if self.across and bias:
            bias = [bias[0] * self.difference[0] + bias[1] * self.difference[1]]
        return [mpf(number) for number in (*within, *numbers, *bias)]

    def parts(self, x):
        """Matrix between the blocks, its norm, and the bias of both, in units of normalised sums over blocks."""
        x, (m, k) = x[2:], self.sizes
        v = mpmath.sqrt(mpf(k) / (m + k)), -mpmath.sqrt(mpf(m) / (m + k))
        if self.rank == 2:
            (a, b, c, d), bias = x[:4], x[4:]
            norm = mpmath.sqrt(a**2 + b**2 + c**2 + d**2 + 2 * abs(a * d - b * c))
        elif self.rank and self.across:
            (p, q), bias = x[:2], x[2:]
            a, b, c, d, norm = p * v[0], p * v[1], q * v[0], q * v[1], mpmath.hypot(p, q)
        elif self.rank:
            (norm, first, second), bias = x[:3], x[3:]
            a, b, c, d = (
                norm * f(first) * g(second) for f in (mpmath.cos, mpmath.sin) for g in (mpmath.cos, mpmath.sin)
            )
        else:
            a, b, c, d, norm, bias = 0, 0, 0, 0, 0, x
        if len(bias) == 1:
            bias = [bias[0] * v[0], bias[0] * v[1]]
        return (a, b, c, d), norm, bias or [0, 0]

    def rows(self, x):
        """Logits of the first class of each block, all K of them."""
        (m, k), roots = self.sizes, [mpmath.sqrt(n) for n in self.counts]
        (a, b, c, d), _, bias = self.parts(x)
        found = []
        for size, root, row, (s, first) in zip((m, k), roots, ((a, b), (c, d)), ((x[0], 0), (x[1], m)), strict=True):
            logits = [row[0] / (mpmath.sqrt(size * m) * root) + bias[0] / mpmath.sqrt(m)] * m
            logits += [row[1] / (mpmath.sqrt(size * k) * root) + bias[1] / mpmath.sqrt(k)] * k
            for i in range(size):
                logits[first + i] += s * ((i == 0) - mpf(1) / size)
            found.append(logits)
        return found

    def value(self, x):
        (m, k), (p, q), problem = self.sizes, self.counts, self.problem
        strength = mpmath.sqrt(mpf(problem.lambda_w)) * mpmath.sqrt(mpf(problem.lambda_h))
        value = mpf(0)
        for row, index, samples in zip(self.rows(x), (0, m), (m * p, k * q), strict=True):
            target = [mpf(t) for t in problem.targets[index].tolist()]
            loss = LOSSES[type(problem.loss).__name__](row, target, problem.loss)[0]
            value += mpf(samples) / (m * p + k * q) * loss
        _, between, bias = self.parts(x)
        within = (m - 1) * mpmath.sqrt(p) * abs(x[0]) + (k - 1) * mpmath.sqrt(q) * abs(x[1])
        return value + strength * (within + between) + mpf(problem.lambda_b or 0) / 2 * (bias[0] ** 2 + bias[1] ** 2)

    def minimize(self, x):
        """Newton's method with differences for derivatives."""
        free = [i for i in range(len(x)) if x[i] != 0]
        step = mpf(10) ** -(DIGITS // 2)

        def moved(x, i, by):
            return [n + (by if j == i else 0) for j, n in enumerate(x)]

        def gradient(x):
            return mpmath.matrix(
                [(self.value(moved(x, i, step)) - self.value(moved(x, i, -step))) / (2 * step) for i in free]
            )

        for _ in range(4):
            now = gradient(x)
            if mpmath.norm(now) < mpf(10) ** -25:
                return x
            columns = [(gradient(moved(x, i, step)) - now) / step for i in free]
            hessian = mpmath.matrix(len(free))
            for j, column in enumerate(columns):
                hessian[:, j] = column
            change = mpmath.lu_solve(hessian, -now)
            for i, by in zip(free, change, strict=True):
                x = moved(x, i, by)
        raise AssertionError(f"a gradient of {mpmath.nstr(mpmath.norm(now))} is left")


def penalized(make, strength):
    """A problem of the given strength, with unequal penalties."""
    return make.replace(lambda_w=2 * strength, lambda_h=strength / 2)


COUNTS = [40] * 3 + [5] * 2
N = sum(COUNTS)
SHAPES = {
    "ce": lambda bias: unbalanced_ce(COUNTS, 5, 1.0, 1.0, bias),
    "label smoothing": lambda bias: label_smoothing(COUNTS, 0.1, 5, 1.0, 1.0, bias),
    "weighted ce": lambda bias: weighted_ce(COUNTS, [1, 1, 1, 3, 3], 5, 1.0, 1.0, bias),
    "logit-adjusted ce": lambda bias: logit_adjusted_ce(COUNTS, 5, 1.0, 1.0, 0.5, bias),
    "bce": lambda bias: Problem(BinaryCrossEntropy(), None, COUNTS, 5, 1.0, 1.0, bias),
    "mse": lambda bias: Problem(SquaredError(), None, COUNTS, 5, 1.0, 1.0, bias),
}


# In units of the strength at which two minorities merge under the plain loss.
@pytest.mark.parametrize("part", [0.01, 0.5, 1.5])
@pytest.mark.parametrize("bias", ["none", "free", 0.05])
@pytest.mark.parametrize("name", SHAPES)
def test_the_optimum_is_that_of_the_scalars(name, bias, part):
    problem = penalized(SHAPES[name](bias), part * math.sqrt(5) / N)
    blocks, optimum = Blocks(problem, 3), problem.optimum
    with mp.workdps(2 * DIGITS):
        x = blocks.minimize(blocks.scalars(optimum))
        assert abs(optimum.value / blocks.value(x) - 1) < 2e-14
        rows = torch.tensor([[float(z) for z in row] for row in blocks.rows(x)], dtype=torch.float64)
    found = optimum.logits[[0, 3]]
    if problem.bias == "free" and blocks.across:
        found, rows = (each - each.mean(dim=1, keepdim=True) for each in (found, rows))
    torch.testing.assert_close(found, rows, rtol=0, atol=1e-11)


# By how much the residuals of a class and of another differ while both have the same logits, in each block.
HOLDS = {
    "ce": (1.0, 1.0),
    "label smoothing": (0.9, 0.9),
    "weighted ce": (130 / 150, 3 * 130 / 150),
    "logit-adjusted ce": (1.0, 1.0),
    "bce": (1.0, 1.0),
    "mse": (1.0, 1.0),
    "squared hinge": (2.0, 2.0),
}


@pytest.mark.parametrize("bias", ["none", "free", 0.05])
@pytest.mark.parametrize("name", HOLDS)
def test_blocks_merge_where_the_target_lets_go_of_them(name, bias):
    """Minority collapse of classes with n samples each: from n = N^2 lambda_w lambda_h on, for hard labels."""
    make = {**SHAPES, "squared hinge": lambda bias: one_against_rest(COUNTS, 5, 1.0, 1.0, bias)}[name]
    # Of the squared error without a bias the sum over a block goes with its differences.
    sizes = (3, 2) if (name, bias) == ("mse", "none") else (2, 1)
    for hold, n, directions in zip(HOLDS[name], (40, 5), sizes, strict=True):
        strength = hold * math.sqrt(n) / N
        before, after = (penalized(make(bias), strength * part).optimum.rank for part in (1 - 1e-6, 1 + 1e-6))
        assert before - after == directions


def test_the_blocks_themselves_part_where_two_equations_say():
    """Of cross-entropy without a bias: majorities apart, minorities merged, and then both blocks in the same place."""
    m, k, p, q = 3, 2, 40, 5

    def equations(s, strength):
        own, other, rest = mpmath.exp(s * (1 - mpf(1) / m)), mpmath.exp(-s / m), mpf(1)
        total = own + (m - 1) * other + k * rest
        first = mpmath.sqrt(p) / N * (1 - (own - other) / total)
        outside = k * rest / total
        unit = mpmath.sqrt(mpf(m + k) / (m * k))
        between = unit / N * mpmath.sqrt(m * p * outside**2 + k * q * (mpf(m) / (m + k)) ** 2)
        return first - strength, between - strength

    with mp.workdps(DIGITS):
        _, strength = mpmath.findroot(equations, (1, 0.03), tol=mpf(10) ** -30)
    found = rank_thresholds(unbalanced_ce(COUNTS, 5, 1.0, 1.0), lowest=1e-4, relative_accuracy=1e-7)
    expected = [5 / N**2, float(strength) ** 2, 40 / N**2, 40 / N**2]
    assert list(found) == [4, 3, 2, 1]
    assert list(found.values()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("ratio", "classes"), [(10, 4), (100, 10)])
def test_geometry_of_weak_penalties(ratio, classes):
    """Norms and angles of Thrampoulidis et al. 2022, half of the classes with ``ratio`` times the samples of the rest.

    They hold for strengths that tend to zero, up to powers of the inverse of the margin: the first two are taken away.
    """
    half, R, K = classes // 2, ratio, classes
    across, shares = math.sqrt((R + 1) / 2), (1 - 2 / K, 1 / K)
    heads = [shares[0] * root + shares[1] * across for root in (math.sqrt(R), 1.0)]
    means = [shares[0] / root + shares[1] / across for root in (math.sqrt(R), 1.0)]
    cosines = [(across / K - root * 2 / K) / head for root, head in zip((math.sqrt(R), 1.0), heads, strict=True)]
    printed = torch.tensor([heads[0] / heads[1], means[0] / means[1], *cosines], dtype=torch.float64)

    def measured(strength):
        problem = unbalanced_ce([ratio] * half + [1] * half, K, strength, strength)
        weight = problem.optimal_set.weight_factor
        features = problem.optimal_set.feature_factor
        rows, norms = (torch.nn.functional.normalize(weight, dim=1), weight.square().sum(dim=1))
        lengths = features.square().sum(dim=1)
        angles = [rows[0] @ rows[1], rows[-1] @ rows[-2]]
        margin = float(problem.optimum.logits[0, 0] - problem.optimum.logits[0, 1])
        return torch.stack([norms[0] / norms[-1], lengths[0] / lengths[-1], *angles]), margin

    values, margins = zip(*(measured(strength) for strength in (1e-8, 1e-11, 1e-14)), strict=True)
    # The parabola through three points in the inverse margins, at zero.
    powers = torch.tensor([[margin**-power for power in range(3)] for margin in margins], dtype=torch.float64)
    limit = torch.linalg.solve(powers, torch.stack(values))[0]
    torch.testing.assert_close(limit, printed, rtol=4e-3, atol=4e-3)


def test_lengths_of_the_squared_error_without_bias():
    """As Dang et al. print them: of head rows and features, each class on its own."""
    counts, lambda_w, lambda_h = [100, 30, 4], 0.02, 0.001
    optimum = mse_without_bias(counts, 4, lambda_w, lambda_h).random_optimum()
    samples = sum(counts)
    for k, n in enumerate(counts):
        row, feature = optimum.weight[k], optimum.features[optimum.labels == k][0]
        length = math.sqrt(n * lambda_h / lambda_w) - samples * lambda_h
        assert float(row.square().sum()) == pytest.approx(length)
        assert float(feature.square().sum()) == pytest.approx(
            math.sqrt(lambda_w / lambda_h / n) - samples * lambda_w / n
        )
        assert float(row @ feature) == pytest.approx(1 - samples * math.sqrt(lambda_w * lambda_h / n))
