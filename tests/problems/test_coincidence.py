"""Groups that vanish, and groups that share a feature, against all pairs of features of a random optimum."""

import pytest
import torch

from nclightning.problems import mse_without_bias, regression, soft_labels, unbalanced_ce, unbalanced_mse
from nclightning.problems.coincidence import coinciding_groups
from tests.problems.cases import CASES

LONG_TAIL = [500, 300, 100, 50, 20, 10, 5, 5, 3, 1]
KNOWN = {
    "two minorities have merged": (unbalanced_ce([100, 100, 2, 2], 3, 0.01, 0.01), (), ((2, 3),)),
    "two minorities are apart": (unbalanced_ce([100, 100, 2, 2], 3, 1e-4, 1e-4), (), ()),
    "a class has vanished": (mse_without_bias([100, 100, 4], 3, 0.01, 0.01), (2,), ()),
    "what says nothing vanishes": (
        soft_labels([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]], [3, 3, 3], 2, 1e-3, 1e-3),
        (2,),
        (),
    ),
    "all classes have vanished": (unbalanced_ce([3, 0, 1], 3, 0.5, 0.5), (0, 2), ()),
    "indices count groups without samples": (unbalanced_ce([100, 0, 100, 2, 2], 4, 0.01, 0.01), (), ((3, 4),)),
    "equal targets share a feature anyway": (regression([[1.0], [1.0], [3.0]], 2, 1e-3, 1e-3), (), ()),
    "few features leave a choice": (unbalanced_mse([5, 5, 5, 5], 2, 1e-3, 1e-3), (), ()),
}


@pytest.mark.parametrize(("problem", "vanished", "shared"), KNOWN.values(), ids=list(KNOWN))
def test_what_is_known(problem, vanished, shared):
    assert coinciding_groups(problem) == (vanished, shared)


def in_pairs(problem):
    """The same from the features of one optimum, pair by pair."""
    optimum = problem.random_optimum(torch.Generator().manual_seed(0))
    rows = {int(label): row for label, row in zip(optimum.labels, optimum.features, strict=True)}
    scale = max(float(row.norm()) for row in rows.values())
    vanished = [label for label, row in rows.items() if float(row.norm()) <= 1e-7 * scale]
    shared = {}
    for label, row in rows.items():
        if label not in vanished:
            first = next(other for other, its in rows.items() if float((row - its).norm()) <= 1e-7 * scale)
            shared.setdefault(first, []).append(label)
    differ = lambda labels: len({tuple(problem.targets[label].tolist()) for label in labels}) > 1  # noqa: E731
    return sorted(vanished), sorted(labels for labels in shared.values() if len(labels) > 1 and differ(labels))


@pytest.mark.parametrize("name", [name for name in CASES if "few features" not in name])
def test_cases_in_pairs(name):
    problem = CASES[name]()
    vanished, shared = coinciding_groups(problem)
    assert (list(vanished), list(map(list, shared))) == in_pairs(problem)


@pytest.mark.parametrize("lambda_w", [1e-3, 5e-3, 1e-2, 2e-2, 5e-2])
def test_a_long_tail_in_pairs(lambda_w):
    problem = unbalanced_ce(LONG_TAIL, 16, lambda_w, 1e-3)
    vanished, shared = coinciding_groups(problem)
    assert (list(vanished), list(map(list, shared))) == in_pairs(problem)
