"""Problems in one line."""

import copy
import pickle

import pytest
import torch

from nclightning import problems as of
from tests.problems.cases import CASES, LABELS, SOFT

LINES = {
    "MSE loss, K = 3, n = 2, d = 4, lambda_w = 0.02, lambda_h = 0.01, free bias": CASES["balanced mse"],
    "CE loss, K = 4, n = 0 to 5, N = 10, d = 4, lambda_w = 0.01, lambda_h = 0.01, no bias": CASES["absent class"],
    "CE loss, label smoothing 0.1, K = 4, n = 2, d = 5, lambda_w = 0.01, lambda_h = 0.01, no bias": CASES[
        "label smoothing"
    ],
    "CE loss, soft targets, K = 3, M = 4, n = 1 to 3, N = 9, d = 4, lambda_w = 0.01, lambda_h = 0.01, no bias": CASES[
        "soft labels"
    ],
    "CE loss, class weights 0.5 to 4, K = 3, n = 1 to 8, N = 12, d = 4, lambda_w = 0.01, lambda_h = 0.01, no bias": (
        CASES["weighted ce"]
    ),
    "BCE loss, binary targets, K = 3, M = 4, n = 1, d = 2, lambda_w = 1e-05, lambda_h = 1, lambda_b = 0.3": (
        lambda: of.multi_label_bce(LABELS, [1, 1, 1, 1], 2, 1e-5, 1.0, 0.3)
    ),
    "MSE loss, real targets, K = 1, M = 2, n = 1, d = 2, lambda_w = 0.1, lambda_h = 0.1, no bias": (
        lambda: of.regression([[0.5], [7.0]], 2, 0.1, 0.1, "none")
    ),
    "SquaredHinge loss, real targets, K = 3, n = 1 to 6, N = 10, d = 4, lambda_w = 0.01, lambda_h = 0.02, no bias": (
        CASES["squared hinge"]
    ),
}


@pytest.mark.parametrize(("line", "problem"), LINES.items(), ids=list(LINES))
def test_one_line(line, problem):
    assert problem().summary() == line
    assert repr(problem()) == f"Problem({line})"


@pytest.mark.parametrize("name", list(CASES))
def test_copies_say_the_same(name):
    problem = CASES[name]()
    again = problem.replace()
    assert again.summary() == problem.summary()
    assert copy.copy(problem).summary() == problem.summary()
    assert pickle.loads(pickle.dumps(problem)).summary() == problem.summary()


def test_the_line_does_not_grow_with_the_problem():
    counts = torch.arange(1, 1001).tolist()
    problem = of.logit_adjusted_ce(counts, 2000, 1e-3, 1e-3)
    assert len(problem.summary()) < 140
    assert len(repr(problem)) < 150


def test_smoothing_of_another_kind_is_none():
    uneven = [[0.9, 0.1, 0.0], [0.1, 0.9, 0.0], [0.0, 0.1, 0.9]]
    assert ", soft targets, K = 3, n" in of.soft_labels(uneven, [1, 1, 1], 3, 0.1, 0.1).summary()
    assert ", soft targets, K = 3, M" in of.soft_labels(SOFT, [1] * 4, 3, 0.1, 0.1).summary()


class Odd(of.SquaredError):
    """Made with what is no number, and keeps only some of it."""

    short_name = ""

    def __init__(self, mode="a" * 100, table=None, kept=(), lost=3):
        self.mode, self.table, self.kept = mode, table or {}, list(kept)


def test_losses_of_others_are_named_whatever_they_were_made_with():
    problem = of.Problem(Odd(), None, [2, 2], 3, 0.1, 0.1)
    assert problem.summary().startswith("Odd loss, mode aaaaaaaaaaaaaaaaaaaa, table {}, kept none, K = 2, n = 2, d = 3")
