"""Descent on every problem: as fast as the spectrum says, and by the optimizer as near as the gap can tell."""

import math

import pytest
import torch

from nclightning.optim import ArmijoGD
from nclightning.problems.contract import _View
from tests.problems.cases import CASES


@pytest.mark.parametrize("name", CASES)
def test_a_random_start_comes_to_contract_as_predicted(name, generator):
    """Not prepared along a mode: the slowest one is what is left of any start near the set, after long enough."""
    problem = CASES[name]()
    view, rates = _View(problem, generator), problem.rates
    flat = view.flat(view.optimum)
    step = 1.5 / rates.smoothness  # A third fewer iterations; the fastest mode halves in each.
    direction = view.draw()
    x = flat + 1e-3 * (1 + float(flat.norm())) * direction / direction.norm()
    predicted = rates.contraction(step)
    block = max(1, math.ceil(math.log(0.1) / math.log(predicted)))
    distances = [distance(view, x)]
    # Nine decades at the predicted factor; the last one is still far above rounding.
    for _ in range(9):
        for _ in range(block):
            x = x - step * view.gradient(x)
        distances.append(distance(view, x))
    measured = (distances[-1] / distances[-2]) ** (1 / block)
    assert abs(math.log(measured) / math.log(predicted) - 1) < 0.02, (measured, predicted)


def distance(view, x):
    return float(view.problem.distance(*view.point(x)))


@pytest.mark.parametrize("name", CASES)
def test_the_optimizer_brings_the_gap_below_1e_20(name, generator):
    problem = CASES[name]()
    view = _View(problem, generator)
    x = torch.nn.Parameter(view.draw())
    optimizer = ArmijoGD([x], initial_step=1 / problem.smoothness)

    def closure():
        optimizer.zero_grad()
        value = view.value(x)
        value.backward()
        return value

    for _ in range(200):
        for _ in range(50):
            optimizer.step(closure)
        gap = float(problem.gap(*view.point(x.detach())))
        if gap < 1e-20:
            return
    raise AssertionError(f"the gap is {gap:.3g} after 10000 steps")
