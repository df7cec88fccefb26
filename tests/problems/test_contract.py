"""Every member keeps the contract, and the contract sees what is wrong."""

import dataclasses

import pytest
import torch

from nclightning.problems import CrossEntropy, NoAnswer, Problem, assert_problem_contract, unbalanced_ce
from tests.problems.cases import CASES


@pytest.mark.parametrize("name", CASES)
def test_members_keep_the_contract(name):
    assert_problem_contract(CASES[name]())


class DivergesTooMuch(CrossEntropy):
    def divergence(self, logits, reference, targets):
        return 1.01 * super().divergence(logits, reference, targets)


class BendsTooMuch(CrossEntropy):
    def curvature(self, logits, targets, direction):
        return 1.01 * super().curvature(logits, targets, direction)


class PromisesTooMuch(CrossEntropy):
    def dual_value(self, dual, targets):
        return super().dual_value(dual, targets) + 0.01


class ClosedFormOfAnotherLoss(CrossEntropy):
    def closed_form(self, groups):
        return CrossEntropy().closed_form(dataclasses.replace(groups, counts=torch.full_like(groups.counts, 3.0)))


@pytest.mark.parametrize(
    ("loss", "error", "words"),
    [
        (DivergesTooMuch(), AssertionError, "gap is"),
        (BendsTooMuch(), AssertionError, "an eigenvalue of the spectrum is off"),
        (PromisesTooMuch(), AssertionError, "the certified bound .* is above optimal_value"),
        (ClosedFormOfAnotherLoss(), NoAnswer, "certified gap of"),
    ],
)
def test_the_contract_sees_a_wrong_loss(loss, error, words):
    problem = Problem(loss, torch.eye(3), [5, 3, 1], 3, 0.01, 0.01)
    with pytest.raises(error, match=words):
        assert_problem_contract(problem, starts=1)


class Off(Problem):
    """A problem whose answers are off."""

    @property
    def dimension(self):
        return super().dimension + 1

    def distance(self, *point, **options):
        return super().distance(*point, **options) * (1 + 1e-6)


def test_the_contract_sees_a_wrong_distance():
    good = unbalanced_ce([5, 3, 1], 3, 0.01, 0.01)
    with pytest.raises(AssertionError, match="distance"):
        assert_problem_contract(Off(good.loss, good.targets, good.counts, 3, 0.01, 0.01), starts=0)


def test_large_problems_are_not_for_the_contract():
    with pytest.raises(AssertionError, match=r"5047 variables.*smaller"):
        assert_problem_contract(unbalanced_ce([100, 1], 49, 0.01, 0.01))
