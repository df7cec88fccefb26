"""Looking at a model over a data set without a trace."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from nclightning.sweep import frozen, num_own_samples, sequential_loader, untouched


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


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_sample_once_over_all_ranks(world_size):
    data = DataLoader(TensorDataset(torch.arange(10)), batch_size=4, shuffle=True, drop_last=True)
    state = torch.get_rng_state()
    seen = [
        int(i) for rank in range(world_size) for (batch,) in sequential_loader(data, rank, world_size) for i in batch
    ]
    assert sorted(seen) == list(range(10))
    assert torch.equal(torch.get_rng_state(), state)


def test_what_cannot_be_shared_out_is_refused():
    assert sequential_loader([1, 2]) == [1, 2]
    with pytest.raises(ValueError, match="a list without a map-style dataset cannot be shared out over 2 processes"):
        sequential_loader([1, 2], 0, 2)


@pytest.mark.parametrize(("size", "world_size"), [(10, 1), (10, 3), (9, 3), (2, 4)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_the_places_behind_the_own_samples_are_duplicates(size, world_size, shuffle):
    data, kept = TensorDataset(torch.arange(size)), []
    for rank in range(world_size):
        sampler = DistributedSampler(data, world_size, rank, shuffle=shuffle)
        own = num_own_samples(DataLoader(data, sampler=sampler))
        kept += list(sampler)[:own]
    assert sorted(kept) == list(range(size))


def test_other_samplers_make_no_duplicates():
    data = TensorDataset(torch.arange(5))
    assert num_own_samples(DataLoader(data)) is None
    assert num_own_samples([1, 2]) is None
    assert num_own_samples(DataLoader(data, sampler=DistributedSampler(data, 2, 0, drop_last=True))) is None


@pytest.mark.parametrize("data", [TensorDataset(torch.arange(10)), torch.utils.data.ChainDataset([])])
def test_loaders_that_iterate_in_their_own_way_are_refused(data):
    class Halved(DataLoader):
        def __iter__(self):
            for (batch,) in super().__iter__():
                yield (batch / 2,)

    class Named(DataLoader):
        """Plain, whatever it is called."""

    with pytest.raises(ValueError, match=r"Halved is a DataLoader with an __iter__ of its own.* source='online'"):
        sequential_loader(Halved(data, batch_size=2))
    assert sequential_loader(Named(data, batch_size=2)) is not None
