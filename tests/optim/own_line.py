"""An objective of two parameters, and along a direction one that somebody else could have written."""

import torch

from nclightning.optim import LineObjective
from nclightning.optim.evaluation import Evaluation

CURVATURES = torch.tensor([1.0, 0.5, 0.2, 0.9], dtype=torch.float64)


def parameters():
    """Two parameters of two numbers each, so that exchanges within and between them can be told."""
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(2, dtype=torch.float64)) for _ in range(2)]


def objective(params):
    """Sum of a x^2 / 2 + x^4 / 4, whose gradient is a x + x^3."""
    x = torch.cat([p.flatten() for p in params])
    return (CURVATURES.to(x.dtype) * x.square() / 2 + x**4 / 4).sum()


def closure_of(optimizer, params):
    def closure():
        optimizer.zero_grad()
        value = objective(params)
        value.backward()
        return value

    return closure


class OwnLine(LineObjective):
    """A line objective of somebody's own, which keeps no copy that a step could be compared with."""

    def __init__(self, params):
        self.params = params

    def __call__(self):
        return torch.tensor(self.evaluate().value)

    def evaluate(self):
        with torch.enable_grad():
            value = objective(self.params)
            gradients = list(torch.autograd.grad(value, self.params))
        square = sum(float(g.square().sum()) for g in gradients)
        return Evaluation(float(value), torch.finfo(value.dtype).eps, gradients, square)

    def measure(self):
        raise NotImplementedError

    def begin(self, start, along=None):
        self.along, self.origin = along or start.gradients, [p.detach().clone() for p in self.params]

    def trial(self, size):
        for p, x, g in zip(self.params, self.origin, self.along, strict=True):
            p.copy_(x - size * g)
        self.end = self.evaluate()
        return self.end.value

    def slope(self):
        return sum(float((a * b).sum()) for a, b in zip(self.along, self.end.gradients, strict=True))

    def stands_still(self):
        return all(torch.equal(p, x) for p, x in zip(self.params, self.origin, strict=True))

    def accept(self):
        return self.end

    def reject(self):
        for p, x in zip(self.params, self.origin, strict=True):
            p.copy_(x)
