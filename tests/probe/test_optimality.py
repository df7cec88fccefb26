"""The collector of gap and distance, as a pass over the data feeds it."""

import pytest
import torch

from nclightning.functional import class_statistics
from nclightning.heads import read_head
from nclightning.metrics import Optimality
from nclightning.metrics.reference import Reference
from nclightning.probe.optimality import OptimalityCollector
from nclightning.theory import UFMProblem
from tests.helpers import linear_head

K, N, D = 4, 1500, 6
PENALTIES = 1e-3, 1e-4


@pytest.fixture
def head(generator):
    return linear_head(K, D, generator)


@pytest.fixture
def samples(generator):
    """More than a collector keeps."""
    labels = (torch.arange(K * N) % K)[torch.randperm(K * N, generator=generator)]
    return torch.randn(K * N, D, generator=generator), labels


def batches(samples, size=64):
    return zip(*(each.split(size) for each in samples), strict=True)


def floats(values):
    return {name: float(value) for name, value in values.items()}


@pytest.mark.parametrize("loss", ["mse", "ce"])
@pytest.mark.parametrize("penalties", [None, PENALTIES], ids=["fitted", "given"])
@pytest.mark.parametrize("own", [True, False])
def test_equals_the_metric(loss, penalties, own, head, samples):
    collector = OptimalityCollector(Reference(loss, *penalties or ()), read_head(head), own_statistics=own)
    metric = Optimality(UFMProblem(loss, K, N, D, *penalties) if penalties else loss, head)
    for each in batches(samples):
        collector.update(*each)
        metric.update(*each)
    values = floats(collector.read(None if own else class_statistics(*samples, K)).values)
    assert values == pytest.approx(floats(metric.compute()), rel=1e-13)


def test_a_loader_may_fill_the_same_memory_again(head, samples):
    collectors = [OptimalityCollector(Reference("ce", *PENALTIES), read_head(head)) for _ in range(2)]
    features, labels = torch.empty(64, D), torch.empty(64, dtype=torch.int64)
    for h, y in batches(samples):
        collectors[0].update(h, y, copy=False)
        features[: len(h)], labels[: len(h)] = h, y
        collectors[1].update(features[: len(h)], labels[: len(h)])
    assert floats(collectors[0].read().values) == floats(collectors[1].read().values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_values_are_those_of_the_features_in_their_dtype(dtype, head, samples):
    features, values = samples[0].to(dtype), []
    for given in (features, features.double()):
        collector = OptimalityCollector(Reference("ce", *PENALTIES), read_head(head))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for each in batches((given, samples[1])):
                collector.update(*each)
            values.append(floats(collector.read().values))
    assert values[0] == pytest.approx(values[1], rel=1e-13)


def test_keeps_the_features_of_no_graph(head, samples):
    collector = OptimalityCollector(Reference("ce", *PENALTIES), read_head(head))
    collector.update(samples[0] * torch.ones(D, requires_grad=True), samples[1])
    assert not any(value.requires_grad for value in collector.read().values.values())


def test_says_what_is_wrong(head, samples):
    with pytest.raises(ValueError, match="head must have a bias, since the problem has one"):
        OptimalityCollector(Reference(UFMProblem("mse", K, N, D, *PENALTIES)), read_head(head.weight))
    for labels, message in (
        (samples[1].clamp(max=2), "every class must occur exactly 1500 times, got between 0 and 3000"),
        (samples[1] + 1, r"1500 labels were outside 0\.\.3"),
    ):
        collector = OptimalityCollector(Reference(UFMProblem("ce", K, N, D, *PENALTIES)), read_head(head))
        collector.update(samples[0], labels)
        with pytest.raises(ValueError, match=message):
            collector.read()
    collector = OptimalityCollector(Reference("ce", *PENALTIES), read_head(head), own_statistics=False)
    collector.update(samples[0], torch.cat([samples[1][1:], samples[1][:1] + 1]))
    stats = class_statistics(*samples, K)
    with pytest.raises(AssertionError, match="of different samples"):
        collector.read(stats)
