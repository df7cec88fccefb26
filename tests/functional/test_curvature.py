"""Measured curvature, against torch.func.hessian, matrices of known spectrum and the closed form of the UFM."""

import copy

import pytest
import torch
from torch import nn

from nclightning.functional import dense_hessian, dense_spectrum, extreme_eigenvalues, hessian_vector_product
from nclightning.theory import UFMProblem
from tests.cases import COLLAPSED, LOW_RANK, ZERO, name_of
from tests.helpers import Once, objective_of

EPS = torch.finfo(torch.float64).eps


def quadratic(eigenvalues, generator, dtype=torch.float64):
    """Half of x^T A x with A of a given spectrum, in random coordinates."""
    values = torch.as_tensor(eigenvalues, dtype=torch.float64)
    Q = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=generator)).Q
    A = (Q * values @ Q.T).to(dtype)
    x = torch.randn(len(values), dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    return lambda: x @ A @ x / 2, [x], A


def network(dtype=torch.float64):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 3)).to(dtype)
    x, y = torch.randn(12, 3).to(dtype), torch.arange(12) % 3
    return net, lambda: nn.functional.cross_entropy(net(x), y)


def ufm(problem, generator):
    """Objective and parameters at a random optimum."""
    optimum, objective = problem.random_optimum(generator), objective_of(problem)
    params = [t.requires_grad_() for t in (optimum.weight, optimum.features, optimum.bias) if t is not None]
    return lambda: objective(params[0], params[1], optimum.labels, *params[2:]), params


def test_products_and_dense_hessian_are_those_of_torch_func(generator):
    net, _ = network()
    net.eval()
    params = list(net.parameters())
    names = [name for name, _ in net.named_parameters()]
    x = torch.randn(12, 3, dtype=torch.float64, generator=generator)
    y = torch.arange(12) % 3

    def value():
        return nn.functional.cross_entropy(net(x), y)

    def of(tensors):
        return nn.functional.cross_entropy(
            torch.func.functional_call(net, dict(zip(names, tensors, strict=True)), x), y
        )

    blocks = torch.func.hessian(of)(tuple(p.detach() for p in params))
    expected = torch.cat(
        [
            torch.cat([block.reshape(p.numel(), q.numel()) for block, q in zip(row, params, strict=True)], dim=1)
            for row, p in zip(blocks, params, strict=True)
        ]
    )
    # Sums of a dozen products of numbers of order 1.
    torch.testing.assert_close(dense_hessian(value, params), expected, rtol=0, atol=1e-14)
    vector = torch.randn(len(expected), dtype=torch.float64, generator=generator)
    torch.testing.assert_close(hessian_vector_product(value, params)(vector), expected @ vector, rtol=0, atol=1e-13)
    spectrum = torch.linalg.eigvalsh(expected)
    torch.testing.assert_close(dense_spectrum(value, params), spectrum, rtol=0, atol=1e-13)
    ends = extreme_eigenvalues(value, params, count=2)
    assert ends.converged
    torch.testing.assert_close(ends.largest, spectrum.flip(0)[:2], rtol=0, atol=float(1e-8 * spectrum[-1]))
    assert abs(float(ends.smallest[0] - spectrum[0])) <= 1e-8 * float(spectrum[-1])


@pytest.mark.parametrize("problem", [p for p in COLLAPSED + LOW_RANK + ZERO if p.num_samples <= 40], ids=name_of)
def test_spectrum_of_the_ufm_is_the_closed_form(problem, generator):
    value, params = ufm(problem, generator)
    predicted = torch.tensor([e.value for e in problem.spectrum() for _ in range(e.multiplicity)], dtype=torch.float64)
    # Roundings of L, as of any symmetric eigenproblem; a few tens were seen.
    noise = 300 * EPS * problem.smoothness
    torch.testing.assert_close(dense_spectrum(value, params), predicted, rtol=0, atol=noise)
    flat = problem.dimension > 0 or problem.mu == 0
    ends = extreme_eigenvalues(value, params, count=2)
    assert ends.converged
    assert float(ends.largest[0]) == pytest.approx(problem.smoothness, rel=1e-10)
    assert abs(float(ends.smallest[0]) - (0.0 if flat else problem.mu)) <= noise
    if flat and problem.mu > 0:  # Across the flat directions: the least curvature, whatever their number.
        assert abs(float(ends.smallest[1]) - problem.mu) <= noise


@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_ends_at_the_paper_sizes_need_as_many_products_as_distinct_eigenvalues(loss, generator):
    problem = UFMProblem(loss, 10, 10, 20, 5e-3, 5e-4)
    ends = extreme_eigenvalues(*ufm(problem, generator), count=2)
    distinct = len({float(f"{e.value:.10e}") for e in problem.spectrum()})
    assert ends.products <= distinct + 4  # Of 2210 or 2200 eigenvalues; a few more, since round-off hides the end.
    assert float(ends.smallest[1]) == pytest.approx(problem.mu, rel=1e-9)
    assert float(ends.largest[0]) == pytest.approx(problem.smoothness, rel=1e-12)


@pytest.mark.parametrize(
    ("eigenvalues", "smallest", "largest"),
    [
        ([3.0], [3.0], [3.0]),
        ([0.0] * 5, [0.0], [0.0]),
        ([2.0] * 6, [2.0], [2.0]),
        ([-1.0, 4.0], [-1.0, 4.0], [4.0, -1.0]),
        ([-5.0] * 3 + [0.0] * 4 + [2.0] * 9, [-5.0, 0.0], [2.0, 0.0]),
        ([1.0] * 10 + [1.0 + 1e-12] * 10 + [7.0] * 5, [1.0, 7.0], [7.0, 1.0]),
        ([1e-3, 1.0, 1.0 + 1e-5, 1.0 + 2e-5, 50.0], [1e-3, 1.0], [50.0, 1.0 + 2e-5]),
        (list(range(1, 200)), [1.0, 2.0], [199.0, 198.0]),
    ],
)
def test_known_spectra(eigenvalues, smallest, largest, generator):
    value, params, _ = quadratic(eigenvalues, generator)
    ends = extreme_eigenvalues(value, params, count=2)
    assert ends.converged
    scale = max(abs(x) for x in eigenvalues)
    # The square of the tolerated residual over the distance to the next eigenvalue, or the width of a cluster.
    assert ends.smallest.tolist() == pytest.approx(smallest, rel=1e-9, abs=1e-11 * scale)
    assert ends.largest.tolist() == pytest.approx(largest, rel=1e-9, abs=1e-11 * scale)
    assert ends.products <= len(eigenvalues)


def test_unconverged_is_said(generator):
    value, params, A = quadratic(torch.logspace(-6, 0, 300).tolist(), generator)
    short = extreme_eigenvalues(value, params, max_products=5)
    assert (short.products, short.converged) == (5, False)
    assert short.residual > 1e-8
    # Ritz values are bounds from inside, and each has an eigenvalue within the residual.
    assert float(short.smallest[0]) >= 1e-6
    assert float(short.largest[0]) <= 1 + 10 * EPS
    for found in (short.smallest, short.largest):
        assert float((torch.linalg.eigvalsh(A) - found).abs().min()) <= short.residual
    assert extreme_eigenvalues(value, params, max_products=300).converged


def test_single_precision_converges_to_its_round_off(generator):
    value, params, _ = quadratic([0.5] + [1.0] * 20 + [3.0], generator, torch.float32)
    ends = extreme_eigenvalues(value, params)
    assert ends.converged
    assert ends.largest.dtype == torch.float32
    assert float(ends.largest[0]) == pytest.approx(3.0, rel=1e-5)
    assert float(ends.smallest[0]) == pytest.approx(0.5, rel=1e-5)
    half = [p.detach().to(torch.bfloat16).requires_grad_() for p in params]
    found = extreme_eigenvalues(lambda: (half[0] * half[0]).sum().float(), half)
    assert found.largest.dtype == torch.float32
    assert found.largest.tolist() == pytest.approx([2.0], rel=2**-7)  # Vectors pass through bfloat16: 8 bits.


def test_linear_and_partly_used_parameters_have_no_curvature():
    x, unused = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    ends = extreme_eigenvalues(x.sum, [x, unused], count=3)
    assert (ends.smallest.tolist(), ends.largest.tolist(), ends.residual) == ([0.0], [0.0], 0.0)
    hessian = dense_hessian(lambda: x.square().sum() + unused.sum(), [x, unused])
    torch.testing.assert_close(hessian, torch.diag(torch.tensor([2.0, 2, 2, 0, 0])), rtol=0, atol=0)


@pytest.mark.parametrize("measure", [extreme_eigenvalues, dense_spectrum, dense_hessian])
def test_measuring_leaves_no_trace(measure):
    net, value = network()
    net.train()
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    net[0].bias.requires_grad_(False)
    before = copy.deepcopy([(p.detach(), p.grad, p.requires_grad) for p in net.parameters()])
    state = torch.get_rng_state()
    with torch.no_grad():
        first = measure(value, [p for p in net.parameters() if p.requires_grad])
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training
    for p, (data, grad, requires) in zip(net.parameters(), before, strict=True):
        assert torch.equal(p, data)
        assert torch.equal(p.grad, grad)
        assert p.requires_grad == requires
        assert p.grad_fn is None
    # The dropout mask is drawn once per measurement, from the state it found: one function, measured twice.
    second = measure(value, [p for p in net.parameters() if p.requires_grad])
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_parameters_made_in_inference_are_no_obstacle_to_measuring_inside_it():
    net, value = network()
    net.eval()
    expected = dense_spectrum(value, net.parameters())
    with torch.inference_mode():
        torch.testing.assert_close(dense_spectrum(value, net.parameters()), expected, rtol=0, atol=0)


X = torch.ones(2, requires_grad=True)


def with_backward():
    scalar = X.square().sum()
    scalar.backward()
    return scalar


@pytest.mark.parametrize(
    ("value", "params", "message"),
    [
        (X.sum, [], "params must be tensors that require a gradient, got 0"),
        (X.sum, [torch.ones(2)], "got 1 of which 1 do not.*Pass"),
        (lambda: X, [X], r"value must return a tensor of one element.*got \(2,\)"),
        (lambda: 3.0, [X], "got float"),
        (lambda: X.detach().sum(), [X], "without a graph"),
        (with_backward, [X], "value must not call backward"),
        (lambda: (X - 1).abs().sqrt().sum(), [X], "the Hessian is not finite"),
    ],
)
@pytest.mark.parametrize("measure", [extreme_eigenvalues, dense_spectrum])
def test_what_has_no_hessian_is_refused(measure, value, params, message):
    with pytest.raises(ValueError, match=message):
        measure(value, params)
    X.grad = None


def test_bad_options_are_refused():
    for options in ({"count": 0}, {"max_products": 0}, {"tolerance": 0.0}, {"tolerance": float("nan")}):
        with pytest.raises(ValueError, match="count and max_products must be at least 1 and tolerance positive"):
            extreme_eigenvalues(lambda: X.square().sum(), [X], **options)
    with pytest.raises(ValueError, match=r"vector must have shape \(2,\), got \(3,\)"):
        hessian_vector_product(lambda: X.square().sum(), [X])(torch.ones(3))
    many = torch.ones(10_001, requires_grad=True)
    with pytest.raises(ValueError, match="at most 10000 numbers for a dense Hessian, got 10001: use extreme"):
        dense_hessian(lambda: many.square().sum(), [many])


def test_the_largest_end_alone(generator):
    value, params, _ = quadratic([0.0, 0.0, 1e-6, *torch.linspace(1, 4, 30).tolist(), 7.0], generator)
    both, alone = extreme_eigenvalues(value, params), extreme_eigenvalues(value, params, ends="largest")
    assert alone.largest.item() == pytest.approx(7, rel=1e-12)
    assert not len(alone.smallest)
    assert alone.converged
    assert alone.products < both.products


@pytest.mark.parametrize("ends", ["both", "largest"])
def test_scales_of_parameters(ends):
    net, value = network()
    net.eval()
    params = list(net.parameters())
    torch.manual_seed(1)
    scales = [torch.rand_like(params[0]) + 0.1, 0.5, *(torch.rand_like(p) for p in params[2:])]
    diagonal = torch.cat(
        [torch.as_tensor(s).double().expand_as(p).flatten() for s, p in zip(scales, params, strict=True)]
    )
    expected = torch.linalg.eigvalsh(diagonal[:, None] * dense_hessian(value, params) * diagonal)
    found = extreme_eigenvalues(value, params, ends=ends, scales=scales)
    assert found.largest.item() == pytest.approx(float(expected[-1]), rel=1e-9)
    if ends == "both":
        assert found.smallest.item() == pytest.approx(float(expected[0]), rel=1e-8)


def test_options_of_ends_and_scales_are_checked(generator):
    value, params, _ = quadratic([1.0, 2.0], generator)
    with pytest.raises(ValueError, match="ends must be"):
        extreme_eigenvalues(value, params, ends="smallest")
    with pytest.raises(ValueError, match="one entry for each of the 1 params, got 2"):
        extreme_eigenvalues(value, params, scales=[1.0, 2.0])


def test_functions_that_can_be_differentiated_once_are_refused(generator):
    x = torch.randn(3, generator=generator).requires_grad_()
    with pytest.raises(ValueError, match="no second derivative"):
        extreme_eigenvalues(lambda: Once.apply(x * x).square().sum(), [x])
