"""What an error, autocast or a changed head leaves of a metric."""

import copy
import math

import pytest
import torch

from nclightning.functional import class_statistics
from nclightning.metrics import NearestClassCentre, NeuralCollapse, Optimality
from nclightning.theory import UFMProblem
from tests.helpers import linear_head

K, D = 3, 4
# Two processes with the same states, as torchmetrics sees them.
TWO = {"dist_sync_fn": lambda state, group=None: [state, state], "distributed_available_fn": lambda: True}


@pytest.fixture
def batch(generator):
    labels = torch.arange(12) % K
    return torch.eye(K, D)[labels] + 0.1 * torch.randn(12, D, generator=generator), labels


@pytest.fixture
def head(generator):
    return linear_head(K, D, generator)


def metrics(batch, head, **kwargs):
    return {
        "collapse": NeuralCollapse(K, D, head, **kwargs),
        "optimality": Optimality(UFMProblem("ce", K, 4, D, 1e-3, 1e-3), head, **kwargs),
        "decisions": NearestClassCentre(class_statistics(*batch, K), head, **kwargs),
    }


def values(metric):
    return {name: float(value) for name, value in metric.compute().items()}


def read(how, metric):
    if how == "gathered" and isinstance(metric, NeuralCollapse):
        return metric.gathered()
    return metric.compute()


@pytest.mark.parametrize("how", ["compute", "gathered"])
@pytest.mark.parametrize("name", ["collapse", "optimality", "decisions"])
def test_an_error_on_several_processes_gives_back_the_own_states(how, name, batch, head):
    metric = metrics(batch, head, **TWO)[name]
    features, labels = batch
    metric.update(features[:4], labels[:4])
    metric.num_invalid += 1
    with pytest.raises(ValueError, match="labels were outside"):
        read(how, metric)
    metric.num_invalid -= 1
    metric.update(features[4:], labels[4:])
    metric._to_sync = False
    alone = metrics(batch, head)[name]
    alone.update(*batch)
    assert values(metric) == pytest.approx(values(alone), rel=1e-12, nan_ok=True)


def test_who_synchronised_by_hand_stays_so_after_an_error(batch, head):
    metric = NeuralCollapse(K, D, head, **TWO)
    metric.update(*batch)
    metric.sync(dist_sync_fn=TWO["dist_sync_fn"])
    with pytest.raises(Exception, match="already been synced"):
        metric.compute()
    assert metric._is_synced
    metric.unsync()
    metric.update(*batch)


@pytest.mark.parametrize("name", ["collapse", "decisions"])
def test_forward_does_not_add_a_batch_that_it_cannot_read(name, batch, head):
    metric = metrics(batch, head)[name]
    metric.update(*batch)
    before = values(metric)
    with pytest.raises(ValueError, match="labels were outside"):
        metric(batch[0], batch[1] + K)
    assert values(metric) == pytest.approx(before, rel=1e-12)
    assert metric._to_sync
    assert metric._should_unsync
    metric(*batch)
    assert metric._update_count == 2


@pytest.mark.parametrize("name", ["collapse", "optimality", "decisions"])
def test_a_state_dict_loads_into_a_metric_made_alike(name, batch, head):
    metric, other = (metrics(batch, head)[name] for _ in range(2))
    for each in (metric, other):
        each.persistent(True)
    metric.update(*batch)
    saved = metric.state_dict()
    assert saved
    other.load_state_dict(copy.deepcopy(saved))
    other._update_count = 1
    assert values(other) == values(metric)
    other.load_state_dict({**saved, "_apart_0123abcd": []})  # Of an earlier version.


def test_a_head_that_changed_is_read_anew(batch, head):
    metric = NeuralCollapse(K, D, head)
    metric.update(*batch)
    metric.compute()
    with torch.no_grad():
        head.weight.mul_(torch.tensor([[1.0], [2.0], [3.0]]))
    other = NeuralCollapse(K, D, head)
    other.update(*batch)
    assert values(metric) == values(other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_changes_no_value(dtype, batch, head):
    read = []
    for enabled in (False, True):
        metric = NeuralCollapse(K, D, head, measures=("all",), dtype=dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            metric.update(*batch)
            read.append(values(metric))
            read[-1] |= {name: value.tolist() for name, value in metric.per_class().items()}
    assert read[0] == read[1]


@pytest.mark.parametrize("labels", [[], [7]])
def test_without_samples_all_that_reads_features_is_nan(labels, head):
    """Not one of them raises, after no update, an empty one or one of nothing but ignored samples."""
    metric = NeuralCollapse(K, D, head, measures=("all",), ignore_index=7)
    metric.update(torch.zeros(len(labels), D), torch.tensor(labels, dtype=torch.int64))
    finite = {name for name, value in values(metric).items() if not math.isnan(value)}
    assert finite == {
        "nc0", "nc2", "nc2_centred", "nc2_equinorm_head", "nc2_equiangularity_head"
    }  # fmt: skip
