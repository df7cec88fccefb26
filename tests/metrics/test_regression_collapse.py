"""The RegressionCollapse metric: against the functions, over splits and ranks, and off the host."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchmetrics import MetricCollection

from nclightning.functional import (
    gram_deviation,
    principal_residual,
    row_space_residual,
    sample_statistics,
    target_rank,
)
from nclightning.metrics import RegressionCollapse
from nclightning.metrics.borrowed import Borrowed

N, D, K = 40, 6, 2
# Two processes with the same states, as torchmetrics sees them.
TWO = {"dist_sync_fn": lambda state, group=None: [state, state], "distributed_available_fn": lambda: True}


@pytest.fixture
def head():
    torch.manual_seed(0)
    return nn.Linear(D, K)


@pytest.fixture
def data(generator):
    targets = torch.randn(N, K, generator=generator) * torch.tensor([3.0, 1.0])
    return targets @ torch.randn(K, D, generator=generator) + 0.1 * torch.randn(N, D, generator=generator) + 5, targets


def expected(features, targets, head):
    of_features, of_targets, weight = sample_statistics(features), sample_statistics(targets), head.weight
    deviation, gamma = gram_deviation(of_targets, weight, centred=head.bias is not None)
    rank = target_rank(of_targets)
    values = {"nrc1": principal_residual(of_features, rank), "nrc2": row_space_residual(of_features, weight)}
    return as_floats(values | {"nrc3": deviation, "gamma": gamma, "rank": rank})


def as_floats(values):
    return {name: float(value) for name, value in values.items()}


def same(values):
    """Values up to round-off of sums in another order, of features with an offset."""
    return pytest.approx(values, rel=1e-11, nan_ok=True)


def updated(head, *batches, **kwargs):
    metric = RegressionCollapse(head, **kwargs)
    for batch in batches:
        metric.update(*batch)
    return metric


def split(data, *sizes):
    return list(zip(*(each.split(list(sizes)) for each in data), strict=True))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("sizes", [(N,), (1, 19, 20), (N, 0)], ids=str)
def test_streams_to_the_same_values(sizes, bias, data):
    head = nn.Linear(D, K, bias=bias)
    metric = updated(head, *split(data, *sizes))
    assert as_floats(metric.compute()) == same(expected(*data, head))
    metric.reset()
    metric.update(*data)
    assert as_floats(metric.compute()) == same(expected(*data, head))


def test_many_samples_are_folded(head, generator):
    """More than are kept: the totals are moved to the mean of all."""
    features = torch.randn(30_000, D, generator=generator).cumsum(0) / 100
    targets = features[:, :K] ** 2
    metric = RegressionCollapse(head)
    for i, batch in enumerate(split((features, targets), 10_000, 20_000)):
        metric.update(*batch)
        if i == 0:
            metric.prepare_sync()
    assert as_floats(metric.compute()) == same(expected(features, targets, head))


def test_forward_gives_the_batch_and_keeps_the_total(head, data):
    metric = RegressionCollapse(head)
    for half in split(data, 15, 25):
        assert as_floats(metric(*half)) == same(expected(*half, head))
    assert as_floats(metric.compute()) == same(expected(*data, head))


def test_ranks_merge_exactly(head, data):
    """What torchmetrics does on several processes: states stacked, then compute. One process has no samples."""
    ranks = [updated(head, *batches) for batches in (split(data, 30, 10)[:1], split(data, 30, 10)[1:], [])]
    for metric in ranks:
        metric.prepare_sync()
    gathered = RegressionCollapse(head)
    for name in gathered.metric_state:
        if not name.endswith("kept") and not name.startswith("_apart"):
            setattr(gathered, name, torch.stack([getattr(each, name) for each in ranks]))
    gathered._update_count = 1
    assert as_floats(gathered.compute()) == same(expected(*data, head))


def test_synchronised_states_are_given_back(head, data):
    first, second = split(data, 30, 10)
    metric = updated(head, first, **TWO)
    assert as_floats(metric.compute()) == same(expected(*(torch.cat([each, each]) for each in first), head))
    metric.update(*second)
    metric._to_sync = False
    assert as_floats(metric.compute()) == same(expected(*data, head))


def test_merge_state(head, data):
    first, second = (updated(head, batch) for batch in split(data, 33, 7))
    first.merge_state(second)
    assert as_floats(first.compute()) == same(expected(*data, head))


def test_follows_the_head(head, data):
    metric = updated(head, data)
    metric.compute()
    with torch.no_grad():
        head.weight.mul_(torch.tensor([[1.0], [3.0]]))
    assert as_floats(metric.compute()) == same(expected(*data, head))
    assert list(metric.parameters()) == []


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.clone()],
    ids=["deepcopy", "pickle", "clone"],
)
def test_copies(duplicate, head, data):
    metric = updated(head, data)
    assert as_floats(duplicate(metric).compute()) == as_floats(metric.compute())


def test_a_state_dict_loads_into_a_metric_made_alike(head, data):
    metric, other = updated(head, data), RegressionCollapse(head)
    for each in (metric, other):
        each.persistent(True)
    metric.prepare_sync()
    other.load_state_dict(metric.state_dict())
    other._update_count = 1
    assert as_floats(other.compute()) == as_floats(metric.compute())


def test_in_a_collection_beside_one_of_another_head(head, data):
    collection = MetricCollection(
        {"a": RegressionCollapse(head), "b": RegressionCollapse(nn.Linear(D, K))}, prefix="x_"
    )
    collection.update(*data)
    assert "x_nrc1" in collection.compute() or "x_a_nrc1" in collection.compute()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_dtype_and_trainer_precision(dtype, head, data):
    features, targets = (each.to(dtype) for each in data)
    metric = RegressionCollapse(head).half()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        metric.update(features, targets)
    values = metric.compute()
    assert {value.dtype for value in values.values()} == {torch.float64}
    assert as_floats(values) == same(expected(features.double(), targets.double(), head))


@pytest.mark.parametrize("targets", [torch.arange(N), torch.arange(N).unsqueeze(1) / 7], ids=["integers", "a column"])
def test_one_target(targets, data):
    head = nn.Linear(D, 1)
    values = as_floats(updated(head, (data[0], targets)).compute())
    assert values == same(expected(data[0], targets.double().reshape(-1, 1), head))
    assert values["rank"] == 1
    assert 0 < values["nrc1"] < 1


def test_targets_of_another_scale(head, data):
    """The scale of the targets changes gamma alone."""
    values, larger = (as_floats(updated(head, (data[0], scale * data[1])).compute()) for scale in (1, 2**14))
    assert larger.pop("gamma") == same(2**28 * values.pop("gamma"))
    assert larger == same(values)


def test_targets_that_are_not_finite_leave_what_does_not_read_them(head, data):
    data[1][3, 1] = torch.nan
    values = as_floats(updated(head, data).compute())
    assert values["nrc2"] == same(expected(*data, head)["nrc2"])
    assert sorted(name for name, value in values.items() if value != value) == ["gamma", "nrc1", "nrc3", "rank"]  # noqa: PLR0124


REFUSED = {
    "class numbers": (torch.zeros(N, D), torch.zeros(N, dtype=torch.int64), r"got \(40,\): pass .*NeuralCollapse if"),
    "other columns": (torch.zeros(N, D), torch.zeros(N, 3), r"targets must have shape \(N, 2\).*got \(40, 3\)"),
    "booleans": (torch.zeros(N, D), torch.zeros(N, K) > 0, "targets must be real numbers, got torch.bool"),
    "other samples": (torch.zeros(N, D), torch.zeros(3, K), "the same number of rows, got 40 and 3"),
    "other features": (torch.zeros(N, 5), torch.zeros(N, K), r"features must have shape \(N, 6\)"),
    "integer features": (torch.zeros(N, D, dtype=torch.int64), torch.zeros(N, K), "features must be floating"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_and_adds_nothing(name, head, data):
    features, targets, message = REFUSED[name]
    metric = updated(head, data)
    with pytest.raises(ValueError, match=message):
        metric.update(features, targets)
    assert as_floats(metric.compute()) == same(expected(*data, head))


def test_set_dtype(head, data):
    metric = updated(head, data).set_dtype(torch.float32)
    metric.update(*data)
    assert metric.features_num_invalid.dtype == torch.int64
    # Statistics in float32, with features whose offset is ten times their spread.
    assert float(metric.compute()["nrc2"]) == pytest.approx(expected(*data, head)["nrc2"], rel=1e-3)


def test_update_and_read_make_no_host_transfer(head):
    metric = RegressionCollapse(head)
    with FakeTensorMode():
        fake = lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda")  # noqa: E731
        metric._head = Borrowed(SimpleNamespace(weight=fake(head.weight), bias=fake(head.bias)))
        for name, state in metric.metric_state.items():
            if isinstance(state, torch.Tensor):
                setattr(metric, name, fake(state))
        for _ in range(2):
            metric.update(torch.empty(8, D, device="cuda"), torch.empty(8, K, device="cuda"))
        values = metric.read(metric.features, metric.targets)
        metric.prepare_sync()
        assert {value.device.type for value in values.values()} == {"cuda"}


def test_plots(head, data):
    figure, _ = updated(head, data).plot()
    figure.clear()
