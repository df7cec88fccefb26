"""The soft threshold of singular values and its derivative, against autograd's of the definition."""

import pytest
import torch

from nclightning.problems.thresholding import Threshold, apply, inverse

SHAPES = [(4, 4), (3, 5), (5, 3), (7, 3), (1, 4), (4, 1)]
# Of which some are below the threshold 1, and some are equal.
VALUES = {"apart": [3.0, 0.7, 2.0, 0.2], "all kept": [4.0, 3.0, 2.0, 1.5], "none kept": [0.9, 0.5, 0.3, 0.1]}
EDGES = {"equal": [2.0, 2.0, 0.5, 0.5], "zero": [2.0, 0.5, 0.0, 0.0]}


def make(shape, values, generator):
    u, v = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))[0] for n in shape)
    size = min(shape)
    singular = torch.tensor(values[:size], dtype=torch.float64)
    return u[:, :size] * singular @ v[:, :size].T


def matrix_of(function, shape):
    """Matrix of a linear map of matrices."""
    size = shape[0] * shape[1]
    columns = [function(axis.view(shape)).flatten() for axis in torch.eye(size, dtype=torch.float64)]
    return torch.stack(columns, dim=1)


def operator(threshold, scales, shape):
    return matrix_of(lambda d: threshold.from_axes(apply(scales, threshold.to_axes(d))), shape)


def derivative(matrix, step=1e-6):
    """Of the soft threshold, by differences."""

    def kept(m):
        u, s, v = torch.linalg.svd(m, full_matrices=False)
        return u * (s - 1).clamp(min=0) @ v

    return matrix_of(lambda d: (kept(matrix + step * d) - kept(matrix - step * d)) / (2 * step), matrix.shape)


@pytest.mark.parametrize("values", [*VALUES, *EDGES])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_derivative(shape, values, generator):
    matrix = make(shape, (VALUES | EDGES)[values], generator)
    threshold = Threshold(matrix, 1.0)
    torch.testing.assert_close(threshold.kept + threshold.subgradient, matrix)
    P, identity = derivative(matrix), torch.eye(matrix.numel(), dtype=torch.float64)
    smooth, everywhere = (operator(threshold, scales, shape) for scales in threshold.hessian_of_norm(smoothed=True))
    torch.testing.assert_close(smooth, identity - P, rtol=0, atol=1e-8)
    torch.testing.assert_close(everywhere, identity, rtol=0, atol=1e-12)
    bent, there = (operator(threshold, scales, shape) for scales in threshold.hessian_of_norm(smoothed=False))
    torch.testing.assert_close(bent, torch.linalg.pinv(P, rtol=1e-6) - there, rtol=0, atol=1e-6)
    torch.testing.assert_close(there, torch.linalg.pinv(P, rtol=1e-6) @ P, rtol=0, atol=1e-6)


@pytest.mark.parametrize("t", [1e-8, 0.3, 1e8])
def test_the_unit_of_the_threshold(t, generator):
    matrix = make((4, 4), VALUES["apart"], generator)
    one, other = (
        Threshold(scale * matrix, scale).hessian_of_norm(smoothed=False)[0].same * scale for scale in (1.0, t)
    )
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("smoothed", [True, False])
@pytest.mark.parametrize("values", [*VALUES, *EDGES])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_inverse_with_a_diagonal(shape, values, smoothed, generator):
    threshold = Threshold(make(shape, (VALUES | EDGES)[values], generator), 1.0)
    bent, there = threshold.hessian_of_norm(smoothed)
    in_axes = threshold.to_axes(torch.randn(shape, dtype=torch.float64, generator=generator))
    inner, rest = (torch.rand(part.shape, dtype=torch.float64, generator=generator) + 0.1 for part in in_axes)
    wanted = apply(there, in_axes)
    x = apply(inverse(bent, there, inner, rest), in_axes)
    image = apply(bent, x)
    found = type(x)(image.inner + inner * x.inner, image.rest + rest * x.rest)
    for one, other in zip(apply(there, found), wanted, strict=True):
        torch.testing.assert_close(one, other)
