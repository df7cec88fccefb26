"""Losses of one's own, written with functions of torch: read right, or refused if they are not convex."""

import numpy as np
import pytest
import torch
from torch.nn.functional import huber_loss, softplus

from nclightning.problems import Loss, Problem, assert_problem_contract


class Huber(Loss):
    def value(self, logits, targets):
        return huber_loss(logits, targets, reduction="none", delta=5.0).sum(dim=1)


class SmoothHinge(Loss):
    def value(self, logits, targets):
        return softplus(1 - (2 * targets - 1) * logits).sum(dim=1)


class WrongProbability(Loss):
    def value(self, logits, targets):
        return 1 - (torch.softmax(logits, dim=1) * targets).sum(dim=1)


class Focal(Loss):
    def value(self, logits, targets):
        log_p = (torch.log_softmax(logits, dim=1) * targets).sum(dim=1)
        return -((1 - log_p.exp()) ** 2) * log_p


@pytest.mark.parametrize("loss", [Huber, SmoothHinge])
def test_a_value_alone_is_enough(loss):
    """Also of functions that torch cannot differentiate in forward mode."""
    assert_problem_contract(Problem(loss(), None, [4, 2, 1], 4, lambda_w=0.02, lambda_h=0.01), starts=1)


@pytest.mark.parametrize("loss", [WrongProbability, Focal])
@pytest.mark.parametrize("num_classes", [2, 3, 100])
def test_losses_that_are_not_convex_are_refused(loss, num_classes):
    """Their certified bounds would not be bounds."""
    with pytest.raises(ValueError, match=f"convex in the logits, and {loss.__name__} is not"):
        Problem(loss(), None, [4] * num_classes, num_classes, lambda_w=0.01, lambda_h=0.01)


class Quartic(Loss):
    """Convex, and below zero near the target."""

    def value(self, logits, targets):
        return (logits**4).sum(dim=1) / 4 - (logits * targets).sum(dim=1)


def test_a_loss_below_its_lower_bound_is_refused():
    with pytest.raises(ValueError, match=r"Quartic takes the value -.* below its lower_bound=0"):
        Problem(Quartic(), None, [4, 2, 1], 4, lambda_w=0.02, lambda_h=0.01)
    bounded = Quartic()
    bounded.lower_bound = -3.0
    problem = Problem(bounded, None, [4, 2, 1], 4, lambda_w=0.02, lambda_h=0.01)
    assert problem.certified_lower_bound(*problem.random_optimum()) <= problem.optimal_value


def test_a_description_holds_all_that_a_loss_is_made_of():
    loss = Huber()
    loss.delta = 3.0
    problem = Problem(loss, "hard", [4, 2, 1], 4, lambda_w=0.02, lambda_h=0.01)
    with pytest.raises(ValueError, match="Huber has the attribute 'delta' beside the arguments of its constructor"):
        problem.describe()


def test_numbers_of_numpy_are_described_as_those_of_python():
    problem = Problem(Huber(), None, [4, 2, 1], 4, lambda_w=np.float64(0.02), lambda_h=0.01)
    assert type(problem.describe()["init_args"]["lambda_w"]) is float
    assert Problem.from_description(problem.describe()).describe() == problem.describe()
