"""Batches of in-memory samples are those of a plain loader, whatever they are made of, and take no sample by itself."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset, default_collate

from nclightning.probe.sweep import sequential_loader

N = 50


class Doubled(TensorDataset):
    """What an item is, the class says."""

    def __getitem__(self, index):
        return tuple(2 * each for each in super().__getitem__(index))


class Marked(torch.Tensor):
    """Its rows may be something else."""


def rows(kind=TensorDataset):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(N, 2, 3, 4, generator=generator)
    floats = torch.randn(3, N, generator=generator).double().t()
    return kind(images.to(memory_format=torch.channels_last), torch.arange(N), floats, torch.arange(N).half())


BACKWARDS = list(range(N - 1, 3, -1))
DATA = {
    "rows": rows,
    "one tensor": lambda: TensorDataset(torch.arange(N)),
    "subset": lambda: Subset(rows(), BACKWARDS),
    "subset by an array": lambda: Subset(rows(), np.array(BACKWARDS)),
    "subset of a subset": lambda: Subset(Subset(rows(), range(N - 1, 0, -2)), [3, 1, 2, 9, 9]),
    "empty subset": lambda: Subset(rows(), []),
    # What is taken sample by sample.
    "from the end": lambda: Subset(rows(), [-1, -2, 0]),
    "subset of one from the end": lambda: Subset(Subset(rows(), [-1, -2, 0]), [2, 0]),
    "from the end of a subset": lambda: Subset(Subset(rows(), BACKWARDS), [-1, 0]),
    "own items": lambda: rows(Doubled),
    "subset of own items": lambda: Subset(rows(Doubled), BACKWARDS),
    "own tensors": lambda: TensorDataset(torch.arange(N).as_subclass(Marked)),
    "list": lambda: [(torch.full((2,), float(i)), i) for i in range(N)],
}


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_batches_are_those_of_a_plain_loader(data, workers):
    dataset = data()
    plain = list(DataLoader(dataset, batch_size=8))
    swept = list(sequential_loader(DataLoader(dataset, batch_size=8, num_workers=workers)))
    assert len(swept) == len(plain)
    for batch, expected in zip(swept, plain, strict=True):
        assert type(batch) is type(expected)
        for one, other in zip(batch, expected, strict=True):
            assert type(one) is type(other)
            assert (one.dtype, one.stride(), one.tolist()) == (other.dtype, other.stride(), other.tolist())


@pytest.mark.parametrize("indices", [[-1, 3, 0], [torch.tensor(3), torch.tensor(0)], [np.int64(4), np.int64(2)]])
def test_samplers_may_yield_any_index(indices):
    swept = list(sequential_loader(DataLoader(rows(), batch_size=2, sampler=indices)))
    numbers = sorted(int(each) for each in indices)
    expected = [default_collate([rows()[i] for i in numbers[start : start + 2]]) for start in range(0, len(numbers), 2)]
    assert [[each.tolist() for each in batch] for batch in swept] == [[e.tolist() for e in batch] for batch in expected]


def test_collate_functions_of_the_user_get_samples():
    def collate(samples):
        return len(samples), default_collate(samples)

    swept = list(sequential_loader(DataLoader(rows(), batch_size=8, collate_fn=collate)))
    assert [count for count, _ in swept] == [8] * 6 + [2]


def test_an_index_behind_the_end_is_an_error():
    for dataset in (Subset(rows(), [0, N]), Subset(Subset(rows(), [0, 1]), [0, 2])):
        with pytest.raises(IndexError):
            list(sequential_loader(DataLoader(dataset, batch_size=8)))


def test_no_sample_is_taken_by_itself(monkeypatch):
    loaders = [DataLoader(each, batch_size=8, shuffle=True) for each in (rows(), Subset(rows(), BACKWARDS))]

    def refuse(*_):
        raise AssertionError

    monkeypatch.setattr(TensorDataset, "__getitem__", refuse)
    for loader in loaders:
        assert sum(len(labels) for _, labels, *_ in sequential_loader(loader)) == len(loader.dataset)


def test_samples_on_a_device_stay_there():
    dataset = TensorDataset(torch.zeros(N, 2, device="meta"), torch.zeros(N, device="meta"))
    assert all(each.is_meta for batch in sequential_loader(DataLoader(dataset, batch_size=8)) for each in batch)
