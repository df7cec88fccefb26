"""Objectives along a direction, in closed form and by autograd on the same parameters."""

import torch
from torch import nn

from nclightning.models.closed_form import UFMObjective
from nclightning.objective import Objective
from nclightning.optim import ClosureObjective
from nclightning.problems import BinaryCrossEntropy, CrossEntropy, Problem, SquaredError
from tests.problems.cases import one_against_rest

OFFSET, WEIGHTS = [0.5, -1.0, 0.0, 2.0], [0.2, 1.0, 3.0, 0.7]


SOFT = [[0.7, 0.1, 0.1, 0.1], [0.0, 0.5, 0.5, 0.0], [0.25] * 4, [0.0, 0.0, 0.0, 1.0]]


MARGIN = (2 * torch.eye(4) - 1).tolist()


PENALTIES = (7e-3, 3e-3, 0.2)


# Objectives of four outputs and as many groups; the bias is penalized.
LOSSES = {
    "mse": lambda: Objective("mse", *PENALTIES),
    "ce": lambda: Objective("ce", *PENALTIES),
    "squared error, hard labels": lambda: Objective(SquaredError(), *PENALTIES),
    "squared error, any targets": lambda: Objective(SquaredError(), *PENALTIES, [[x - 2.0 for x in r] for r in SOFT]),
    "cross-entropy, soft targets": lambda: Objective(CrossEntropy(), *PENALTIES, SOFT),
    "cross-entropy, offset": lambda: Objective(CrossEntropy(OFFSET), *PENALTIES),
    "cross-entropy, weights": lambda: Objective(CrossEntropy(None, WEIGHTS), *PENALTIES),
    "cross-entropy, all of it": lambda: Objective(CrossEntropy(OFFSET, WEIGHTS), *PENALTIES, SOFT),
    "binary cross-entropy": lambda: Objective(BinaryCrossEntropy(), *PENALTIES, [[1, 0, 1, 0], *SOFT[1:]]),
    "binary cross-entropy, hard labels": lambda: Objective(BinaryCrossEntropy(), *PENALTIES),
    "squared hinge, by its value alone": lambda: Objective(one_against_rest([1], 1, 1.0, 1.0).loss, *PENALTIES, MARGIN),
}


# Some hundred roundings of the dtype, of the largest entry.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-5}


def point(loss, shape, dtype=torch.float64, scale=1.0, seed=0):
    """Leaves and labels, in an order that is not that of the classes."""
    K, n, d = shape
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *sizes: nn.Parameter(  # noqa: E731
        (scale * torch.randn(*sizes, dtype=torch.float64, generator=generator)).to(dtype)
    )
    features, head = draw(K * n, d), [draw(K, d), *([draw(K)] if loss == "mse" else [])]
    labels = torch.arange(K).repeat_interleave(n)[torch.randperm(K * n, generator=generator)]
    return features, head, labels


def lines(loss, shape, dtype=torch.float64, **options):
    """The closed form, and autograd on the same parameters."""
    features, head, labels = point(loss, shape, dtype, **options)
    objective, params = Objective(loss, 7e-3, 3e-3), [*head, features]

    @torch.enable_grad()
    def closure():
        for p in params:
            p.grad = None
        value = objective(head[0], features, labels, *head[1:])
        value.backward()
        return value.detach()

    return (
        UFMObjective(objective, features, head, labels, params, len(labels)),
        ClosureObjective(closure, params),
        params,
    )


def any_lines(name, dtype, with_bias=True, scale=1.0):
    """The closed form, and autograd of the problem's own value on copies of the parameters."""
    objective, counts = LOSSES[name](), [2, 5, 1, 4]
    features, head, _ = point("mse" if with_bias else "ce", (4, 3, 6), dtype, scale)
    labels = torch.arange(4).repeat_interleave(torch.tensor(counts))[
        torch.tensor([5, 11, 2, 8, 0, 9, 3, 7, 1, 10, 4, 6])
    ]
    bias = objective.lambda_b if with_bias else "none"
    problem = Problem(objective.function, objective.targets, counts, 6, objective.lambda_w, objective.lambda_h, bias)
    params, twins = ([nn.Parameter(p.detach().clone()) for p in (*head, features)] for _ in range(2))

    @torch.enable_grad()
    def closure():
        for p in twins:
            p.grad = None
        weight, *rest, rows = twins
        value = problem.value(weight, rows, labels, *rest)
        value.backward()
        return value.detach()

    ours = UFMObjective(objective, params[-1], params[:-1], labels, params, 12)
    return ours, ClosureObjective(closure, twins), params, twins
