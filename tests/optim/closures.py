"""Parameters, small objectives and the closures that evaluate them."""

import math

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from nclightning.optim import SearchStatus


def parameter(*values, dtype=torch.float64):
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def closure_of(optimizer, f, *params):
    def closure():
        optimizer.zero_grad()
        value = f(*params)
        value.backward()
        return value

    return closure


def quadratic(condition, size=50):
    """Minimum 1 at ones; eigenvalues from 1/condition to 1, in a basis that no coordinate is along."""
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    matrix = basis @ torch.diag(torch.logspace(-math.log10(condition), 0, size, dtype=torch.float64)) @ basis.T

    def f(x):
        d = x - 1
        return d @ (matrix.to(x.dtype) @ d) / 2 + 1

    return f


def network(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3)).to(dtype)


def loss_of(model, weights=None):
    dtype = next(model.parameters()).dtype
    x = torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
    penalty = 5e-2 * sum(p.square().sum() for p in model.parameters())
    return nn.functional.cross_entropy(model(x), torch.arange(40) % 3) + penalty


def step(optimizer, model, count, line=None):
    closure = line or closure_of(optimizer, lambda: loss_of(model))
    outcomes = []
    for _ in range(count):
        optimizer.step(closure)
        outcomes.append(optimizer.outcome)
    return outcomes


def logistic(dtype):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 12, dtype=torch.float64, generator=generator) * torch.logspace(-0.5, 0.5, 12).double()
    labels = (inputs.sum(1) + 5 * torch.randn(200, dtype=torch.float64, generator=generator) > 0).double()
    inputs, labels = inputs.to(dtype), labels.to(dtype)

    def f(w):
        return nn.functional.binary_cross_entropy_with_logits(inputs @ w, labels) + 1e-4 * w.square().sum()

    return f


def freeze(model, optimizer):
    model[0].weight.requires_grad_(False)


def write(model, optimizer):
    model[2].bias.data.add_(0.3)


def shorten_history(model, optimizer):
    optimizer.param_groups[0]["history"] = 2


def add_a_group(model, optimizer):
    model.extra = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer.add_param_group({"params": [model.extra]})


def change_dtype(model, optimizer):
    model.float()


def new_memory(model, optimizer):
    for p in model.parameters():
        p.data = p.data.clone()


def clear(model, optimizer):
    optimizer.zero_grad()


def thaw(model, optimizer):
    freeze(model, optimizer)
    step(optimizer, model, 3)
    model[0].weight.requires_grad_(True)


DISTURBANCES = [freeze, write, shorten_history, add_a_group, change_dtype, new_memory, clear, thaw]


CLASSES = torch.tensor([0, 0, 1, 1])


FALLING = {
    "-x^2": (lambda x: -x.square().sum(), SearchStatus.UNBOUNDED),
    "-x^4": (lambda x: -(x**4).sum(), SearchStatus.UNBOUNDED),
    "-x": (lambda x: -x.sum(), None),
    "-log x": (lambda x: -x.log().sum(), None),
    "exp(-x)": (lambda x: (-x).exp().sum(), SearchStatus.UNATTAINED),
    "separable": (
        lambda x: cross_entropy(torch.outer(x.new_tensor([1.0, 2.0, -1.0, -2.0]), torch.stack([x[0], -x[0]])), CLASSES),
        SearchStatus.UNATTAINED,
    ),
}
