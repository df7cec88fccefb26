"""Coordinates of the points that permutations of like classes leave alone, against the points themselves."""

import pytest
import torch

from nclightning.problems import BinaryCrossEntropy, CrossEntropy, SquaredError, optimum, unbalanced_ce
from nclightning.problems.groups import Groups
from nclightning.problems.invariant_points import Coordinates, Parts
from nclightning.problems.preconditioning import Pieces
from nclightning.problems.row_hessians import RowHessians
from nclightning.problems.solving import solve

EYE = torch.eye(6, dtype=torch.float64)
COUNTS = torch.tensor([5.0, 2, 9, 2, 5, 5], dtype=torch.float64)
PAIRED = EYE.clone()
# Classes 1 and 3 may be confused with each other, and those of the other count with each other: still alike.
PAIRED[1, 3] = PAIRED[3, 1] = 0.1
BROKEN = EYE.clone()
BROKEN[1, 3] = 0.1
CASES = {
    "hard labels": (CrossEntropy(), EYE, COUNTS, 3),
    "smoothed labels": (CrossEntropy(), 0.9 * EYE + 0.1 / 6, COUNTS, 3),
    "each class on its own": (BinaryCrossEntropy(), EYE, COUNTS, 3),
    "squared error": (SquaredError(), EYE, COUNTS, 3),
    "one count": (CrossEntropy(), EYE, torch.full_like(COUNTS, 4), 1),
    "pairs": (CrossEntropy(), PAIRED, COUNTS, 3),
    "targets tell classes differences": (CrossEntropy(), BROKEN, COUNTS, 6),
    "diagonals tell classes differences": (BinaryCrossEntropy(), EYE * torch.linspace(0.5, 1, 6), COUNTS, 6),
    "distinct counts": (CrossEntropy(), EYE, torch.arange(1.0, 7).double(), 6),
    "the loss tells classes differences": (CrossEntropy(offset=torch.linspace(0, 1, 6)), EYE, COUNTS, 6),
    "more groups than classes": (CrossEntropy(), torch.cat([EYE, EYE[:2] / 2 + EYE[2:4] / 2]), torch.ones(8), (8, 6)),
    "fewer groups than outputs": (BinaryCrossEntropy(), EYE[:2], torch.ones(2), (2, 6)),
}


def make(name, lambda_b):
    loss, targets, counts, size = CASES[name]
    groups = Groups(loss, targets, counts.double(), 0.1, lambda_b)
    rows, columns = size if isinstance(size, tuple) else (size, size)
    coordinates = Coordinates(groups)
    assert coordinates.shape == (rows - (lambda_b == 0), columns - loss.shift_invariant)
    return groups, coordinates


def draw(coordinates, generator):
    zero = coordinates.zero(None if coordinates.groups.lambda_b is None else torch.zeros(6, dtype=torch.float64))
    return Parts(*(torch.randn(part.shape, dtype=torch.float64, generator=generator) for part in zero))


def whole(coordinates, parts):
    """The point by its definition: scaled logits of all groups, and the bias."""
    core, groups = coordinates.lifted_columns(coordinates.lifted(parts.core).T).T, coordinates.groups
    if coordinates.kinds is None:
        scaled, bias = core, parts.bias
    else:
        sums = torch.nn.functional.one_hot(coordinates.kinds).double()
        frame = sums / sums.sum(dim=0).sqrt()
        scaled = frame @ core @ frame.T
        for kind, differences in zip(coordinates.many.tolist(), parts.differences.tolist(), strict=True):
            inside, m = torch.diag(sums[:, kind]), sums[:, kind].sum()
            scaled = scaled + differences / (m - 1).sqrt() * (inside - torch.outer(sums[:, kind], sums[:, kind]) / m)
        bias = frame @ parts.bias if len(parts.bias) else parts.bias
    return scaled, bias if groups.lambda_b is not None else None


@pytest.mark.parametrize("lambda_b", [None, 0.0, 0.3])
@pytest.mark.parametrize("name", CASES)
def test_coordinates_are_of_the_whole_point(name, lambda_b, generator):
    groups, coordinates = make(name, lambda_b)
    parts = draw(coordinates, generator)
    scaled, bias = whole(coordinates, parts)
    square = scaled.square().sum() + (0 if bias is None else bias.square().sum())
    assert parts.norm() ** 2 == pytest.approx(float(square))
    if lambda_b == 0:
        assert float((groups.counts.sqrt() @ scaled).norm()) < 1e-13
    if groups.loss.shift_invariant:
        assert float(scaled.sum(dim=1).norm()) < 1e-13
    left, singular, right = torch.linalg.svd(parts.core, full_matrices=False)
    factors = coordinates.factors(left, singular, right.T, parts)
    torch.testing.assert_close(factors.scaled_logits, scaled)
    identity = torch.eye(len(factors.singular), dtype=torch.float64)
    for axes in (factors.left, factors.right):
        torch.testing.assert_close(axes.T @ axes, identity, rtol=0, atol=1e-13)
    assert bool((factors.singular.diff() <= 0).all())
    differences = (parts.differences.abs() * coordinates.weights).sum()
    assert float(factors.singular.sum()) == pytest.approx(float(singular.sum() + differences))
    assert (factors.bias is None) == (bias is None)
    if bias is not None:
        expected = bias - bias.mean() if groups.shift_is_free else bias
        torch.testing.assert_close(factors.bias, expected)
        torch.testing.assert_close(coordinates.zero(bias).bias, parts.bias)


@pytest.mark.parametrize("lambda_b", [None, 0.0, 0.3])
@pytest.mark.parametrize("name", CASES)
def test_logits_gradient_and_curvatures_are_those_of_the_mean_loss(name, lambda_b, generator):
    groups, coordinates = make(name, lambda_b)
    parts = draw(coordinates, generator)

    def mean_loss(*parts):
        scaled, bias = whole(coordinates, Parts(*parts))
        return groups.mean_loss(groups.logits(scaled, bias))

    # By its definition a kind's number leaves the graph, so that gradients go along directions.
    logits = coordinates.logits(parts)
    torch.testing.assert_close(logits, groups.logits(*whole(coordinates, parts))[coordinates.first])
    gradient = coordinates.gradient(groups.loss.residual(logits, coordinates.targets))
    step = 1e-5
    for _ in range(3):
        move = draw(coordinates, generator)
        slope = (mean_loss(*parts.plus(move, step)) - mean_loss(*parts.plus(move, -step))) / (2 * step)
        assert gradient.dot(move) == pytest.approx(float(slope), rel=1e-6, abs=1e-9)

    row_factors = torch.rand(len(logits), 1, dtype=torch.float64, generator=generator) + 1
    hessians = RowHessians(groups.loss, logits, coordinates.targets, row_factors)

    def along(move):
        bent = row_factors * groups.loss.curvature(logits, coordinates.targets, coordinates.logits(move))
        return move.dot(coordinates.gradient(bent))

    zero = parts.plus(parts, -1.0)
    u, v = (torch.randn(size, 2, dtype=torch.float64, generator=generator) for size in coordinates.shape)
    found = coordinates.curvatures(hessians, u, v)
    # Of one column on each side the squares are along the product only if its rows do not mix.
    rows = coordinates.curvatures(hessians, torch.eye(coordinates.shape[0], dtype=torch.float64), v)
    if lambda_b != 0:
        for i in range(2):
            for j in range(2):
                expected = along(zero._replace(core=torch.outer(u[:, i], v[:, j])))
                assert float(found[i, j]) == pytest.approx(expected)
                assert float(u[:, i].square() @ rows[:, j]) == pytest.approx(expected)
    for index, value in enumerate(coordinates.curvatures_of_differences(hessians).tolist()):
        axis = torch.zeros_like(parts.differences)
        axis[index] = 1
        assert value == pytest.approx(along(zero._replace(differences=axis)))
    hessian = coordinates.hessian_of_bias(hessians)
    assert len(hessian) == len(parts.bias)
    if len(hessian):
        bias = torch.randn(parts.bias.shape, dtype=torch.float64, generator=generator)
        assert float(bias @ hessian @ bias) == pytest.approx(along(zero._replace(bias=bias)))


@pytest.mark.parametrize("lambda_b", [None, 0.0, 0.3])
@pytest.mark.parametrize("name", [name for name in CASES if isinstance(CASES[name][0], CrossEntropy)])
def test_squares_of_the_leads_are_the_hessian_of_the_peaks(name, lambda_b, generator):
    groups, coordinates = make(name, lambda_b)
    logits = coordinates.logits(draw(coordinates, generator))
    row_factors = torch.rand(len(logits), 1, dtype=torch.float64, generator=generator) + 1
    heights, axes, flanks = peaks = RowHessians(groups.loss, logits, coordinates.targets, row_factors).peaks()
    left, right = (torch.linalg.qr(torch.randn(n, n, generator=generator).double())[0] for n in coordinates.shape)
    low_rank = coordinates.low_rank(peaks, left, right)
    for move in (draw(coordinates, generator) for _ in range(3)):
        change = coordinates.logits(move)
        bent = coordinates.gradient(heights * axes * (axes * change).sum(dim=1, keepdim=True))
        in_axes = Pieces(left.T @ move.core @ right, left[:0], move.differences, move.bias)
        factors = low_rank.transposed(in_axes)
        assert float(factors.square().sum()) == pytest.approx(move.dot(bent))
        back = low_rank.combined(factors, left[:0])
        torch.testing.assert_close(left @ back.inner @ right.T, bent.core)
        torch.testing.assert_close(back.differences, bent.differences)
        torch.testing.assert_close(back.bias, bent.bias)
    differences = coordinates.curvatures_of_differences(flanks)
    bias = coordinates.hessian_of_bias(flanks)
    _, of_apart, of_bias = low_rank.squares()
    whole = RowHessians(groups.loss, logits, coordinates.targets, row_factors)
    torch.testing.assert_close(differences + of_apart, coordinates.curvatures_of_differences(whole))
    if lambda_b is not None:
        torch.testing.assert_close(bias + of_bias, coordinates.hessian_of_bias(whole))
    inner = coordinates.curvatures(flanks, left, right) + low_rank.squares()[0]
    torch.testing.assert_close(inner, coordinates.curvatures(whole, left, right))


@pytest.mark.parametrize("counts", [[9, 9, 4, 4, 1, 1], [1, 4, 9, 1, 4, 9], [5, 5, 5, 5, 1]])
def test_the_solver_is_told_of_like_classes(counts, monkeypatch):
    seen = []
    monkeypatch.setattr(optimum, "solve", lambda groups, bias: seen.append(Coordinates(groups)) or solve(groups, bias))
    problem = unbalanced_ce(counts, 6, 0.01, 0.01)
    assert problem.optimum.duality_gap < 1e-13
    (coordinates,) = seen
    assert len(coordinates.first) == len(set(counts))


def test_joined_groups_keep_their_order():
    targets = torch.tensor([[0.2, 0.8], [0.9, 0.1], [0.2, 0.8], [0.5, 0.5], [0.9, 0.1]], dtype=torch.float64)
    counts = torch.arange(1.0, 6).double()
    merged, index = optimum._merged(Groups(CrossEntropy(), targets, counts, 0.1, None))
    torch.testing.assert_close(merged.targets, targets[[0, 1, 3]], rtol=0, atol=0)
    assert index.tolist() == [0, 1, 0, 2, 1]
    assert merged.counts.tolist() == [4, 7, 4]
