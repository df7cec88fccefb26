"""Metrics in a collection: one never stands for another that is updated differently."""

import pytest
import torch
from torch import nn
from torchmetrics import MetricCollection

from nclightning.functional import class_statistics
from nclightning.metrics import NearestClassCentre, NeuralCollapse, Optimality
from nclightning.theory import UFMProblem

K, D = 3, 4


@pytest.fixture
def batches(generator):
    """One on which many metrics agree, and one on which they do not."""
    labels = torch.arange(12) % K
    first = 10 * torch.eye(K, D)[labels] + torch.randn(12, D, generator=generator)
    return [(first, labels), (torch.randn(12, D, generator=generator), labels.roll(1))]


def heads():
    """Two that decide alike on the first batch."""
    first, second = nn.Linear(D, K), nn.Linear(D, K)
    with torch.no_grad():
        for head in (first, second):
            head.weight.copy_(torch.eye(K, D))
            head.bias.zero_()
        second.weight[0, 3] = 3e-6
    return first, second


def cases(batches):
    stats, head = class_statistics(*batches[0], K), heads()
    other = class_statistics(batches[0][0] * torch.tensor([1.0, 1.0, 1.3, 1.3]), batches[0][1], K)
    return {
        "ignored label": lambda: (NeuralCollapse(K, D), NeuralCollapse(K, D, ignore_index=5)),
        "dtype": lambda: (NeuralCollapse(K, D), NeuralCollapse(K, D, dtype=torch.float32)),
        "reference": lambda: (NearestClassCentre(stats), NearestClassCentre(other)),
        "ignored label of decisions": lambda: (NearestClassCentre(stats), NearestClassCentre(stats, ignore_index=5)),
        "head": lambda: tuple(Optimality(UFMProblem("ce", K, 8, D, 1e-2, 1e-2), each) for each in head),
    }


@pytest.mark.parametrize("case", ["ignored label", "dtype", "reference", "ignored label of decisions", "head"])
def test_different_parameters_are_never_merged(case, batches):
    metrics = cases(batches)[case]()
    collection = MetricCollection({"a": metrics[0], "b": metrics[1]})
    alone = cases(batches)[case]()
    for each in batches:
        collection.update(*each)
        for metric in alone:
            metric.update(*each)
    assert len(collection.compute_groups) == 2
    for name, metric in zip("ab", alone, strict=True):
        member = collection[name]
        for key, value in metric.compute().items():
            assert float(member.compute()[key]) == float(value)


def test_equal_updates_still_share_their_states(batches):
    collection = MetricCollection(
        {"a": NeuralCollapse(K, D, torch.eye(K, D)), "b": NeuralCollapse(K, D, measures=("nc1_vci",))}
    )
    collection.update(*batches[0])
    assert len(collection.compute_groups) == 1
    collection.update(*batches[1])
    alone = NeuralCollapse(K, D, measures=("nc1_vci",))
    for each in batches:
        alone.update(*each)
    assert float(collection.compute()["nc1_vci"]) == float(alone.compute()["nc1_vci"])


def test_states_without_content_leave_no_trace(batches):
    metric = NearestClassCentre(class_statistics(*batches[0], K))
    other = NearestClassCentre(metric.reference)  # As on another process, whose names are its own.
    for each, batch in zip((metric, other), batches, strict=True):
        each(*batch)
    metric.merge_state(other)
    assert float(metric.samples.sum()) == 24
    assert metric.state_dict() == {}
    metric.reset()
    assert float(metric.samples.sum()) == 0
