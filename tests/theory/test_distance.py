"""Distance to the optimal set, against brute force and 70-digit arithmetic."""

import math

import mpmath
import pytest
import torch

from nclightning.theory import UFMProblem
from tests.cases import ALL, COLLAPSED, LOW_RANK, name_of
from tests.helpers import norm, perturb, random_point
from tests.theory.multiprecision import exact_distance


@pytest.mark.parametrize("problem", ALL, ids=name_of)
def test_nearest_optimum_is_a_member_at_the_stated_distance(problem, generator):
    point = random_point(problem, generator)
    nearest = problem.nearest_optimum(*point)
    # A member: it is its own projection, up to the rounding of its entries.
    assert float(problem.distance(*nearest)) <= 1e-14 * max(norm(nearest), 1)
    parts = [
        (a - b).square().sum() for a, b in zip(point, nearest, strict=True) if a is not None and a.is_floating_point()
    ]
    assert float(torch.stack(parts).sum().sqrt()) == pytest.approx(float(problem.distance(*point)), rel=1e-14)


@pytest.mark.parametrize("problem", ALL, ids=name_of)
def test_no_random_member_is_nearer(problem, generator):
    point = perturb(problem.random_optimum(generator), generator, 0.3)
    distance = float(problem.distance(*point))
    for _ in range(50):
        member = problem.random_optimum(generator)
        gaps = [
            (a - b).square().sum()
            for a, b in zip(point, member, strict=True)
            if a is not None and a.is_floating_point()
        ]
        assert float(torch.stack(gaps).sum().sqrt()) >= distance * (1 - 1e-12)


def rotations_of_the_plane():
    """O(2) on a fine grid: rotations and reflections."""
    for i in range(20_000):
        angle = 2 * math.pi * i / 20_000
        c, s = math.cos(angle), math.sin(angle)
        yield torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
        yield torch.tensor([[c, s], [s, -c]], dtype=torch.float64)


BRUTE = [
    UFMProblem(loss, K, n, 2, 0.05, 0.02) for loss, K, n in (("mse", 3, 2), ("ce", 3, 2), ("mse", 2, 3), ("mse", 3, 1))
]


@pytest.mark.parametrize("problem", BRUTE, ids=name_of)
def test_distance_is_the_minimum_over_all_orthogonal_matrices(problem, generator):
    """The optimal set is one orbit of O(d): scan it, for d = 2 and any starting member."""
    point, member = random_point(problem, generator), problem.random_optimum(generator)
    offset = 0.0 if point.bias is None else float((point.bias - 1 / problem.num_classes).square().sum())
    order = member.features[:: problem.samples_per_class][point.labels]
    best = min(
        float((point.weight - member.weight @ U).square().sum() + (point.features - order @ U).square().sum())
        for U in rotations_of_the_plane()
    )
    # The grid is 3e-4 wide and the squared distance is flat to second order: (3e-4)^2 times its curvature of 10.
    assert float(problem.distance(*point)) == pytest.approx(math.sqrt(best + offset), rel=1e-6)
    assert float(problem.distance(*point)) <= math.sqrt(best + offset) * (1 + 1e-14)


@pytest.mark.parametrize("problem", [p for p in COLLAPSED + LOW_RANK if p.num_classes <= 6], ids=name_of)
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6, 1e-9, 1e-12])
def test_distance_agrees_with_70_digits(problem, size, generator):
    point = perturb(problem.random_optimum(generator), generator, size)
    exact = exact_distance(problem, point)
    # Entries of the projection carry a round-off each: eps |x| in the residual, with a factor of a few for the SVD.
    error = 10 * torch.finfo(torch.float64).eps * max(norm(point), 1) / float(exact)
    assert float(abs(mpmath.mpf(float(problem.distance(*point))) - exact) / exact) <= max(error, 1e-14)


@pytest.mark.parametrize("problem", ALL, ids=name_of)
def test_distance_ignores_the_order_of_samples(problem, generator):
    point = random_point(problem, generator)
    order = torch.randperm(problem.num_samples, generator=generator)
    shuffled = point._replace(features=point.features[order], labels=point.labels[order])
    assert float(problem.distance(*shuffled)) == pytest.approx(float(problem.distance(*point)), rel=1e-13)


def test_distance_is_float64_and_detached(generator):
    problem = COLLAPSED[0]
    point = random_point(problem, generator)
    single = [t.float().requires_grad_() if t is not None and t.is_floating_point() else t for t in point]
    distance = problem.distance(*single)
    assert distance.dtype == torch.float64
    assert not distance.requires_grad
