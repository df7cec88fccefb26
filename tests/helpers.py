"""What several tests need."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nclightning.objective import Objective
from nclightning.theory import Solution


def fakes_a_gpu():
    """Whether fake tensors take real ones to a GPU that is not there: torch 2.7 with CUDA looks for its driver."""
    real = torch.ones(1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            return real.to(torch.device("cuda", 0)).device.type == "cuda"
        except (RuntimeError, AssertionError):
            return False


def linear_head(num_classes, dim, generator):
    """A linear layer whose weight is drawn from a generator."""
    layer = torch.nn.Linear(dim, num_classes)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(num_classes, dim, generator=generator))
    return layer


def objective_of(problem):
    return Objective(problem.loss, problem.lambda_w, problem.lambda_h)


def random_point(problem, generator, scale=1.0):
    """A normal point, with the labels in a random order."""
    K, d, N = problem.num_classes, problem.feature_dim, problem.num_samples
    draw = lambda *shape: scale * torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    labels = problem.labels()[torch.randperm(N, generator=generator)]
    return Solution(draw(K, d), draw(N, d), labels, draw(K) if problem.loss == "mse" else None)


def perturb(point, generator, size):
    """Move a point by ``size`` in a random direction."""
    parts = [None if t is None else torch.randn(t.shape, dtype=t.dtype, generator=generator) for t in _free(point)]
    norm = torch.stack([p.square().sum() for p in parts if p is not None]).sum().sqrt()
    weight, features, bias = (t if p is None else t + size * p / norm for t, p in zip(_free(point), parts, strict=True))
    return Solution(weight, features, point.labels, bias)


def gradient(problem, point):
    """Gradient of the objective by autograd, one tensor per free part."""
    leaves = [None if t is None else t.clone().requires_grad_() for t in _free(point)]
    value = objective_of(problem)(leaves[0], leaves[1], point.labels, leaves[2])
    return torch.autograd.grad(value, [leaf for leaf in leaves if leaf is not None])


def gradient_norm(problem, point):
    return float(torch.stack([g.square().sum() for g in gradient(problem, point)]).sum().sqrt())


def dense_hessian(problem, point):
    """Hessian of the objective in head, features (and bias) flattened in this order, by autograd."""
    parts = [t for t in _free(point) if t is not None]
    objective = objective_of(problem)

    def value(flat):
        split = [p.view_as(t) for p, t in zip(flat.split([t.numel() for t in parts]), parts, strict=True)]
        return objective(split[0], split[1], point.labels, split[2] if len(split) > 2 else None)

    return torch.func.hessian(value)(torch.cat([t.flatten() for t in parts]))


def moved(point, direction):
    """Add a flat vector in the order of :func:`dense_hessian`."""
    parts = [t for t in _free(point) if t is not None]
    steps = direction.split([t.numel() for t in parts])
    weight, features, *bias = (t + step.view_as(t) for t, step in zip(parts, steps, strict=True))
    return Solution(weight, features, point.labels, bias[0] if bias else None)


def norm(point):
    return float(torch.stack([t.square().sum() for t in _free(point) if t is not None]).sum().sqrt())


def _free(point):
    return point.weight, point.features, point.bias


class Largest(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [
            leaf.untyped_storage().nbytes() // leaf.element_size()
            for leaf in tree_leaves(result)
            if isinstance(leaf, torch.Tensor)
        ]
        self.elements = max([self.elements, *sizes])
        return result


class Once(torch.autograd.Function):
    """Torch's products with a Hessian leave out how such a gradient depends on what came in."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g


def fake_twin(model, device, num_samples):
    """Replace all parameters by fake ones, and return fake rows and labels; call it under ``FakeTensorMode``."""
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device=device)))
    return tuple(torch.zeros(num_samples, dtype=torch.int64, device=device) for _ in range(2))
