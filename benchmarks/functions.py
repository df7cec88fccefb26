"""How many evaluations do optimizers need on functions of all kinds? Prints a table.

    python benchmarks/functions.py [--functions NAME ...] [--optimizers NAME ...]

Test functions of the literature, quadratics, logistic regression, functions with a saddle, with a valley of minima and
without a minimum, and a small network. Evaluations are calls of the closure, which has value and gradient; a product
with the Hessian is a difference of two gradients and costs one. The table has how many it takes until the norm of the
gradient is 1e-8 of that at the start, and the least such ratio seen within 2,000 evaluations or until the optimizer
ends; where it says why it ended, the word.
"""

import argparse
import math
from typing import NamedTuple

import torch
from quiet import settle
from torch import nn

from nclightning.optim import ArmijoCG, ArmijoGD, ArmijoLBFGS, ArmijoNewtonCG

MOST, PATIENCE, RATIO = 2000, 300, 1e-8


class Function(NamedTuple):
    """A function, where it is begun, and what it stands for."""

    f: object
    start: tuple
    about: str


def rosenbrock(x):
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def beale(x):
    return sum((c - x[0] * (1 - x[1] ** k)) ** 2 for k, c in ((1, 1.5), (2, 2.25), (3, 2.625)))


def quadratic(condition, size):
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))[0]
    matrix = basis @ torch.diag(torch.logspace(-math.log10(condition), 0, size, dtype=torch.float64)) @ basis.T
    return lambda x: (x - 1) @ (matrix @ (x - 1)) / 2 + 1


def logistic(size=20):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, size, dtype=torch.float64, generator=generator) * torch.logspace(-1, 1, size).double()
    labels = (inputs.sum(1) + 5 * torch.randn(200, dtype=torch.float64, generator=generator) > 0).double()
    loss = nn.functional.binary_cross_entropy_with_logits
    return lambda w: loss(inputs @ w, labels) + 1e-4 * w.square().sum()


def network(hidden=10):
    """Cross-entropy of a tanh network on 60 samples of 3 classes, with weight decay."""
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(60, 5, dtype=torch.float64, generator=generator), torch.arange(60) % 3

    def f(w):
        first, second = w[: 6 * hidden].view(hidden, 6), w[6 * hidden :].view(3, hidden + 1)
        features = torch.tanh(nn.functional.linear(inputs, first[:, :5], first[:, 5]))
        logits = nn.functional.linear(features, second[:, :hidden], second[:, hidden])
        return nn.functional.cross_entropy(logits, labels) + 1e-3 * w.square().sum()

    start = torch.randn(6 * hidden + 3 * (hidden + 1), dtype=torch.float64, generator=generator) / 2
    return f, tuple(start.tolist())


FUNCTIONS = {
    "Rosenbrock, 2": Function(rosenbrock, (-1.2, 1.0), "a bent valley"),
    "Rosenbrock, 16": Function(rosenbrock, (0.5,) * 16, "the same in more dimensions"),
    "Beale": Function(beale, (2.0, 0.0), "flat corners"),
    "quadratic, 1e3": Function(quadratic(1e3, 100), (0.0,) * 100, "condition 1e3, 100 parameters"),
    "quadratic, 1e8": Function(quadratic(1e8, 8), (0.0,) * 8, "condition 1e8, 8 parameters"),
    "logistic": Function(logistic(), (0.0,) * 20, "features of scales 0.1 to 10"),
    "network": Function(*network(), "93 weights, weight decay"),
    "saddle": Function(
        lambda x: x[0] ** 4 / 4 - x[0] ** 2 / 2 + 5 * x[1] ** 2, (1e-6, 1.0), "begun 1e-6 beside a saddle's ridge"
    ),
    "valley": Function(lambda x: (x[0] * x[1] - 1) ** 2 + 1, (3.0, 0.1), "minima on a hyperbola"),
    "quartic": Function(lambda x: (x**4).sum(), (0.7, 2.0), "no curvature at the minimum"),
    "-log": Function(lambda x: -x.log().sum(), (1.0,), "no minimum"),
}
OPTIMIZERS = {
    "ArmijoGD": ArmijoGD,
    "ArmijoLBFGS": ArmijoLBFGS,
    "ArmijoCG": ArmijoCG,
    "ArmijoNewtonCG": ArmijoNewtonCG,
    "torch LBFGS, strong Wolfe": lambda params: torch.optim.LBFGS(
        params, history_size=10, line_search_fn="strong_wolfe", tolerance_grad=0.0, tolerance_change=0.0
    ),
}


class Arrived(Exception):
    """Raised where a run need not go on."""


def run(function, make):
    """Return a cell of the table."""
    x = nn.Parameter(torch.tensor(function.start, dtype=torch.float64))
    optimizer, norms = make([x]), []

    def closure():
        if len(norms) >= MOST:
            raise Arrived
        optimizer.zero_grad()
        value = function.f(x)
        value.backward()
        norm = float(x.grad.norm())
        norms.append(norm if math.isfinite(norm) else math.inf)
        return value

    ending, best = "", math.inf
    waited = 0
    try:
        while waited < PATIENCE:
            optimizer.step(closure)
            waited, best = (0, min(norms)) if min(norms) < best else (waited + 1, best)
            outcome = getattr(optimizer, "outcome", None)
            if outcome is not None and not outcome.accepted:
                ending = outcome.status.value
                break
    except Arrived:
        pass
    first, least = norms[0], min(norms)
    count = next((i + 1 for i, norm in enumerate(norms) if norm <= RATIO * first), None)
    if ending in ("unbounded", "unattained"):
        return f"{ending}, {len(norms)}"
    return f"{count or '-'} / {least / first:.0e}"


def main(arguments=None):
    """Print one line per function."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--functions", nargs="+", default=list(FUNCTIONS), choices=list(FUNCTIONS), metavar="NAME")
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=list(OPTIMIZERS), metavar="NAME")
    given = parser.parse_args(arguments)
    settle()
    print(f"| function | | {' | '.join(given.optimizers)} |\n|---|---|{'---|' * len(given.optimizers)}")
    for name in given.functions:
        cells = [run(FUNCTIONS[name], OPTIMIZERS[optimizer]) for optimizer in given.optimizers]
        print(f"| {name} | {FUNCTIONS[name].about} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
