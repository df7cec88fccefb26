"""Which samples a sweep sees, and in which order."""

import random

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from nclightning.probe.sweep import limited_batches, num_own_samples, sequential_loader

N = 20
DATA = TensorDataset(torch.arange(N))
CHOSEN = [17, 3, 5, 11, 2, 7, 13]


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
    with pytest.raises(ValueError, match="a list without a map-style dataset cannot be divided between 2 processes"):
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


class Drawn(DistributedSampler):
    """As many draws as it likes, with a weight for each sample."""

    def __init__(self, num_samples, **options):
        super().__init__(DATA, **options)
        self.num_samples = num_samples

    def __iter__(self):
        return iter(torch.multinomial(torch.ones(N), self.num_samples, replacement=True).tolist())


def test_draws_of_a_distributed_sampler_are_no_duplicates():
    assert num_own_samples(DataLoader(DATA, sampler=Drawn(30, num_replicas=2, rank=1))) is None


class Rewrapped(DistributedSampler):
    """As catalyst's ``DistributedSamplerWrapper``: places in another sampler."""

    def __init__(self, sampler, **options):
        super().__init__(range(len(sampler)), **options)
        self.sampler = sampler

    def __iter__(self):
        own = list(self.sampler)
        return (own[i] for i in super().__iter__())


@pytest.mark.parametrize("wrapper", [DistributedSamplerWrapper, Rewrapped])
@pytest.mark.parametrize(
    ("sampler", "limit", "expected"),
    [
        (WeightedRandomSampler([0.0, *[1.0] * (N - 1)], N), None, range(1, N)),
        (WeightedRandomSampler([0.0, *[1.0] * (N - 1)], N), 1, range(1, N)),
        (RandomSampler(DATA, num_samples=4), None, range(N)),
        (SequentialSampler(DATA), 2, range(16)),
        (CHOSEN, None, sorted(CHOSEN)),
        (CHOSEN, 1, sorted(CHOSEN)),
    ],
)
def test_samplers_inside_of_distributed_ones(wrapper, sampler, limit, expected):
    seen = []
    for rank in range(2):
        data = DataLoader(DATA, 4, sampler=wrapper(sampler, num_replicas=2, rank=rank, shuffle=False))
        seen += [int(i) for (batch,) in sequential_loader(data, rank, 2, limit) for i in batch]
    assert sorted(seen) == list(expected)


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


def seen(loader, **options):
    return [int(i) for (batch,) in sequential_loader(loader, **options) for i in torch.atleast_1d(batch)]


class Own(Sampler):
    """Yields its indices in a new order each time, from a generator of its own, and counts its passes."""

    def __init__(self, indices, generator=None):
        self.indices, self.generator, self.passes = indices, generator, 0

    def __len__(self):
        return len(self.indices)

    def __iter__(self):
        self.passes += 1
        return iter([self.indices[i] for i in torch.randperm(len(self.indices), generator=self.generator)])


class OwnBatches(Sampler):
    """Batches of several sizes, as by length, some samples twice."""

    def __init__(self, indices):
        self.batches = [indices[:2], indices[2:5], indices[4:]]

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        random.shuffle(self.batches)
        return iter(self.batches)


class Endless(Sampler):
    def __iter__(self):
        while True:
            yield random.choice(CHOSEN)


SUBSETS = {
    "subset sampler": {"sampler": SubsetRandomSampler(CHOSEN), "batch_size": 3},
    "batch sampler of a subset sampler": {"batch_sampler": BatchSampler(SubsetRandomSampler(CHOSEN), 3, False)},
    "batch sampler that drops": {"batch_sampler": BatchSampler(SubsetRandomSampler(CHOSEN), 3, True)},
    "list": {"sampler": CHOSEN, "batch_size": 3},
    "array": {"sampler": np.array(CHOSEN), "batch_size": 3},
    "tensor": {"sampler": torch.tensor(CHOSEN), "batch_size": 3},
    "batch sampler of a list": {"batch_sampler": BatchSampler(CHOSEN, 3, False)},
    "own sampler": {"sampler": Own(CHOSEN), "batch_size": 3},
    "own sampler with a generator": {"sampler": Own(CHOSEN, torch.Generator()), "batch_size": 3},
    "own sampler that repeats": {"sampler": Own(CHOSEN * 3), "batch_size": 3},
    "batch sampler of an own one": {"batch_sampler": BatchSampler(Own(CHOSEN), 3, False)},
    "own batch sampler": {"batch_sampler": OwnBatches(CHOSEN)},
    "list of batches": {"batch_sampler": [CHOSEN[:4], CHOSEN[4:]]},
    "weights, some of them 0": {
        "sampler": WeightedRandomSampler([float(i in CHOSEN) * (i + 1) for i in range(N)], 40), "batch_size": 3
    },
    "Lightning's wrapper": {"sampler": DistributedSamplerWrapper(Own(CHOSEN), num_replicas=1, rank=0), "batch_size": 3},
    "unbatched": {"sampler": SubsetRandomSampler(CHOSEN), "batch_size": None},
    "unbatched own": {"sampler": Own(CHOSEN), "batch_size": None},
    "unbatched batches": {"sampler": BatchSampler(SubsetRandomSampler(CHOSEN), 3, False), "batch_size": None},
    "sequential over a part": {"sampler": SequentialSampler(range(7)), "batch_size": 3},
    "random over a part": {"sampler": RandomSampler(range(7)), "batch_size": 3},
}  # fmt: skip


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("options", SUBSETS.values(), ids=SUBSETS)
def test_a_subset_stays_a_subset(options, world_size):
    """Each sample once over all ranks, and nothing is moved on by it."""
    loader = DataLoader(DATA, **options)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    sampler = options.get("sampler")
    own = sampler.generator.get_state() if getattr(sampler, "generator", None) is not None else None
    got = [i for rank in range(world_size) for i in seen(loader, rank=rank, world_size=world_size)]
    assert sorted(got) == (
        list(range(7)) if isinstance(getattr(sampler, "data_source", None), range) else sorted(CHOSEN)
    )
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert getattr(sampler, "passes", 0) == 0
    if own is not None:
        assert torch.equal(sampler.generator.get_state(), own)


WHOLE = {
    "shuffled": {"shuffle": True, "batch_size": 3, "drop_last": True},
    "random, with replacement": {"sampler": RandomSampler(DATA, replacement=True, num_samples=4), "batch_size": 3},
    "random, a few of them": {"sampler": RandomSampler(DATA, num_samples=4), "batch_size": 3},
    "weights": {"sampler": WeightedRandomSampler([1.0 + i for i in range(N)], 5), "batch_size": 3},
    "distributed": {"sampler": DistributedSampler(DATA, 2, 1), "batch_size": 3},
    "batch sampler of a distributed one": {"batch_sampler": BatchSampler(DistributedSampler(DATA, 2, 1), 3, False)},
}


@pytest.mark.parametrize("limit", [None, 1])
@pytest.mark.parametrize("options", WHOLE.values(), ids=WHOLE)
def test_samplers_that_come_to_the_whole_data_set_show_it_in_order(options, limit):
    """Whatever the number of batches to which an epoch is held: the next one has others."""
    assert seen(DataLoader(DATA, **options), limit=limit) == list(range(N))


def test_subsets_of_subsets():
    data = Subset(Subset(DATA, range(5, 20)), [0, 2, 4])
    assert seen(DataLoader(data, batch_size=2, shuffle=True)) == [5, 7, 9]


LIMITED = {
    "sequential": ({"batch_size": 3}, range(6)),
    "sequential batch sampler": ({"batch_sampler": BatchSampler(SequentialSampler(DATA), 3, False)}, range(6)),
    "list": ({"sampler": CHOSEN, "batch_size": 3}, sorted(CHOSEN[:6])),
    "list of batches": ({"batch_sampler": [[1], [2, 3], [4]]}, [1, 2, 3]),
    "unbatched": ({"batch_size": None}, range(2)),
    # The first 6 places of each of two processes.
    "distributed": ({"sampler": DistributedSampler(DATA, 2, 1, shuffle=False), "batch_size": 3}, range(12)),
}


@pytest.mark.parametrize(("options", "expected"), LIMITED.values(), ids=LIMITED)
def test_a_fixed_order_is_followed_up_to_the_limit(options, expected):
    assert seen(DataLoader(DATA, **options), limit=2) == list(expected)


def test_an_endless_sampler_ends_at_the_limit():
    got = seen(DataLoader(DATA, sampler=Endless(), batch_size=3), limit=40)
    assert got == sorted(CHOSEN)


def test_the_same_samples_in_each_sweep():
    class Some(Own):
        """Draws a part of its indices anew in each epoch."""

        def __iter__(self):
            return iter([self.indices[i] for i in torch.randperm(len(self.indices))[:3]])

    loader = DataLoader(DATA, sampler=Some(CHOSEN), batch_size=3)
    assert seen(loader) == seen(loader)


def test_a_sampler_that_cannot_be_copied_is_refused():
    loader = DataLoader(DATA, sampler=(i for i in CHOSEN), batch_size=3)
    with pytest.raises(ValueError, match=r"a pass over DataLoader would advance its generator.* source='online'"):
        sequential_loader(loader)
    assert len(list(loader)) == 3


def test_samples_with_names_keep_their_order():
    class Named:
        def __len__(self):
            return 3

        def __getitem__(self, key):
            return (torch.tensor({"a": 1, "b": 2, "c": 3}[key]),)

    assert seen(DataLoader(Named(), sampler=["c", "a", "c"], batch_size=2)) == [3, 1]


def test_a_sampler_that_holds_its_data_set_does_not_copy_it():
    class Uncopied(TensorDataset):
        def __deepcopy__(self, memo):
            raise AssertionError

    data = Uncopied(torch.arange(N))
    sampler = Own(CHOSEN)
    sampler.data = data
    assert sorted(seen(DataLoader(data, sampler=sampler, batch_size=2))) == sorted(CHOSEN)


# Loaders without indices.


class Stream(IterableDataset):
    """Without an end."""

    def __iter__(self):
        i = 0
        while True:
            yield (torch.tensor(i),)
            i += 1


class Batches:
    """No DataLoader."""

    def __iter__(self):
        return iter(DataLoader(Stream(), batch_size=2))


class Sized(Batches):
    def __len__(self):
        return 3


class OneShot(IterableDataset):
    """Is its own iterator."""

    def __init__(self):
        self.i = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.i += 1
        return (torch.tensor(self.i - 1),)


@pytest.mark.parametrize(
    ("loader", "limit", "expected"),
    [
        (lambda: DataLoader(Stream(), batch_size=2), 3, range(6)),
        (lambda: DataLoader(Stream(), batch_size=None), 3, range(3)),
        (Batches, 3, range(6)),
        (Sized, None, range(6)),
        (Sized, 2, range(4)),
        (lambda: [(torch.arange(2),), (torch.arange(2, 4),)], 1, range(2)),
        (lambda: DataLoader(OneShot(), batch_size=2), 3, range(6)),
    ],
)
def test_streams_end_where_training_ends(loader, limit, expected):
    assert seen(loader(), limit=limit) == list(expected)


def test_an_iterator_is_not_moved_on():
    data = OneShot()
    assert seen(DataLoader(data, batch_size=2), limit=2) == [0, 1, 2, 3]
    assert data.i == 0
    with pytest.raises(ValueError, match="a pass over generator would advance its generator"):
        sequential_loader(((i,) for i in range(3)), limit=2)


@pytest.mark.parametrize(
    ("loader", "limit", "read", "expected"),
    [
        (DataLoader(DATA, batch_size=4), 1.0, 3, None),
        (DataLoader(DATA, batch_size=4), 5, 3, None),
        (DataLoader(DATA, batch_size=4), 9, 3, None),
        (DataLoader(DATA, batch_size=4), 2, 3, 2),
        (DataLoader(DATA, batch_size=4), 0.5, 3, 2),
        (DataLoader(Stream()), 1.0, 3, 3),
        (DataLoader(Stream()), 7, 3, 7),
        (Batches(), 1.0, 3, 3),
        (DataLoader(DATA, sampler=Endless()), 1.0, 3, 3),
        (Sized(), 1.0, 9, None),
    ],
)
def test_limits(loader, limit, read, expected):
    assert limited_batches(loader, limit, read) == expected


def test_duplicates_of_a_batch_sampler_are_told():
    sampler = DistributedSampler(DATA, 3, 2)
    loader = DataLoader(DATA, batch_sampler=BatchSampler(sampler, 4, False))
    assert num_own_samples(loader) == 6
