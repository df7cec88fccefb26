"""ArmijoNewtonCG: products with the Hessian, its steps, singular Hessians, and what counts as an evaluation."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from nclightning.models.graph import AutogradObjective
from nclightning.optim import ArmijoNewtonCG, ClosureObjective, LineObjective
from nclightning.optim.evaluation import Evaluation
from tests.optim.closures import closure_of, loss_of, network, parameter, quadratic, step
from tests.optim.own_line import OwnLine, parameters
from tests.optim.problems import FUNCTIONS, rosenbrock


def flat(tensors):
    return torch.cat([t.detach().double().reshape(-1) for t in tensors])


def whole_hessian(model):
    names, params = zip(*model.named_parameters(), strict=True)
    sizes = [p.numel() for p in params]

    def value(vector):
        parts = [part.view_as(p) for part, p in zip(vector.split(sizes), params, strict=True)]

        class Called:
            def parameters(self):
                return iter(parts)

            def __call__(self, x):
                return torch.func.functional_call(model, dict(zip(names, parts, strict=True)), (x,))

        return loss_of(Called())

    return torch.autograd.functional.hessian(value, torch.cat([p.detach().reshape(-1) for p in params]))


def closure_with(model, **options):
    def closure():
        model.zero_grad()
        value = loss_of(model)
        value.backward(**options)
        return value

    return closure


LINES = {
    "differences": (lambda m: ClosureObjective(closure_with(m), list(m.parameters())), 1e-6, 0),
    "graph of a closure": (
        lambda m: ClosureObjective(closure_with(m, create_graph=True), list(m.parameters())),
        1e-13,
        0,
    ),
    "graph of a line": (lambda m: AutogradObjective(lambda: loss_of(m), list(m.parameters())), 1e-13, 1),
}


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
@pytest.mark.parametrize(("make", "tolerance", "evaluations"), LINES.values(), ids=LINES)
def test_products_are_those_of_the_hessian_and_leave_everything_as_it_is(make, tolerance, evaluations):
    model = network()
    line, params = make(model), list(model.parameters())
    matrix, generator = whole_hessian(model), torch.Generator().manual_seed(0)
    before = [p.detach().clone() for p in params]
    with torch.no_grad():
        start = line.evaluate()
        gradients = flat(start.gradients)
        hessian = line.hessian(start, 0.0)
        assert hessian.evaluations == evaluations
        for scale in (1e-9, 1.0, 1e9):
            vector = [scale * torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in params]
            expected = matrix @ flat(vector)
            found = flat(hessian.multiply(vector))
            assert float((found - expected).norm() / expected.norm()) < tolerance
    assert all(torch.equal(p, x) for p, x in zip(params, before, strict=True))
    assert torch.equal(flat(start.gradients), gradients)


def test_differences_in_float32_have_half_of_its_digits():
    model, reference = network(torch.float32), network()
    reference.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    matrix, line = whole_hessian(reference), ClosureObjective(closure_with(model), list(model.parameters()))
    vector = [torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) for p in model.parameters()]
    with torch.no_grad():
        found = line.hessian(line.evaluate(), 0.0).multiply(vector)
    expected = matrix @ flat(vector)
    assert 1e-6 < float((flat(found) - expected).norm() / expected.norm()) < 1e-2


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
@pytest.mark.parametrize("graph", [False, True], ids=["differences", "graph"])
def test_convergence_is_faster_than_linear(graph):
    x = parameter(-1.2, 1.0)
    optimizer = ArmijoNewtonCG([x])

    def closure():
        optimizer.zero_grad()
        value = rosenbrock(x) + 1
        value.backward(create_graph=graph)
        return value

    norms = []
    while not norms or norms[-1] > 1e-12:
        optimizer.step(closure)
        norms.append(optimizer.outcome.grad_norm)
        assert x.grad is None or not x.grad.requires_grad
        assert len(norms) < 80
    small = [max(b, 1e-15) / a for a, b in pairwise(norms) if a < 1e-2]
    assert math.exp(sum(map(math.log, small)) / len(small)) < 0.05


def test_what_counts_as_an_evaluation():
    """On (x - 1)^2 + 1 a step is one product and one trial; the first has the evaluation of the start too."""
    x, calls = parameter(5.0, 3.0), []
    optimizer = ArmijoNewtonCG([x])
    inner = closure_of(optimizer, lambda x: (x - 1).square().sum() + 1, x)
    optimizer.step(lambda: calls.append(1) or inner())
    assert optimizer.outcome.evaluations == optimizer.total_evaluations == len(calls) == 3
    torch.testing.assert_close(x.detach(), torch.ones(2, dtype=x.dtype), rtol=0, atol=1e-6)
    y = parameter(5.0, 3.0)
    other = ArmijoNewtonCG([y])
    other.step(AutogradObjective(lambda: (y - 1).square().sum() + 1, [y]))
    assert other.outcome.evaluations == 4  # And the graph of the gradient.
    torch.testing.assert_close(y.detach(), torch.ones(2, dtype=x.dtype), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("condition", "size", "evaluations"), [(1e4, 20, 400), (1e8, 6, 200)])
def test_quadratics_of_any_condition(condition, size, evaluations):
    x = nn.Parameter(torch.zeros(size, dtype=torch.float64))
    optimizer = ArmijoNewtonCG([x])
    line = AutogradObjective(lambda: quadratic(condition, size)(x), [x])
    while optimizer.outcome is None or optimizer.outcome.grad_norm > 1e-14:
        optimizer.step(line)
        assert optimizer.outcome.accepted
        assert optimizer.total_evaluations < evaluations
    # The gradient's round-off, over the least eigenvalue.
    assert float((x.detach() - 1).norm()) < 2e-14 * condition


def test_a_saddle_is_left_along_negative_curvature():
    """From 1e-8 beside it, where gradient descent with steps of 1 takes some thirty steps."""
    x = parameter(1e-8, 1.0)
    optimizer = ArmijoNewtonCG([x])
    closure = closure_of(optimizer, lambda x: x[0] ** 4 / 4 - x[0] ** 2 / 2 + 5 * x[1] ** 2, x)
    for _ in range(40):
        optimizer.step(closure)
        if optimizer.outcome.grad_norm < 1e-10:
            break
    assert abs(x[0].item()) == pytest.approx(1.0, abs=1e-10)
    assert optimizer.total_evaluations < 80


def test_a_singular_hessian_does_no_harm():
    """Least squares with more unknowns than equations: the steps stay in the range, so that the minimum found is the
    one nearest to the start."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(6, 15, dtype=torch.float64, generator=generator)
    b = torch.randn(6, dtype=torch.float64, generator=generator)
    start = torch.randn(15, dtype=torch.float64, generator=generator)
    x = nn.Parameter(start.clone())
    optimizer = ArmijoNewtonCG([x])
    line = AutogradObjective(lambda: (a @ x - b).square().sum() + 1, [x])
    while optimizer.outcome is None or optimizer.outcome.grad_norm > 1e-13:
        optimizer.step(line)
        assert optimizer.total_evaluations < 100
    nearest = start - torch.linalg.pinv(a) @ (a @ start - b)
    torch.testing.assert_close(x.detach(), nearest, rtol=0, atol=1e-12)


class Plain(OwnLine):
    """A line without products."""


def test_a_line_without_products_is_refused_in_a_sentence():
    params = parameters()
    with pytest.raises(ValueError, match="Plain has no products with the Hessian: define its method hessian"):
        ArmijoNewtonCG(params).step(Plain(params))
    assert Plain.hessian is LineObjective.hessian


def test_at_most_so_many_products():
    function = next(f for f in FUNCTIONS if f.name == "quadratic-20")
    x = parameter(*function.start)
    optimizer = ArmijoNewtonCG([x], max_products=2)
    closure = closure_of(optimizer, function.f, x)
    for _ in range(5):
        optimizer.step(closure)
        assert optimizer.outcome.evaluations <= 4
    with pytest.raises(ValueError, match=r"max_products=...\) must be an integer of at least 1"):
        ArmijoNewtonCG([x], max_products=0)


def test_a_closure_and_a_line_end_at_the_same_minimum():
    plain, lazy = network(), network()
    optimizer, other = ArmijoNewtonCG(plain.parameters()), ArmijoNewtonCG(lazy.parameters())
    step(optimizer, plain, 25)
    step(other, lazy, 25, AutogradObjective(lambda: loss_of(lazy), list(lazy.parameters())))
    assert optimizer.outcome.objective == pytest.approx(other.outcome.objective, rel=1e-13)


def test_a_gradient_written_to_by_others_is_differentiated_anew():
    """The graph of a gradient is of the parameters at that time: after a write it is not used."""
    x = parameter(3.0, 4.0)
    line = ClosureObjective(lambda: _backward(x), [x])
    with torch.no_grad():
        start = line.evaluate()
        assert isinstance(start, Evaluation)
        x.mul_(1.0)
        (product,) = line.hessian(start, 0.0).multiply([torch.ones_like(x)])
    torch.testing.assert_close(product, 6 * x.detach(), rtol=1e-6, atol=0)


def _backward(x):
    value = (x**3).sum()
    x.grad = None
    (x.grad,) = torch.autograd.grad(value, x, create_graph=True)
    return value


@pytest.mark.parametrize("lowest", [0.01, -0.01], ids=["convex", "saddle"])
@pytest.mark.parametrize("radius", [0.3, 3.0, 8.0])
def test_a_vector_that_is_cut_ends_at_the_radius(radius, lowest):
    x = nn.Parameter(torch.full((6,), 4.0, dtype=torch.float64))
    curvatures = torch.logspace(-1, 1, 6, dtype=torch.float64)
    curvatures[0] = lowest
    optimizer = ArmijoNewtonCG([x])
    optimizer._direction._radius, optimizer._direction._first = radius, 1e40  # So that it solves closely.
    before = x.detach().clone()
    optimizer.step(AutogradObjective(lambda: (curvatures * x.square()).sum() / 2, [x]))
    assert optimizer._direction._is_cut
    assert optimizer.outcome.step_size == 1.0
    assert float((x.detach() - before).norm()) == pytest.approx(radius, rel=1e-12)
    assert optimizer._direction._radius == pytest.approx(2 * radius)
