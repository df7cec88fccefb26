"""Every measure against loops over the printed formula, over shapes, conventions and dtypes."""

import math

import pytest
import torch

from nclightning.functional import class_statistics
from nclightning.metrics.measures import MEASURES, MeasureInput, select_measures
from tests.functional import oracle

# (K, d, n): two classes, d = K - 1, d > K, K > d + 1, many classes, a wide layer.
SHAPES = [(2, 1, 9), (3, 2, 5), (4, 7, 10), (10, 4, 6), (30, 8, 4), (5, 40, 20), (200, 3, 2)]
ALL = sorted(MEASURES.keys() - {"nc_distance"})  # The distance has tests of its own.


def sample(K, d, n, generator, noise=0.3, norms=1.0, offset=0.0, absent=()):
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    means = draw(K, d) * torch.logspace(0, math.log10(norms), K, dtype=torch.float64)[:, None]
    labels = torch.cat([torch.arange(K), torch.randint(K, ((n - 1) * K,), generator=generator)])
    labels = labels[~torch.isin(labels, torch.tensor(absent, dtype=torch.int64))]
    labels = labels[torch.randperm(len(labels), generator=generator)]
    return means[labels] + noise * draw(len(labels), d) + offset, labels, draw(K, d), draw(K)


def read(name, features, labels, weight, bias, **conventions):
    stats = class_statistics(features, labels, len(weight))
    return float(MEASURES[name].read(MeasureInput(stats, weight.to(stats.means), bias, **conventions)))


def test_every_measure_has_an_oracle():
    assert set(ALL) == oracle.MEASURES.keys() | oracle.MEASURES_OF_THE_HEAD.keys()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_agrees_with_the_printed_formula(name, shape, generator):
    data = sample(*shape, generator)
    expected = (oracle.MEASURES | oracle.MEASURES_OF_THE_HEAD)[name](oracle.Oracle(*data))
    # The oracle squares condition numbers and subtracts: that is what the slack is for.
    assert read(name, *data) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", sorted(oracle.MEASURES.keys() - {"nc2_equinorm_head"}))
def test_absent_classes_are_left_out(name, generator):
    data = sample(6, 8, 12, generator, absent=(0, 4))
    expected = oracle.MEASURES[name](oracle.Oracle(*data))
    assert read(name, *data) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("weights", ["uniform", "count"])
@pytest.mark.parametrize("mean", ["class", "sample"])
@pytest.mark.parametrize("name", ["nc1", "nc1_ratio"])
def test_conventions_on_unbalanced_data(name, mean, weights, generator):
    counts = torch.tensor([400, 200, 100, 50, 10])
    labels = torch.arange(5).repeat_interleave(counts)
    features = torch.randn(5, 20, generator=generator)[labels] + torch.randn(760, 20, generator=generator)
    weight = torch.randn(5, 20, generator=generator)
    value = read(name, features, labels, weight, None, global_mean=mean, between_weights=weights)
    reference = oracle.Oracle(features, labels, weight)
    expected = (reference.nc1 if name == "nc1" else reference.ratio)(mean, weights)
    assert value == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ALL)
def test_half_and_single_precision_features(name, dtype, generator):
    """The values of the rounded features, in full: rounding is the input's, not ours."""
    features, labels, weight, bias = sample(4, 7, 10, generator)
    value = read(name, features.to(dtype), labels, weight, bias)
    assert value == pytest.approx(read(name, features.to(dtype).double(), labels, weight, bias), rel=1e-12)
    exact = read(name, features, labels, weight, bias)
    assert value == pytest.approx(exact, rel=100 * torch.finfo(dtype).eps, abs=10 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite_give_nan_not_an_error(name, value, generator):
    features, labels, weight, bias = sample(4, 7, 10, generator)
    features[3, 2] = value
    if name in oracle.MEASURES_OF_THE_HEAD or name in ("nc0", "nc2_equinorm_head"):
        assert math.isfinite(read(name, features, labels, weight, bias))
    else:
        assert math.isnan(read(name, features, labels, weight, bias))


@pytest.mark.parametrize("name", ALL)
def test_one_class_gives_nan(name, generator):
    features, labels, weight, bias = sample(4, 7, 10, generator)
    value = read(name, features, torch.zeros_like(labels), weight, bias)
    of_head = name in oracle.MEASURES_OF_THE_HEAD or name in ("nc0", "nc2_equinorm_head")
    defined = of_head or name.startswith("mse") or name == "bias_collapse"
    assert math.isfinite(value) == defined


COLLAPSED = {
    name: 0.0
    for name in ALL
    if name not in ("gnc2_energy", "nc3_cosine", "nc3_cosine_worst", "mse_nc2_nc3", "mse_perpendicular")
} | {"nc1_rank": 3.0, "nc3_cosine": 1.0, "nc3_cosine_worst": 1.0}


@pytest.mark.parametrize("name", sorted(COLLAPSED))
def test_exact_collapse(name, generator):
    K, d = 4, 6
    basis = torch.linalg.qr(torch.randn(d, K, dtype=torch.float64, generator=generator)).Q
    frame = (torch.eye(K, dtype=torch.float64) - 1 / K) @ basis.T
    labels = torch.arange(12) % K
    value = read(name, (5 * frame)[labels], labels, 2 * frame, torch.zeros(K, dtype=torch.float64))
    assert value == pytest.approx(COLLAPSED[name], abs=1e-14)


@pytest.mark.parametrize("name", ALL)
def test_invariances(name, generator):
    """Order of samples, relabelling, and rotation of features and head together."""
    features, labels, weight, bias = sample(5, 7, 10, generator)
    expected = pytest.approx(read(name, features, labels, weight, bias), rel=1e-10, abs=1e-13)
    Q = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64, generator=generator)).Q
    order = torch.randperm(len(labels), generator=generator)
    classes = torch.randperm(5, generator=generator)
    back = torch.argsort(classes)
    assert read(name, features[order], labels[order], weight, bias) == expected
    assert read(name, features, classes[labels], weight[back], bias[back]) == expected
    assert read(name, features @ Q, labels, weight @ Q, bias) == expected


@pytest.mark.parametrize("name", [n for n in ALL if n != "bias_collapse" and not n.startswith("mse")])
def test_scale_and_shift_of_the_features_do_not_matter(name, generator):
    features, labels, weight, bias = sample(5, 7, 10, generator)
    expected = pytest.approx(read(name, features, labels, weight, bias), rel=1e-8, abs=1e-12)
    assert read(name, 1e-6 * features, labels, weight, bias) == expected
    assert read(name, features + 1e3, labels, weight, bias) == expected


def test_names_are_checked():
    assert select_measures(("all",)) == tuple(MEASURES)
    for names in (("nc9",), (), ("nc1", "nc1")):
        with pytest.raises(ValueError, match="measures must be different names out of nc0"):
            select_measures(names)
    with pytest.raises(ValueError, match=r"write \('nc1',\)"):
        select_measures("nc1")
