"""Problems made under another default device of torch, as ``Trainer.init_module`` sets it: sizes lie on the host."""

import pytest
import torch

from nclightning.metrics import Optimality
from nclightning.problems import Loss, Problem, label_smoothing, logit_adjusted_ce, mixup, unbalanced_ce, weighted_ce

PENALTIES = {"lambda_w": 0.01, "lambda_h": 0.02}


class Own(Loss):
    def value(self, logits, targets):
        return (logits - targets).square().sum(dim=1) / 2


MAKERS = {
    "hard labels": lambda: unbalanced_ce([5, 3, 1], 4, **PENALTIES),
    "smoothed labels": lambda: label_smoothing([5, 3, 1], 0.1, 4, **PENALTIES),
    "mixup": lambda: mixup(3, 2, 1, 4, **PENALTIES),
    "weights": lambda: weighted_ce([5, 3, 1], [1.0, 2.0, 3.0], 4, **PENALTIES),
    "adjusted logits": lambda: logit_adjusted_ce([5, 3, 1], 4, **PENALTIES),
    "a loss of one's own": lambda: Problem(Own(), None, [5, 3, 1], 4, **PENALTIES),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_problem_is_the_same_under_another_default_device(name):
    with torch.device("meta"):  # Whatever is put there has no values.
        problem = MAKERS[name]()
        value, hard, labels = problem.optimal_value, problem.has_hard_labels, problem.labels()
    expected = MAKERS[name]()
    assert (value, hard) == (expected.optimal_value, expected.has_hard_labels)
    assert problem.describe() == expected.describe()
    assert labels.device.type == "meta"
    assert torch.equal(problem.labels("cpu"), expected.labels())


def test_targets_beside_a_problem_are_refused_as_a_tensor_too():
    with pytest.raises(ValueError, match="targets cannot be given together with a problem"):
        Optimality(unbalanced_ce([5, 3, 1], 4, **PENALTIES), torch.zeros(3, 4), targets=torch.eye(3))
