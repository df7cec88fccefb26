"""Losses against autograd, the defaults that a user's loss has, and their conjugates."""

import mpmath
import pytest
import torch
from mpmath import mp, mpf

from nclightning.problems import BinaryCrossEntropy, CrossEntropy, Loss, Problem, SquaredError
from nclightning.problems.row_hessians import RowHessians
from tests.problems.cases import ByValue, one_against_rest
from tests.problems.multiprecision import LOSSES

K = 4
OFFSET, WEIGHTS = [0.5, -1.0, 0.0, 2.0], [0.2, 1.0, 3.0, 0.7]
KINDS = {
    "squared error": SquaredError(),
    "cross-entropy": CrossEntropy(),
    "cross-entropy, offset and weights": CrossEntropy(OFFSET, WEIGHTS),
    "binary cross-entropy": BinaryCrossEntropy(),
    "squared hinge": one_against_rest([1, 1], 1, 1.0, 1.0).loss,
}


@pytest.fixture(params=KINDS)
def loss(request):
    return KINDS[request.param]


def draw(loss, generator, scale=1.0, rows=50):
    z, a = (scale * torch.randn(rows, K, dtype=torch.float64, generator=generator) for _ in range(2))
    y = torch.rand(rows, K, dtype=torch.float64, generator=generator).pow(3)
    if isinstance(loss, CrossEntropy):
        y = y / y.sum(dim=1, keepdim=True)
        y[::2] = torch.eye(K, dtype=torch.float64)[torch.arange(len(y[::2])) % K]
    return z, a, y if "Hinge" not in type(loss).__name__ else y.round() * 2 - 1


def close(one, other, relative, absolute=1e-14):
    torch.testing.assert_close(one, other, rtol=relative, atol=absolute)


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_derivatives_are_those_of_the_value(loss, scale, generator):
    z, a, y = draw(loss, generator, scale)
    plain = ByValue(loss)
    close(loss.residual(z, y), plain.residual(z, y), 1e-12)
    close(loss.curvature(z, y, a), plain.curvature(z, y, a), 1e-11, 1e-13)
    hessian = loss.hessian(z, y)
    close((hessian @ a.unsqueeze(2)).squeeze(2), loss.curvature(z, y, a), 1e-12, 1e-13)
    shares = torch.rand(len(z), dtype=torch.float64, generator=generator)
    close(loss.mean_hessian(z, y, shares), torch.einsum("b,bkl->kl", shares, hessian), 1e-11, 1e-12)
    assert float(torch.linalg.eigvalsh(hessian).min()) > -1e-14 * scale


@pytest.mark.parametrize("scale", [0.0, 1.0, 10.0, 1000.0])
@pytest.mark.parametrize("name", [name for name in KINDS if name.startswith("cross")])
def test_peaks_and_flanks_are_the_hessian(name, scale, generator):
    loss = KINDS[name]
    z, a, y = draw(loss, generator, scale)
    row_factors = torch.rand(len(z), 1, dtype=torch.float64, generator=generator)
    hessians = RowHessians(loss, z, y, row_factors)
    heights, axes, flanks = hessians.peaks()
    peak = heights.unsqueeze(2) * axes.unsqueeze(2) * axes.unsqueeze(1)
    identity = torch.eye(K, dtype=torch.float64)
    flank = flanks.masses.unsqueeze(2) * (
        torch.diag_embed(flanks.others) - flanks.others.unsqueeze(2) * flanks.others.unsqueeze(1)
    )
    close(peak + flank, row_factors.unsqueeze(2) * loss.hessian(z, y), 1e-12, 1e-15)
    shares = torch.rand(len(z), dtype=torch.float64, generator=generator)
    for part, hessian in ((hessians, peak + flank), (flanks, flank)):
        close(part.square(a), torch.einsum("bk,bkl,bl->b", a, hessian, a), 1e-12, 1e-13)
        close(part.along(identity), hessian.diagonal(dim1=1, dim2=2), 1e-12, 1e-15)
        close(part.summed(shares), torch.einsum("b,bkl->kl", shares, hessian), 1e-12, 1e-15)


def test_other_losses_have_no_peaks(generator):
    for name in ("squared error", "binary cross-entropy"):
        z, _, y = draw(KINDS[name], generator)
        assert RowHessians(KINDS[name], z, y, torch.ones(len(z), 1)).peaks() is None


@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
def test_divergence_far_away(loss, scale, generator):
    z, a, y = draw(loss, generator, scale)
    plain = loss.value(z, y) - loss.value(a, y) - (loss.residual(a, y) * (z - a)).sum(dim=1)
    size = loss.value(z, y).abs() + loss.value(a, y).abs() + 1
    assert float(((loss.divergence(z, a, y) - plain).abs() / size).max()) < 1e-13
    default = ByValue(loss).divergence(z, a, y)
    far = plain > 1e-3 * size
    close(default[far], loss.divergence(z, a, y)[far], 1e-10)


@pytest.mark.parametrize("size", [1e-2, 1e-5, 1e-10, 1e-100])
def test_divergence_close_by_in_many_digits(loss, size, generator):
    z, a, y = draw(loss, generator, rows=6)
    z = a + size * z
    step = z - a
    found, default = loss.divergence(z, a, y), ByValue(loss).divergence(z, a, y)
    evaluate = LOSSES[type(loss).__name__]
    with mp.workdps(250):
        for i in range(len(z)):
            at, ref, target = ([mpf(x) for x in t[i].tolist()] for t in (z, a, y))
            value, (before, slope) = evaluate(at, target, loss)[0], evaluate(ref, target, loss)
            exact = value - before - mpmath.fdot(slope, [p - q for p, q in zip(at, ref, strict=True)])
            if not bool(step[i].any()):
                assert float(found[i]) == float(default[i]) == exact == 0
                continue
            assert abs(found[i].item() / exact - 1) < 1e-12, size
            assert abs(default[i].item() / exact - 1) < 1e-8, size


def test_divergence_of_equal_logits_is_zero(loss, generator):
    z, _, y = draw(loss, generator, 30.0)
    assert not bool(loss.divergence(z, z.clone(), y).any())
    assert not bool(ByValue(loss).divergence(z, z.clone(), y).any())


def test_dual_value_is_that_of_the_tangent(loss, generator):
    """At the gradient u of the loss in z the least of l - <., u> is attained in z."""
    z, a, y = draw(loss, generator)
    u = loss.residual(z, y)
    dual = loss.dual_value(u, y)
    if dual is None:
        return
    close(dual, loss.value(z, y) - (z * u).sum(dim=1), 1e-12)
    assert bool((loss.dual_value(0.3 * u, y) <= loss.value(a, y) - 0.3 * (a * u).sum(dim=1) + 1e-12).all())
    if not isinstance(loss, SquaredError):
        assert bool((loss.dual_value(u + 5, y) == -torch.inf).all())


@pytest.mark.parametrize("name", ["squared error", "cross-entropy", "binary cross-entropy"])
def test_balanced_duals_have_sum_zero_and_stay_inside(name, generator):
    loss = KINDS[name]
    z, _, y = draw(loss, generator, 2.0)
    shares = torch.rand(len(z), dtype=torch.float64, generator=generator)
    u = loss.balance(loss.residual(z, y), y, shares / shares.sum())
    assert float((shares.unsqueeze(1) * u).sum(dim=0).abs().max()) < 1e-13
    assert bool(loss.dual_value(u, y).isfinite().all())
    close(loss.balance(u, y, shares / shares.sum()), u, 0.0, 1e-13)


def test_residual_of_a_sure_prediction_keeps_its_digits():
    """The class itself has the probability 1 - 4e-18, which is 1 in float64."""
    z = torch.tensor([[40.0, 0.0, 0.0]], dtype=torch.float64)
    residual = CrossEntropy().residual(z, torch.eye(3, dtype=torch.float64)[:1])
    close(residual / torch.exp(-z[0, 0]), torch.tensor([[-2.0, 1, 1]], dtype=torch.float64), 1e-12)


def test_a_loss_needs_a_value():
    with pytest.raises(NotImplementedError, match="Loss must define value"):
        _ = Problem(Loss(), torch.eye(2), [1, 1], 2, 0.1, 0.1).optimum


def test_a_loss_known_by_its_value_alone():
    """Optimum, certificate and bound are those of the loss that knows everything."""
    whole = Problem(BinaryCrossEntropy(), torch.eye(3), [6, 3, 1], 4, 0.01, 0.02, "free")
    plain = Problem(ByValue(BinaryCrossEntropy()), torch.eye(3), [6, 3, 1], 4, 0.01, 0.02, "free")
    assert plain.optimal_value == pytest.approx(whole.optimal_value, rel=1e-13)
    assert plain.optimum.duality_gap < 1e-12
    optimum = whole.random_optimum()
    assert float(plain.gap(*optimum)) < 1e-26
    assert plain.certified_lower_bound_from_residuals(torch.zeros(3, 3)) is None
    near = optimum._replace(weight=optimum.weight + 0.01)
    assert 0.9 * whole.optimal_value < plain.certified_lower_bound(*near) < whole.optimal_value
    assert plain.mu == pytest.approx(whole.mu, rel=1e-9)
