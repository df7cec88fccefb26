"""The two problems of the paper, against the theory that is written for them."""

import pytest
import torch

from nclightning.problems import balanced_ce, balanced_mse
from tests.cases import ALL, SPECTRUM, name_of
from tests.helpers import perturb, random_point


def of(problem):
    make = balanced_mse if problem.loss == "mse" else balanced_ce
    sizes = problem.num_classes, problem.samples_per_class, problem.feature_dim
    return make(*sizes, problem.lambda_w, problem.lambda_h)


def close(one, other, relative=1e-13, absolute=0.0):
    torch.testing.assert_close(
        torch.as_tensor(one, dtype=torch.float64),
        torch.as_tensor(other, dtype=torch.float64),
        rtol=relative,
        atol=absolute,
    )


@pytest.mark.parametrize("old", [*ALL, *SPECTRUM[::7]], ids=name_of)
def test_agrees_with_the_closed_forms(old, generator):
    new = of(old)
    assert new.dimension == old.dimension
    assert new.optimum.method == "closed form"
    close(new.optimal_value, old.optimal_value)
    close(new.threshold, old.threshold)
    smoothness = old.smoothness
    flat = [sorted(e.value for e in p.spectrum() for _ in range(e.multiplicity)) for p in (new, old)]
    close(*flat, absolute=1e-12 * smoothness)
    assert [v == 0 for v in flat[0]] == [v == 0 for v in flat[1]]
    close(new.mu, old.mu, absolute=1e-13 * smoothness)
    close(new.rates.best_step, old.best_step)
    close(new.rates.contraction(1 / smoothness), old.contraction(1 / smoothness))
    if old.mu > 0:
        close(new.rates.error_bound_constant, old.error_bound_constant, 1e-13 * smoothness / old.mu)
        decade = old.iterations_per_decade(1 / smoothness)
        close(new.rates.iterations_per_decade(1 / smoothness), decade, 1e-12 * smoothness / old.mu)

    point = random_point(old, generator)
    close(new.gap(*point), old.optimality_gap(*point))
    close(new.distance(*point), old.distance(*point))
    close(new.nearest_optimum(*point).weight, old.nearest_optimum(*point).weight, absolute=1e-13)
    near = perturb(old.random_optimum(generator), generator, 1e-6)
    close(new.gap(*near), old.optimality_gap(*near), 1e-7)
    close(new.distance(*near), old.distance(*near), 1e-7)


@pytest.mark.parametrize("old", [p for p in ALL if p.rank == p.num_classes - 1 or not p.collapses], ids=name_of)
def test_agrees_from_moments(old, generator):
    new, point = of(old), random_point(old, generator)
    logits = point.features @ point.weight.T
    logits = logits if point.bias is None else logits + point.bias
    close(new.divergence(logits, point.labels), old.divergence(logits, point.labels), absolute=1e-12)
    K, n = old.num_classes, old.samples_per_class
    means = torch.zeros(K, old.feature_dim, dtype=torch.float64).index_add_(0, point.labels, point.features) / n
    spread = (point.features - means[point.labels]).square().sum()
    divergence = new.divergence(logits, point.labels).mean()
    by_moments = new.gap_from_moments(point.weight, means, spread, divergence, point.bias)
    close(by_moments, old.gap_from_moments(point.weight, means, spread, divergence))
    close(by_moments, new.gap(*point))
    by_moments = new.distance_from_moments(point.weight, means, spread, point.bias)
    close(by_moments, old.distance_from_moments(point.weight, means, spread, point.bias))


def test_a_bias_that_cross_entropy_does_not_see():
    """With a free bias the optimal set has a direction more, and the theory counts only what differs from a shift."""
    free = balanced_ce(4, 3, 5, 0.01, 0.02, "free")
    assert free.dimension == balanced_ce(4, 3, 5, 0.01, 0.02).dimension + 1
    optimum = free.random_optimum()
    shifted = optimum._replace(bias=optimum.bias + 3.0)
    assert float(free.distance(*shifted)) < 1e-14
    assert float(free.gap(*shifted)) < 1e-28
