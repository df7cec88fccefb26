"""Loaders that accelerate has prepared: each sample once, and nothing of them moved on."""

import copy
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from transformers.trainer_pt_utils import IterableDatasetShard, LengthGroupedSampler

import nclightning
from nclightning.errors import UserError
from nclightning.probe.sweep import known_indices, num_own_samples, sequential_loader
from tests import processes

accelerate = pytest.importorskip("accelerate.data_loader")
SIZES = [(1, 2), (5, 2), (7, 6), (12, 2), (12, 6), (13, 6)]


class Stream(IterableDataset):
    def __init__(self, size):
        self.size = size

    def __iter__(self):
        return iter(range(self.size))


def prepared(data, index, processes, batch_size, **options):
    wanted = {name: options.pop(name) for name in ("shuffle", "drop_last", "sampler") if name in options}
    loader = DataLoader(data, batch_size, generator=torch.Generator().manual_seed(3), **wanted)
    return accelerate.prepare_data_loader(
        loader, num_processes=processes, process_index=index, put_on_device=False, **options
    )


def seen(loaders):
    batches = [batch for rank, each in enumerate(loaders) for batch in sequential_loader(each, rank, len(loaders))]
    return sorted(int(i) for batch in batches for i in (batch[0] if isinstance(batch, list) else batch))


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize(("size", "batch"), SIZES)
def test_each_sample_once(size, batch, processes):
    data = TensorDataset(torch.arange(size))
    for split, even, drop, seedable in product((False, True), repeat=4):
        if split and batch % processes:
            continue
        options = {"split_batches": split, "even_batches": even, "drop_last": drop, "use_seedable_sampler": seedable}
        loaders = [prepared(data, i, processes, batch, shuffle=True, **options) for i in range(processes)]
        untouched = copy.deepcopy([loader.batch_sampler for loader in loaders])
        state = torch.get_rng_state()
        assert seen(loaders) == list(range(size)), options
        assert torch.equal(torch.get_rng_state(), state)
        parts = [[i for indices in each for i in indices] for each in untouched]
        # The sweep has moved no sampler on.
        assert [[i for indices in loader.batch_sampler for i in indices] for loader in loaders] == parts
        kept = [i for each, part in zip(loaders, parts, strict=True) for i in part[: num_own_samples(each)]]
        assert drop or sorted(kept) == list(range(size)), options


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize(("size", "batch"), SIZES)
def test_each_sample_of_a_stream_once(size, batch, processes):
    for split in (False, True)[: 1 + (batch % processes == 0)]:
        assert seen(
            [prepared(Stream(size), i, processes, batch, split_batches=split) for i in range(processes)]
        ) == list(range(size))
    shards = [
        IterableDatasetShard(Stream(size), batch, num_processes=processes, process_index=i) for i in range(processes)
    ]
    assert seen([DataLoader(each, batch) for each in shards]) == list(range(size))


def test_each_process_reads_of_a_stream_as_far_as_in_training():
    shards = [prepared(Stream(100), i, 2, 4) for i in range(2)]
    read = [[x.tolist() for x in sequential_loader(each, i, 2, limit=2)] for i, each in enumerate(shards)]
    assert read == [[[0, 1, 2, 3], [8, 9, 10, 11]], [[4, 5, 6, 7], [12, 13, 14, 15]]]
    ordered = [prepared(TensorDataset(torch.arange(100)), i, 2, 4) for i in range(2)]
    read = [x for i, each in enumerate(ordered) for (x,) in sequential_loader(each, i, 2, limit=2)]
    assert sorted(torch.cat(read).tolist()) == list(range(16))


def test_a_stream_that_a_library_shards_is_read_by_each_process_as_it_is():
    loader = accelerate.DataLoaderShard(Stream(5), batch_size=2)
    assert [x.tolist() for x in sequential_loader(loader, 1, 2)] == [[0, 1], [2, 3], [4]]


def test_dispatchers_and_skipped_batches_are_looked_through():
    data = TensorDataset(torch.arange(10))
    dispatcher = accelerate.DataLoaderDispatcher(data, batch_size=4, shuffle=True)
    resumed = accelerate.skip_first_batches(prepared(data, 1, 2, 4), 1)
    plain = accelerate.skip_first_batches(DataLoader(data, 4), 1)
    stream = accelerate.skip_first_batches(DataLoader(Stream(10), 4), 1)
    for loader in (dispatcher, resumed, plain, stream):
        assert seen([loader]) == list(range(10))
    assert num_own_samples(resumed) == 0
    assert num_own_samples(accelerate.skip_first_batches(prepared(data, 0, 2, 4), 1)) == 2
    assert known_indices(dispatcher) == range(10)


def test_repeated_samples_of_a_stream_cannot_be_told():
    with pytest.raises(UserError, match=r"DataLoaderShard repeats samples at the end .* evaluation pass"):
        num_own_samples(prepared(Stream(5), 0, 2, 2))
    assert num_own_samples(prepared(Stream(5), 0, 1, 2)) is None
    assert num_own_samples(prepared(Stream(5), 0, 2, 2, drop_last=True)) is None


def test_a_sampler_that_groups_by_length():
    data = TensorDataset(torch.arange(9))
    lengths = [3, 1, 4, 1, 5, 9, 2, 6, 5]
    loaders = [prepared(data, i, 2, 2, sampler=LengthGroupedSampler(2, lengths=lengths)) for i in range(2)]
    assert seen(loaders) == list(range(9))


def test_an_iteration_of_a_users_own_is_refused():
    class Own(accelerate.DataLoaderShard):
        def __iter__(self):
            yield from ()

    with pytest.raises(UserError, match="Own is a DataLoader with an __iter__ of its own"):
        sequential_loader(Own(TensorDataset(torch.arange(4))))


def test_measure_reads_a_prepared_loader_as_the_plain_one():
    torch.manual_seed(0)
    labels = torch.arange(30) % 3
    data = TensorDataset(torch.randn(3, 5)[labels] + torch.randn(30, 5), labels)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    data.tensors = (data.tensors[0].double(), labels)
    plain = nclightning.measure(model, DataLoader(data, 8))
    loader = accelerate.prepare_data_loader(
        DataLoader(data, 8, shuffle=True, drop_last=True), put_on_device=False, use_seedable_sampler=True
    )
    state = torch.get_rng_state()
    found = nclightning.measure(model, loader, measures=("nc1", "nc2", "nc3", "ncc_accuracy"))
    assert torch.equal(torch.get_rng_state(), state)
    assert found.num_samples == 30
    assert loader.iteration == loader.batch_sampler.sampler.epoch == 0
    assert [found[name] for name in plain] == [plain[name] for name in plain]


class DrawnByProcess(IterableDataset):
    def __iter__(self):
        for i in range(8):
            yield torch.full((2,), 10.0 * dist.get_rank() + i)


def shares_out_streams_that_differ():
    shard = IterableDatasetShard(DrawnByProcess(), 2, num_processes=2, process_index=dist.get_rank())
    for collate in (torch.stack, lambda rows: SimpleNamespace(x=torch.stack(rows))):
        loader = DataLoader(shard, 2, collate_fn=collate)
        try:
            sequential_loader(loader, dist.get_rank(), 2)
        except UserError as error:
            yield str(error)


def test_a_stream_that_differs_between_processes_is_refused_whatever_its_batches_are(tmp_path):
    said = processes.on(2, tmp_path, lambda: list(shares_out_streams_that_differ()), group=True)
    assert all(len(each) == 2 and "yields different samples on different processes" in each[1] for each in said)
