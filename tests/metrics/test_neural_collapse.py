"""The NeuralCollapse metric: against the functions, over splits and ranks, and off the host."""

import copy
import pickle

import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics import MetricCollection

from nclightning.functional import (
    class_distance_normalized_variance,
    class_statistics,
    etf_deviation,
    self_duality,
    within_between_ratio,
    within_class_variability,
)
from nclightning.metrics import MEASURES, NeuralCollapse
from nclightning.metrics.borrowed import Borrowed

K, D = 4, 6


@pytest.fixture
def head():
    torch.manual_seed(0)
    return nn.Linear(D, K)


@pytest.fixture
def data(generator):
    labels = torch.arange(24) % K
    return torch.randn(24, D, generator=generator), labels


def expected(features, labels, head):
    stats, weight = class_statistics(features, labels, K), head.weight.detach().double()
    return {"nc1": within_class_variability(stats), "nc2": etf_deviation(weight), "nc3": self_duality(stats, weight)}


def assert_same(values, reference, rtol=1e-12):
    assert values.keys() == reference.keys()
    for name, value in values.items():
        torch.testing.assert_close(value, reference[name], rtol=rtol, atol=0)


def test_streams_to_the_same_values(head, data):
    metric = NeuralCollapse(K, D, head)
    for h, y in zip(data[0].split([5, 1, 18]), data[1].split([5, 1, 18]), strict=True):
        metric.update(h, y)
    assert_same(metric.compute(), expected(*data, head))
    metric.reset()
    metric.update(*data)
    assert_same(metric.compute(), expected(*data, head))


@pytest.mark.parametrize("copy", [True, False])
def test_samples_that_are_kept_are_copied_unless_told_otherwise(copy, generator):
    features = torch.randn(24, 50, generator=generator)  # So many dimensions that samples are kept, not a scatter.
    metric = NeuralCollapse(K, 50, measures=("nc1",))
    metric.update(features, torch.arange(24) % K, copy=copy)
    (kept,) = [each for each in metric.kept if each.ndim == 2]
    assert (kept.data_ptr() == features.data_ptr()) is not copy


def test_forward_gives_the_batch_and_keeps_the_total(head, data):
    metric = NeuralCollapse(K, D, head)
    halves = [(h, y) for h, y in zip(data[0].split(12), data[1].split(12), strict=True)]
    for half in halves:
        assert_same(metric(*half), expected(*half, head))
    assert_same(metric.compute(), expected(*data, head))


def test_ranks_merge_exactly(head, data):
    """What torchmetrics does on several processes: states stacked, then compute."""
    ranks = [NeuralCollapse(K, D, head) for _ in range(3)]
    for metric, h, y in zip(ranks, data[0].split([20, 1, 3]), data[1].split([20, 1, 3]), strict=True):
        metric.update(h, y)
        metric._fold()
    gathered = NeuralCollapse(K, D, head)
    for name in set(gathered._names) - {"kept"}:
        setattr(gathered, name, torch.stack([getattr(m, name) for m in ranks]))
    gathered._update_count = 1
    assert_same(gathered.compute(), expected(*data, head))


def test_merge_state(head, data):
    first, second = NeuralCollapse(K, D, head), NeuralCollapse(K, D, head)
    first.update(data[0][:10], data[1][:10])
    second.update(data[0][10:], data[1][10:])
    first.merge_state(second)
    assert_same(first.compute(), expected(*data, head))


def test_follows_the_head(head, data):
    metric = NeuralCollapse(K, D, head)
    metric.update(*data)
    metric.compute()
    with torch.no_grad():
        head.weight.mul_(torch.rand(K, 1))
    assert_same(metric.compute(), expected(*data, head))


def test_head_stays_outside_the_metric(head):
    metric = NeuralCollapse(K, D, head)
    assert list(metric.parameters()) == []
    assert metric.state_dict() == {}
    before = head.weight.dtype
    metric.to(torch.float64)
    assert head.weight.dtype == before


def test_without_a_head_there_is_nc1_only(data):
    metric = NeuralCollapse(K, D)
    metric.update(*data)
    assert list(metric.compute()) == ["nc1"]


def test_states_are_float64_whatever_the_trainer_does(head, data):
    metric = NeuralCollapse(K, D, head).float().half().double()
    metric.update(data[0].half(), data[1])
    assert metric.statistics.root.dtype == torch.float64
    assert all(v.dtype == torch.float64 for v in metric.compute().values())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.clone()])
def test_copies(duplicate, head, data):
    metric = NeuralCollapse(K, D, head)
    metric.update(*data)
    assert_same(duplicate(metric).compute(), metric.compute(), rtol=0)


def test_labels_out_of_range_raise_at_compute(head, data):
    metric = NeuralCollapse(K, D, head)
    metric.update(data[0], data[1] + 1)
    with pytest.raises(ValueError, match=r"6 labels were outside 0\.\.3"):
        metric.compute()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, D), "num_classes must be at least 2"),
        ((K, 0), "feature_dim at least 1"),
        ((K, D + 1, nn.Linear(D, K)), "head must have"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        NeuralCollapse(*arguments)


def test_features_of_another_width_are_refused(head):
    with pytest.raises(ValueError, match=r"features must have shape \(N, 6\)"):
        NeuralCollapse(K, D, head).update(torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64))


def test_update_and_read_make_no_host_transfer():
    """Fake CUDA tensors raise on a host sync and on a mix of devices."""
    metric = NeuralCollapse(K, D, torch.ones(K, D), measures=("all",))
    with FakeTensorMode():
        metric._head = Borrowed(torch.empty(K, D, device="cuda"))
        for name in set(metric._names) - {"kept"}:
            state = getattr(metric, name)
            setattr(metric, name, torch.empty(state.shape, dtype=state.dtype, device="cuda"))
        for _ in range(2):
            metric.update(torch.empty(8, D, device="cuda"), torch.zeros(8, dtype=torch.int64, device="cuda"))
        values = metric.read(metric.statistics)
        assert {v.device.type for v in values.values()} == {"cuda"}
        with pytest.raises(DataDependentOutputException):
            torch.equal(values["nc1"], values["nc2"])  # The proof that such a transfer would have been noticed.


def read_all(metric, data):
    metric.update(*data)
    return metric.compute()


def test_all_measures_stream_merge_and_pickle(head, data):
    metric = NeuralCollapse(K, D, head, measures=("all",))
    expected_values = read_all(NeuralCollapse(K, D, head, measures=("all",)), data)
    assert list(expected_values) == list(MEASURES)
    other = pickle.loads(pickle.dumps(metric))
    metric.update(data[0][:7], data[1][:7])
    other.update(data[0][7:], data[1][7:])
    metric.merge_state(other)
    assert_same(metric.compute(), expected_values, rtol=1e-10)


def test_without_scatter_where_no_measure_needs_it(head, data):
    light = NeuralCollapse(K, D, head, measures=("nc1_cdnv", "nc2", "nc3"))
    assert not light.keeps_scatter
    assert "lower" not in light.metric_state
    full = read_all(NeuralCollapse(K, D, head, measures=("nc1", "nc1_cdnv", "nc2", "nc3")), data)
    for half in (slice(0, 5), slice(5, None)):
        light.update(data[0][half], data[1][half])
    for name, value in light.compute().items():
        torch.testing.assert_close(value, full[name], rtol=1e-12, atol=0)


def test_a_wide_layer_gets_the_light_measures_and_a_word():
    with pytest.warns(UserWarning, match=r"feature_dim=20000 would need 3\.0 GiB .* nc1_ratio and nc1_cdnv"):
        metric = NeuralCollapse(2, 20_000)
    assert metric.measures == ("nc1_ratio", "nc1_cdnv")


def test_measures_of_the_head_need_one():
    assert NeuralCollapse(K, D, measures=("all",)).measures == tuple(
        name for name, measure in MEASURES.items() if not measure.needs_head
    )
    with pytest.raises(ValueError, match=r"measures \['nc2'\] need the head"):
        NeuralCollapse(K, D, measures=("nc1", "nc2"))


def test_conventions_are_checked():
    with pytest.raises(ValueError, match="global_mean must be 'class' or 'sample'"):
        NeuralCollapse(K, D, global_mean="mean")


def test_ignore_index(head, data):
    metric = NeuralCollapse(K, D, head, ignore_index=-100)
    features, labels = torch.cat([data[0], 1e6 + data[0]]), torch.cat([data[1], torch.full_like(data[1], -100)])
    metric.update(features, labels)
    assert_same(metric.compute(), expected(*data, head))


def test_in_a_collection(head, data):
    collection = MetricCollection({"a": NeuralCollapse(K, D, head), "b": NeuralCollapse(K, D, measures=("nc1_vci",))})
    collection.update(*data)
    assert {"nc1", "nc2", "nc3", "nc1_vci"} <= collection.compute().keys()


def test_plots_on_a_logarithmic_axis(head, data):
    metric = NeuralCollapse(K, D, head)
    metric.update(*data)
    _, axis = metric.plot()
    assert axis.get_yscale() == "log"
    _, axis = metric.plot([metric.compute(), metric.compute()])
    assert len(axis.lines) == 3
    plt.close("all")


def test_per_class_values(head, data):
    metric = NeuralCollapse(K + 1, D, nn.Linear(D, K + 1))
    metric.update(*data)  # The last class is absent.
    values = metric.per_class()
    stats = class_statistics(*data, K + 1)
    assert set(values) == {
        "count", "variance", "mean_norm", "cdnv", "equiangularity", "head_norm", "nc3_cosine"
    }  # fmt: skip
    for k in range(K):
        rows = data[0][data[1] == k].double()
        assert float(values["variance"][k]) == pytest.approx(float((rows - rows.mean(0)).square().sum(1).mean()))
    assert all(v[K].isnan() for name, v in values.items() if name not in ("count", "head_norm"))
    assert float(values["cdnv"].nanmean()) == pytest.approx(float(class_distance_normalized_variance(stats)))


def test_a_reset_in_inference_mode_does_not_block_later_updates(head, data):
    metric = NeuralCollapse(K, D, head)
    with torch.inference_mode():
        metric.reset()
        metric.update(*data)
    metric.update(*data)
    assert float(metric.statistics.counts.sum()) == 2 * len(data[1])


def test_a_clone_follows_the_head_of_the_original(generator):
    head = nn.Linear(5, 3)
    metric = NeuralCollapse(3, 5, head)
    copy = metric.clone()
    features, labels = torch.randn(30, 5, generator=generator), torch.arange(30) % 3
    with torch.no_grad():
        head.weight.copy_(torch.randn(3, 5, generator=generator))
    for each in (metric, copy):
        each.update(features, labels)
    assert float(copy.compute()["nc3"]) == float(metric.compute()["nc3"])


def test_statistics_taken_earlier_do_not_move(generator):
    metric = NeuralCollapse(3, 20)
    metric.update(torch.randn(30, 20, generator=generator), torch.arange(30) % 3)
    before = metric.statistics
    counts, spread = before.counts.clone(), before.scatter.clone()
    metric.update(5 + torch.randn(30, 20, generator=generator), torch.arange(30) % 3)
    assert torch.equal(before.counts, counts)
    assert torch.equal(before.scatter, spread)


def test_set_dtype_keeps_labels_integers(generator):
    metric, other = NeuralCollapse(3, 20), NeuralCollapse(3, 20)
    features, labels = torch.randn(30, 20, generator=generator), torch.arange(30) % 3
    for each in (metric, other):
        each.update(features, labels)
    metric.set_dtype(torch.float32)
    metric.update(features, labels)
    other.update(features, labels)
    assert metric.num_invalid.dtype == torch.int64
    assert float(metric.compute()["nc1"]) == pytest.approx(float(other.compute()["nc1"]), rel=1e-4)
    metric.reset()
    assert metric.num_invalid.dtype == torch.int64


def test_an_empty_metric_reads_nan_of_alignment():
    metric = NeuralCollapse(3, 5, nn.Linear(5, 3), measures=("nc3_cosine_worst", "nc3_uniform"))
    metric.update(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64))
    assert all(torch.isnan(value) for value in metric.compute().values())


def changed(head):
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(7)))


class Owner(nn.Module):
    """A module that has head and metric, in either order."""

    def __init__(self, metric_first):
        super().__init__()
        head = nn.Linear(D, K)
        parts = {"metric": NeuralCollapse(K, D, head), "head": head}
        for name in sorted(parts, reverse=metric_first):
            setattr(self, name, parts[name])


@pytest.mark.parametrize("duplicate", [lambda c: c.clone(), copy.deepcopy])
def test_copies_of_a_collection_read_the_head_that_is_trained(duplicate, head, data):
    collection = MetricCollection({"nc": NeuralCollapse(K, D, head)})
    twin = duplicate(collection)
    changed(head)
    for each in (collection, twin):
        each.update(*data)
    assert_same(twin.compute(), collection.compute(), rtol=0)
    assert_same(twin.compute(), expected(*data, head))


@pytest.mark.parametrize("metric_first", [True, False])
@pytest.mark.parametrize("times", [1, 2])
def test_a_copy_of_a_module_has_a_metric_of_its_own_head(metric_first, times, data):
    owner = Owner(metric_first)
    twin = owner
    for _ in range(times):
        twin = copy.deepcopy(twin)
    changed(twin.head)
    twin.metric.update(*data)
    assert_same(twin.metric.compute(), expected(*data, twin.head))
    owner.metric.update(*data)
    assert_same(owner.metric.compute(), expected(*data, owner.head))


def test_the_cost_of_an_update_does_not_grow(generator):
    """Counted in calls of torch, not in seconds: late updates of one sample take no more than early ones."""
    metric, calls, counted = NeuralCollapse(3, 16), [], [0]

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            counted[0] += 1
            return function(*args, **(kwargs or {}))

    labels = torch.arange(3).repeat(1000)
    features = torch.randn(3000, 16, generator=generator)
    with Counting():
        for row, label in zip(features.split(1), labels.split(1), strict=True):
            counted[0] = 0
            metric.update(row, label)
            calls.append(counted[0])
    early, late = calls[512:1024], calls[2048:2560]
    # Now and then a few small pieces are put together: twice as many samples may take one step more for it.
    assert sum(late) <= 1.2 * sum(early)
    assert max(late) <= max(early) + 8
    assert len(metric.kept) <= 30


GROUPS = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3]), 4  # Of a head with three rows.


def of_groups(**options):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(8, 5, dtype=torch.float64, generator=generator)
    weight = torch.randn(3, 5, dtype=torch.float64, generator=generator)
    metric = NeuralCollapse(GROUPS[1], 5, weight, groups=True, **options)
    metric.update(features, GROUPS[0])
    return metric, features, weight


def test_groups_of_samples_are_no_rows_of_the_head():
    metric, features, weight = of_groups()
    values = metric.compute()
    assert list(values) == ["nc1_ratio", "nc1_cdnv", "nc2"]
    stats = class_statistics(features, *GROUPS)
    assert values["nc1_ratio"] == within_between_ratio(stats)
    assert values["nc2"] == etf_deviation(weight)
    assert set(metric.per_class()) == {"count", "variance", "mean_norm", "cdnv"}


def test_measures_that_need_classes_are_refused_of_groups_or_left_out():
    with pytest.raises(ValueError, match=r"measures \['nc1', 'nc3'\] need labels that are classes"):
        of_groups(measures=("nc1", "nc2", "nc3"))
    names = of_groups(measures=("all",))[0].compute().keys()
    assert names == {name for name, measure in MEASURES.items() if not measure.needs_classes}


def test_a_head_with_one_row_has_nothing_to_compare():
    values = NeuralCollapse(4, 5, torch.ones(1, 5), groups=True)
    assert values.measures == ("nc1_ratio", "nc1_cdnv")
    with pytest.raises(ValueError, match="compare rows of the head, which has only one"):
        NeuralCollapse(4, 5, torch.ones(1, 5), groups=True, measures=("nc2",))
