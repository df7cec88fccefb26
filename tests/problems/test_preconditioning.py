"""Preconditioners against the inverses of dense matrices, and what they save."""

import pytest
import torch

from nclightning.problems import solving, unbalanced_ce
from nclightning.problems.preconditioning import Bends, Diagonal, Leads, Peaked, Pieces
from nclightning.problems.thresholding import Threshold, Turned, apply

ROWS, KINDS, CLASSES = 9, 2, 3
SHAPES = [(4, 4), (3, 5), (5, 3), (1, 4), (4, 1)]


def make(shape, smoothed, generator):
    """What a matrix is made of: bends, curvatures and leads."""

    def draw(*sizes):
        return torch.rand(sizes, dtype=torch.float64, generator=generator)

    core = Threshold(2 * draw(*shape) - 1, 0.5)
    assert smoothed or bool((core.values > 0.5).any())
    apart_there = torch.ones(KINDS).double() if smoothed else torch.tensor([1.0, 0.0]).double()
    bends = Bends(*core.bend(smoothed), draw(KINDS), apart_there, 0.3)
    root = draw(CLASSES, CLASSES)
    curvatures = Pieces(draw(*shape), draw(0, core.size), draw(KINDS), root @ root.T)
    leads = Leads(*(10 * draw(ROWS, size) for size in (*shape, KINDS, CLASSES)))
    return bends, curvatures, leads


def matrix_of(function, shape):
    """Matrix of a linear map of pieces."""
    sizes = [shape[0] * shape[1], 0, KINDS, CLASSES]

    def split(flat):
        inner, rest, apart, bias = flat.split(sizes)
        return Pieces(inner.view(shape), rest.view(0, min(shape)), apart, bias)

    axes = torch.eye(sum(sizes), dtype=torch.float64)
    return torch.stack([function(split(axis)).flat() for axis in axes], dim=1)


def dense(bends, curvatures, leads, shape):
    def product(pieces):
        core = apply(bends.core, Turned(pieces.inner, pieces.rest))
        bias = curvatures.bias @ pieces.bias + bends.bias * pieces.bias
        apart = (curvatures.apart + bends.apart) * pieces.apart
        return Pieces(core.inner + curvatures.inner * pieces.inner, core.rest, apart, bias)

    matrix = matrix_of(product, shape)
    if leads is None:
        return matrix
    for index in range(ROWS):
        inner = torch.outer(leads.left[index], leads.right[index])
        column = torch.cat([inner.flatten(), leads.apart[index], leads.bias[index]])
        matrix += torch.outer(column, column)
    return matrix


@pytest.mark.parametrize("peaked", [False, True], ids=["diagonal", "peaked"])
@pytest.mark.parametrize("smoothed", [False, True], ids=["norm", "smoothed"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_inverse(shape, smoothed, peaked, generator, monkeypatch):
    monkeypatch.setattr("nclightning.problems.preconditioning._BATCH", 2 * shape[0] * shape[1])
    bends, curvatures, leads = make(shape, smoothed, generator)
    inverse = Peaked(bends, curvatures, leads) if peaked else Diagonal(bends, curvatures)
    assert not peaked or inverse.is_valid
    found = matrix_of(inverse, shape)
    # The step is zero where the norm is not smooth.
    there = matrix_of(
        lambda d: Pieces(
            *apply(bends.core_there, Turned(d.inner, d.rest)), bends.apart_there * d.apart, torch.ones_like(d.bias)
        ),
        shape,
    ).diagonal()
    there[-CLASSES:] = 1
    kept = torch.nonzero(there).flatten()
    expected = torch.zeros_like(found)
    matrix = dense(bends, curvatures, leads if peaked else None, shape)
    expected[kept.unsqueeze(1), kept] = torch.linalg.inv(matrix[kept][:, kept])
    # The floor of the diagonal is 1e-9 of the leads, whose squares are below 1e4; the least of it is above 1e-3.
    torch.testing.assert_close(found, expected, rtol=1e-4 if peaked else 1e-9, atol=1e-5 if peaked else 1e-11)


def test_leads_that_are_not_finite_are_told(generator):
    bends, curvatures, leads = make((3, 3), True, generator)
    assert not Peaked(bends, curvatures, leads._replace(left=leads.left * torch.inf)).is_valid


@pytest.mark.parametrize("bias", ["none", "free", 0.1])
def test_few_steps_of_conjugate_gradients_for_a_long_tail(bias, monkeypatch):
    counts = [round(1000 * 0.995**k) for k in range(0, 1000, 20)]
    steps = []
    product = solving._System._product
    monkeypatch.setattr(solving._System, "_product", lambda self, flat: steps.append(1) or product(self, flat))
    penalty = 0.1 * min(counts) ** 0.5 / sum(counts)
    problem = unbalanced_ce(counts, len(counts), penalty, penalty, bias)
    assert problem.optimum.duality_gap < 1e-13
    # Without the leads there are more than five hundred.
    assert len(steps) < 150
