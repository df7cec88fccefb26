"""Looking at a model without a trace."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.aggregation import CatMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassPrecision

from nclightning.probe.sweep import compiled_parts, fingerprint, frozen, untouched


def test_frozen_restores_modes_and_random_states():
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model[1].eval()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()

    def look():
        with frozen(model):
            assert not any(m.training for m in model.modules())
            assert not torch.is_grad_enabled()
            torch.rand(3), random.random(), np.random.rand()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        look()
    assert [m.training for m in model.modules()] == [True, True, False]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]


def test_untouched_restores_buffers_that_are_put_in_place_of_others():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

    module = Counter()
    own = module.count
    with untouched(module):
        module.count = module.count + 1
    assert module.count is own
    assert module.count == 0


def test_untouched_restores_modes_and_all_random_states():
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.BatchNorm1d(2))
    module[2].eval()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    with untouched(module):
        module.eval()
        torch.rand(1), random.random(), np.random.rand()
    assert [child.training for child in module.modules()] == [True, True, True, False]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


class Measured(nn.Module):
    """Holds metrics in every way that there is, and updates them in each forward."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.accuracy = MulticlassAccuracy(4)
        self.several = MetricCollection([MulticlassAccuracy(4), MulticlassPrecision(4)])
        self.in_a_list, self.in_a_dict = [MeanMetric()], {"x": {"y": (CatMetric(),)}}
        self.persistent = MeanMetric()
        self.persistent.persistent(True)

    @property
    def metrics(self):
        inner = [self.in_a_list[0], self.in_a_dict["x"]["y"][0], self.persistent]
        return [self.accuracy, *self.several.values(copy_state=False), *inner]

    def forward(self, x):
        z = self.linear(x)
        y = torch.arange(len(x)) % 4
        self.accuracy(z, y)
        self.several.update(z, y)
        for metric in (self.in_a_list[0], self.in_a_dict["x"]["y"][0], self.persistent):
            metric.update(z.detach().sum())
        return z


def state_of(metric):
    states = metric.metric_state.values()
    return [[v.tolist() for v in s] if isinstance(s, list) else s.tolist() for s in states], metric.update_count


@pytest.mark.parametrize("updates", [0, 1, 2])
@pytest.mark.parametrize("inference", [True, False])
def test_metrics_keep_their_states(updates, inference):
    torch.manual_seed(0)
    model = Measured()
    for _ in range(updates):
        model(torch.randn(8, 3))
    computed = [metric.compute() for metric in model.metrics] if updates else []
    before = [state_of(metric) for metric in model.metrics]
    with torch.inference_mode(inference), frozen(model):
        model(torch.randn(8, 3))
        model(torch.randn(8, 3))
        assert [state_of(metric) for metric in model.metrics] != before
    assert [state_of(metric) for metric in model.metrics] == before
    for metric, value in zip(model.metrics, computed, strict=False):
        assert torch.equal(metric.compute(), value)
    # And they go on as if nothing had been.
    other = Measured()
    other.load_state_dict(model.state_dict())
    x = torch.randn(8, 3)
    model(x)
    assert all(metric.update_count == updates + 1 for metric in model.metrics)


def test_what_autograd_needs_of_a_metric_is_not_written_to():
    class Logs(nn.Module):
        """Keeps a value with its graph, as a metric's own forward does."""

        def __init__(self):
            super().__init__()
            self.mean, self.weight = MeanMetric(), nn.Parameter(torch.ones(()))

        def forward(self, x):
            return x * self.weight

    model = Logs()
    value = model.mean(model(torch.tensor(2.0)).square())
    with frozen(model):
        model(torch.tensor(3.0))
    value.backward()
    assert model.weight.grad == 8.0


def test_fingerprint_sees_every_change_of_the_bits():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    tensors = (*model.parameters(), *model.buffers())
    before = fingerprint(tensors)
    assert fingerprint(tensors) == before
    weight = model[0].weight
    for change in (
        lambda: weight.data.copy_(weight.data.flip(0)),  # The same numbers in other places.
        lambda: weight.data.view(-1)[0].mul_(1 + 2**-52),
        lambda: weight.data.mul_(-1),
        lambda: model[1].num_batches_tracked.add_(1),
    ):
        own = fingerprint(tensors)
        change()
        assert fingerprint(tensors) != own


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64, torch.bool, torch.uint8])
def test_fingerprint_of_any_dtype(dtype):
    tensor = torch.zeros(3, 2, dtype=dtype)
    before = fingerprint([tensor, torch.empty(0)])
    tensor[1, 1] = 1
    assert fingerprint([tensor, torch.empty(0)])[0] != before[0]
    assert fingerprint([tensor.t().contiguous().t()]) == fingerprint([tensor])  # Values, not memory.


def test_compiled_parts_are_found_however_they_were_compiled():
    def net():
        return nn.Sequential(nn.Linear(2, 2), nn.ReLU())

    assert compiled_parts(net()) == []
    inner = net()
    inner[0] = torch.compile(inner[0], backend="eager")
    assert inner[0] in compiled_parts(inner)
    own = net()
    own[0].compile(backend="eager")
    assert compiled_parts(own) == [own[0]]
    function = net()
    function.step = torch.compile(function.forward, backend="eager")
    assert compiled_parts(function) == [function]


def test_fingerprint_of_tensors_that_share_memory():
    """As the parameters of a flat buffer do, which do not begin at a multiple of eight bytes."""
    flat = torch.randn(23)
    parts = flat[1:8], flat[8:]
    assert fingerprint(parts) == fingerprint([part.clone() for part in parts])
