"""Preconditioners against the inverses of dense matrices, and what they save."""

import pytest
import torch

from nclightning.problems import solving, unbalanced_ce
from nclightning.problems.preconditioning import DiagonalInverse, LowRankInverse, LowRankTerm, NormHessian, Pieces
from nclightning.problems.thresholding import InAxes, Threshold, apply

ROWS, KINDS, CLASSES = 9, 2, 3
SHAPES = [(4, 4), (3, 5), (5, 3), (1, 4), (4, 1)]


def make(shape, smoothed, generator):
    """the parts of a matrix."""

    def draw(*sizes):
        return torch.rand(sizes, dtype=torch.float64, generator=generator)

    core = Threshold(2 * draw(*shape) - 1, 0.5)
    assert smoothed or bool((core.values > 0.5).any())
    differences_mask = torch.ones(KINDS).double() if smoothed else torch.tensor([1.0, 0.0]).double()
    norm_hessian = NormHessian(*core.hessian_of_norm(smoothed), draw(KINDS), differences_mask, 0.3)
    root = draw(CLASSES, CLASSES)
    curvatures = Pieces(draw(*shape), draw(0, core.size), draw(KINDS), root @ root.T)
    low_rank = LowRankTerm(*(10 * draw(ROWS, size) for size in (*shape, KINDS, CLASSES)))
    return norm_hessian, curvatures, low_rank


def matrix_of(function, shape):
    """Matrix of a linear map of pieces."""
    sizes = [shape[0] * shape[1], 0, KINDS, CLASSES]

    def split(flat):
        inner, rest, differences, bias = flat.split(sizes)
        return Pieces(inner.view(shape), rest.view(0, min(shape)), differences, bias)

    axes = torch.eye(sum(sizes), dtype=torch.float64)
    return torch.stack([function(split(axis)).flat() for axis in axes], dim=1)


def dense(norm_hessian, curvatures, low_rank, shape):
    def product(pieces):
        core = apply(norm_hessian.core, InAxes(pieces.inner, pieces.rest))
        bias = curvatures.bias @ pieces.bias + norm_hessian.bias * pieces.bias
        differences = (curvatures.differences + norm_hessian.differences) * pieces.differences
        return Pieces(core.inner + curvatures.inner * pieces.inner, core.rest, differences, bias)

    matrix = matrix_of(product, shape)
    if low_rank is None:
        return matrix
    for index in range(ROWS):
        inner = torch.outer(low_rank.left[index], low_rank.right[index])
        column = torch.cat([inner.flatten(), low_rank.differences[index], low_rank.bias[index]])
        matrix += torch.outer(column, column)
    return matrix


@pytest.mark.parametrize("has_low_rank", [False, True], ids=["diagonal", "has_low_rank"])
@pytest.mark.parametrize("smoothed", [False, True], ids=["norm", "smoothed"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_inverse(shape, smoothed, has_low_rank, generator, monkeypatch):
    monkeypatch.setattr("nclightning.problems.preconditioning._BATCH", 2 * shape[0] * shape[1])
    norm_hessian, curvatures, low_rank = make(shape, smoothed, generator)
    inverse = (
        LowRankInverse(norm_hessian, curvatures, low_rank)
        if has_low_rank
        else DiagonalInverse(norm_hessian, curvatures)
    )
    assert not has_low_rank or inverse.is_valid
    found = matrix_of(inverse, shape)
    # The step is zero where the norm is not smooth.
    there = matrix_of(
        lambda d: Pieces(
            *apply(norm_hessian.core_mask, InAxes(d.inner, d.rest)),
            norm_hessian.differences_mask * d.differences,
            torch.ones_like(d.bias),
        ),
        shape,
    ).diagonal()
    there[-CLASSES:] = 1
    kept = torch.nonzero(there).flatten()
    expected = torch.zeros_like(found)
    matrix = dense(norm_hessian, curvatures, low_rank if has_low_rank else None, shape)
    expected[kept.unsqueeze(1), kept] = torch.linalg.inv(matrix[kept][:, kept])
    # The floor of the diagonal is 1e-9 of the low-rank term, whose squares are below 1e4; its least is above 1e-3.
    torch.testing.assert_close(
        found, expected, rtol=1e-4 if has_low_rank else 1e-9, atol=1e-5 if has_low_rank else 1e-11
    )


def test_low_rank_terms_that_are_not_finite_are_invalid(generator):
    norm_hessian, curvatures, low_rank = make((3, 3), True, generator)
    assert not LowRankInverse(norm_hessian, curvatures, low_rank._replace(left=low_rank.left * torch.inf)).is_valid


@pytest.mark.parametrize("bias", ["none", "free", 0.1])
def test_few_steps_of_conjugate_gradients_for_a_long_tail(bias, monkeypatch):
    counts = [round(1000 * 0.995**k) for k in range(0, 1000, 20)]
    steps = []
    product = solving._System._product
    monkeypatch.setattr(solving._System, "_product", lambda self, flat: steps.append(1) or product(self, flat))
    penalty = 0.1 * min(counts) ** 0.5 / sum(counts)
    problem = unbalanced_ce(counts, len(counts), penalty, penalty, bias)
    assert problem.optimum.duality_gap < 1e-13
    # Without the low-rank term there are more than five hundred.
    assert len(steps) < 150
