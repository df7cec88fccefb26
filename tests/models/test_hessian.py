"""Hessian products in closed form against the Hessian that autograd finds."""

import math

import pytest
import torch

from nclightning.models import closed_form
from nclightning.models.hessian import hessian_product
from nclightning.objective import Objective
from nclightning.optim import ArmijoGD
from tests.models.lines import LOSSES, TOLERANCE, any_lines, lines


def hessian_of(objective, point, labels):
    """The whole matrix in float64, by autograd of F itself; of features, weight and perhaps bias."""
    point = [p.detach().double() for p in point]
    sizes = [p.numel() for p in point]

    def value(vector):
        features, weight, *bias = [part.view_as(p) for part, p in zip(torch.split(vector, sizes), point, strict=True)]
        return objective(weight, features, labels, *bias)

    return torch.func.hessian(value)(torch.cat([p.reshape(-1) for p in point]))


def flat(tensors):
    return torch.cat([tensor.detach().double().reshape(-1) for tensor in tensors])


@pytest.mark.parametrize("elements", [2**17, 7], ids=["at once", "a row or so at a time"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("loss", LOSSES)
def test_products_are_those_of_the_hessian(loss, with_bias, dtype, elements, monkeypatch):
    """At a drawn point and on the way down from it; in the order of the parameters, which begin with the head."""
    monkeypatch.setattr(closed_form, "ELEMENTS_PER_STEP", elements)
    line, _, params, _ = any_lines(loss, dtype, with_bias)
    optimizer, generator = ArmijoGD(params), torch.Generator().manual_seed(1)
    for _ in range(3):
        before = [p.detach().clone() for p in params]
        *head, features = params
        matrix = hessian_of(line._objective, [features, *head], line._labels)
        for _ in range(2):
            vector = [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in params]
            *of_head, of_features = product = line.hessian_product(vector)
            reference = matrix @ flat([vector[-1], *vector[:-1]])
            assert [each.dtype for each in product] == [dtype] * len(params)
            atol = 10 * TOLERANCE[dtype] * float(reference.abs().max())
            torch.testing.assert_close(flat([of_features, *of_head]), reference, rtol=0, atol=atol)
        assert all(map(torch.equal, params, before))
        for _ in range(10):
            optimizer.step(line)


@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_a_missing_entry_is_zero(loss):
    line, _, params = lines(loss, (4, 3, 6))
    vector = [torch.ones_like(p) for p in params]
    holes = line.hessian_product([None, *vector[1:]])
    zeros = line.hessian_product([torch.zeros_like(params[0]), *vector[1:]])
    assert all(map(torch.equal, holes, zeros))
    assert not any(each.requires_grad for each in holes)


@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_the_curvature_at_an_optimum_is_none_along_its_set(loss):
    """Rotations of features and head leave F as it is: products vanish, though their terms do not."""
    line, _, params = lines(loss, (4, 3, 6))
    optimizer = ArmijoGD(params)
    for _ in range(20_000):
        optimizer.step(line)
        if optimizer.outcome.grad_norm < 1e-14:
            break
    turn = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turn = turn - turn.T
    vector = [p.detach() @ turn if p.ndim == 2 else torch.zeros_like(p) for p in params]
    size = math.sqrt(sum(float(v.square().sum()) for v in vector))
    product = line.hessian_product(vector)
    assert size > 1
    assert flat(product).norm() < 1e-13 * size


@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e150])
def test_large_and_small_points_keep_their_digits(scale):
    objective, labels, generator = Objective("mse", 0.1, 0.2), torch.arange(3), torch.Generator().manual_seed(0)
    drawn = [torch.randn(3, 2, dtype=torch.float64, generator=generator) for _ in range(4)]
    point, vector = [scale * each for each in drawn[:2]], drawn[2:]
    product = flat(hessian_product(objective, point, vector, labels, 3))
    reference = hessian_of(objective, point, labels) @ flat(vector)
    torch.testing.assert_close(product, reference, rtol=0, atol=1e-13 * float(reference.abs().max()))
