"""F - F* without cancellation, against 70-digit arithmetic."""

import mpmath
import pytest
import torch

from tests.cases import ALL, COLLAPSED, LOW_RANK, ZERO, name_of
from tests.helpers import objective_of, perturb, random_point
from tests.theory.multiprecision import exact_gap, exact_objective


def relative_error(problem, point):
    exact = exact_gap(problem, point)
    return float(abs(mpmath.mpf(float(problem.optimality_gap(*point))) - exact) / exact), float(exact)


@pytest.mark.parametrize("problem", ALL, ids=name_of)
@pytest.mark.parametrize("scale", [1e-2, 1.0, 30.0])
def test_gap_at_random_points_is_exact_relative_to_the_objective(problem, scale, generator):
    point = random_point(problem, generator, scale)
    error, exact = relative_error(problem, point)
    assert error * exact <= 1e-13 * float(exact_objective(problem, point))


# At the threshold the gap is of fourth order in the distance, so that a distance of 1e-6 is a gap of 1e-24 already.
QUADRATIC = [p for p in ALL if abs(p.num_classes * p.q - 1) > 1e-9]


@pytest.mark.parametrize("problem", QUADRATIC, ids=name_of)
@pytest.mark.parametrize("gap", [1e-4, 1e-8, 1e-12, 1e-16, 1e-20, 1e-24])
def test_gap_near_the_optimum_agrees_with_70_digits(problem, gap, generator):
    optimum = problem.random_optimum(generator)
    size = 1e-3
    for _ in range(4):  # The gap is quadratic: rescale until it is the one asked for.
        size *= (gap / float(exact_gap(problem, perturb(optimum, torch.Generator().manual_seed(1), size)))) ** 0.5
    error, exact = relative_error(problem, perturb(optimum, torch.Generator().manual_seed(1), size))
    assert exact == pytest.approx(gap, rel=0.05)
    # Law of the round-off: eps |x| sqrt(L / gap); at 1e-24 this is 1e-4.
    assert error <= max(1e-15 * gap**-0.5, 1e-14)


@pytest.mark.parametrize("problem", COLLAPSED, ids=name_of)
def test_the_plain_difference_is_noise_where_the_gap_is_not(problem, generator):
    """The reason for this form: the same point at a gap of 1e-20 by subtraction."""
    point = perturb(problem.random_optimum(generator), generator, 1e-10)
    error, exact = relative_error(problem, point)
    plain = float(objective_of(problem)(*point)) - problem.optimal_value
    assert exact < 1e-18
    assert error < 1e-4
    assert abs(plain - exact) > 10 * exact or plain == 0.0


@pytest.mark.parametrize("problem", COLLAPSED + ZERO, ids=name_of)
def test_gap_is_never_negative(problem, generator):
    for size in (0.0, 1e-16, 1e-14, 1e-8, 1.0):
        point = perturb(problem.random_optimum(generator), generator, size)
        assert float(problem.optimality_gap(*point)) >= 0


@pytest.mark.parametrize("problem", LOW_RANK, ids=name_of)
def test_low_rank_gap_vanishes_at_an_optimum_to_round_off(problem, generator):
    assert abs(float(problem.optimality_gap(*problem.random_optimum(generator)))) <= 1e-30


@pytest.mark.parametrize("problem", [p for p in COLLAPSED if p.loss == "ce"], ids=name_of)
@pytest.mark.parametrize("scale", [1e2, 1e4, 1e8])
def test_huge_logits_do_not_overflow(problem, scale, generator):
    error, _ = relative_error(problem, random_point(problem, generator, scale))
    assert error <= 1e-13
