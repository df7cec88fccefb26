"""Functions with known minima that line searches are tested on. Add a case here.

The sets of optax (``linesearch_test``), jaxopt and SciPy (scalar and line functions), optimistix (``tests/helpers``)
and pytorch-minimize, in the published forms of the functions: ``rosenbrock`` has its square.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Function:
    name: str
    f: Callable
    start: tuple
    minimum: float | None  # Value where descent from there ends; None where it is known to be stationary only.
    steps: int = 2000
    tolerance: float = 1e-12  # Of the value, absolute; looser where gradient descent itself is slow.


def rosenbrock(x):
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def himmelblau(x):
    return (x[0] ** 2 + x[1] - 11) ** 2 + (x[0] + x[1] ** 2 - 7) ** 2


def matyas(x):
    return 0.26 * (x**2).sum() - 0.48 * x[0] * x[1]


def eggholder(x):
    a, b = x[0], x[1] + 47
    return -b * torch.sin((a / 2 + b).abs().sqrt()) - a * torch.sin((a - b).abs().sqrt())


def zakharov(x):
    weighted = (0.5 * torch.arange(1, len(x) + 1, dtype=x.dtype) * x).sum()
    return (x**2).sum() + weighted**2 + weighted**4


def beale(x):
    return sum((c - x[0] * (1 - x[1] ** k)) ** 2 for k, c in ((1, 1.5), (2, 2.25), (3, 2.625)))


def least_squares(x):
    A = torch.tensor([[2.0, 1.0], [1.0, 3.0], [0.0, 1.0]], dtype=x.dtype)
    return ((A @ x - torch.tensor([1.0, 2.0, 3.0], dtype=x.dtype)) ** 2).sum() / 2


def quadratic_plus_one(x):
    """x^T A x + 1 with the positive semidefinite A of fixed entries cos(ij): SciPy's second line function."""
    i = torch.arange(1, len(x) + 1, dtype=x.dtype)
    return (torch.cos(torch.outer(i, i)) @ x).square().sum() + 1


# Of -x - x^3 + x^4: the real root of 4x^3 - 3x^2 - 1 is 1.
# Of exp(-4x) + x^2: the root of 2x = 4 exp(-4x).
_ROOT = 0.4014529990800444
FUNCTIONS = [
    Function("bowl", lambda x: (x**2).sum(), (3.0, -4.0, 0.5), 0.0),
    Function("square-minus-one", lambda x: (x**2 - 1).sum(), (0.7,), -1.0),
    Function("quadratic-20", quadratic_plus_one, (1.0,) * 20, 1.0),
    Function("polynomial", lambda x: (-x - x**3 + x**4).sum(), (0.1,), -1.0),
    Function("exponential", lambda x: (torch.exp(-4 * x) + x**2).sum(), (2.0,), math.exp(-4 * _ROOT) + _ROOT**2),
    Function("sine", lambda x: -torch.sin(10 * x).sum(), (0.3,), -1.0),
    Function("rosenbrock-2", rosenbrock, (-1.2, 1.0), 0.0, 3000, 1e-6),
    Function("rosenbrock-10", rosenbrock, (0.2,) * 10, 0.0, 3000, 1e-2),
    Function("rosenbrock-16", rosenbrock, (0.5,) * 16, 0.0, 3000, 1e-2),
    Function("himmelblau", himmelblau, (2.0, 2.5), 0.0),
    Function("matyas", matyas, (6.0, 6.0), 0.0),
    Function("eggholder", eggholder, (100.0, 100.0), None),
    Function("zakharov-6", zakharov, (600.0, 700.0, 200.0, 100.0, 90.0, 1e4), 0.0),
    Function("beale", beale, (2.0, 0.0), 0.0),
    Function("least-squares", least_squares, (5.0, -7.0), 2.4),
]
