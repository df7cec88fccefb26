"""The surface that all problems share: the same names, arguments and kinds; points on devices without values."""

import inspect
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nclightning.problems import KnownProblem, NoAnswer, Problem, balanced_ce, label_smoothing
from nclightning.theory import UFMProblem
from tests.cases import ALL, COLLAPSED, LOW_RANK, name_of
from tests.helpers import fakes_a_gpu, random_point
from tests.problems.cases import CASES

SURFACE = sorted(name for name in vars(KnownProblem) if not name.startswith("_"))
FIELDS = {"num_classes", "feature_dim", "lambda_w", "lambda_h"}


def shape_of(signature):
    return [(each.name, each.kind, each.default) for each in signature.parameters.values()]


@pytest.mark.parametrize("kind", [Problem, UFMProblem])
@pytest.mark.parametrize("name", SURFACE)
def test_both_problems_have_the_same_surface(kind, name):
    stated, own = getattr(KnownProblem, name), inspect.getattr_static(kind, name, None)
    if inspect.isfunction(stated):
        assert shape_of(inspect.signature(own)) == shape_of(inspect.signature(stated))
    else:
        assert not inspect.isfunction(own)
        assert own is not None or name in FIELDS
    # A dataclass or a constructor sets what the class itself does not have.
    assert hasattr(
        UFMProblem("mse", 3, 2, 4, 0.01, 0.01) if kind is UFMProblem else balanced_ce(3, 2, 4, 0.1, 0.1), name
    )


def test_the_surface_is_all_there():
    assert len(SURFACE) == 29


def moments_of(problem, point):
    means = torch.zeros(problem.num_groups, problem.feature_dim, dtype=torch.float64)
    means = means.index_add_(0, point.labels, point.features) / torch.bincount(
        point.labels, minlength=problem.num_groups
    ).clamp(min=1).unsqueeze(1)
    spread = (point.features - means[point.labels]).square().sum()
    logits = point.features @ point.weight.T
    return means, spread, logits if point.bias is None else logits + point.bias


@pytest.mark.parametrize("problem", ALL[::3], ids=name_of)
def test_general_is_the_same_problem(problem, generator):
    general, point = problem.general, random_point(problem, generator)
    assert problem.general is general
    assert torch.equal(problem.labels(), general.labels())
    for name in ("num_classes", "num_groups", "num_samples", "feature_dim", "lambda_w", "lambda_h", "has_bias"):
        assert getattr(problem, name) == getattr(general, name)
    assert problem.dimension == general.dimension
    for name in ("optimal_value", "optimum_norm", "threshold", "smoothness", "best_step"):
        assert getattr(problem, name) == pytest.approx(getattr(general, name), rel=1e-12)
    for name in ("gap", "distance", "optimality_gap"):
        other = getattr(general, name if name != "optimality_gap" else "gap")
        assert float(getattr(problem, name)(*point)) == pytest.approx(float(other(*point)), rel=1e-12)


@pytest.mark.parametrize("problem", COLLAPSED[::5], ids=name_of)
def test_a_copy_has_the_arguments_alone(problem):
    assert problem.general.num_samples == problem.num_samples
    copy = pickle.loads(pickle.dumps(problem))
    assert copy == problem
    assert hash(copy) == hash(problem)
    assert vars(copy).keys() == {field for field in vars(copy) if field in UFMProblem.__dataclass_fields__}


def test_a_million_classes_are_arithmetic():
    problem = UFMProblem("ce", 10**6, 10, 10**6, 1e-9, 1e-9)
    assert problem.mu > 0
    weight = torch.ones(10**6, 1, dtype=torch.float64)
    narrow = UFMProblem("mse", 10**6, 1, 1, 1e-9, 1e-9)
    # Nothing of a million by a million.
    assert float(narrow.distance_from_moments(weight, weight, weight.new_zeros(()), weight[:, 0] * 1e-6)) > 0


@pytest.mark.parametrize("problem", LOW_RANK, ids=name_of)
def test_what_needs_all_samples_says_so(problem):
    logits, labels = torch.zeros(2, problem.num_classes), torch.zeros(2, dtype=torch.int64)
    for each in (problem, problem.general):
        with pytest.raises(NoAnswer, match=r"feature_dim must be at least .* for a gap from moments, got"):
            each.divergence(logits, labels)


def test_a_bias_under_cross_entropy_counts_from_a_constant(generator):
    problem = UFMProblem("ce", 4, 3, 5, 0.01, 0.02)
    optimum = problem.random_optimum(generator)
    means, spread, _ = moments_of(problem, optimum)
    free = balanced_ce(4, 3, 5, 0.01, 0.02, "free")
    bias = torch.tensor([1.0, 3.0, 2.0, 2.0], dtype=torch.float64)
    for each in (problem, free):
        distance = each.distance_from_moments(optimum.weight, means, spread, bias)
        assert float(distance) == pytest.approx(2**0.5, rel=1e-14)
        gap = each.gap_from_moments(optimum.weight, means, spread, spread, bias)
        assert float(gap) == float(each.gap_from_moments(optimum.weight, means, spread, spread))


FAKE = ["balanced ce", "unbalanced ce", "absent class", "multi-label bce, free bias", "penalized bias, unbalanced"]


@pytest.mark.skipif(not fakes_a_gpu(), reason="this torch looks for a real GPU")
@pytest.mark.parametrize("name", [*FAKE, "balanced mse, few features", "mse without bias, few features", "zero, ce"])
def test_points_on_a_device_stay_there(name, generator):
    """Fake CUDA tensors raise on a transfer to the host and on a mix of devices."""
    problem = CASES[name]()
    point = problem.random_optimum(generator)
    before = float(problem.gap(*point))
    with FakeTensorMode(allow_non_fake_inputs=True):
        on = [None if t is None else torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in point]
        means = torch.empty(problem.num_groups, problem.feature_dim, device="cuda", dtype=torch.float64)
        spread = means.new_empty(())
        answers = [
            problem.gap(*on, check_labels=False),
            problem.distance(*on, check_labels=False),
            problem.distance_from_moments(on[0], means, spread, on[3]),
        ]
        if not problem.orbit(torch.device("cpu")).is_cut:
            logits = torch.empty(7, problem.num_classes, device="cuda")
            divergence = problem.divergence(logits, torch.zeros(7, dtype=torch.int64, device="cuda"))
            answers += [divergence, problem.gap_from_moments(on[0], means, spread, divergence.mean(), on[3])]
        assert {answer.device.type for answer in answers} == {"cuda"}
    assert float(problem.gap(*point)) == before


@pytest.mark.parametrize(
    "make",
    [lambda: UFMProblem("ce", 4, 3, 5, 0.01, 0.02), lambda: label_smoothing([3] * 4, 0.1, 5, 0.01, 0.02)],
    ids=["paper", "smoothed"],
)
def test_exchangeable_classes_are_compared_by_numbers(make):
    """No tensor is moved, so that not even the first reading on a device waits."""
    problem = make()
    assert problem.orbit(torch.device("meta")) is problem.orbit(torch.device("cpu"))
