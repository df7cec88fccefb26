"""Batches that are put together before they are taken in."""

import pytest
import torch

from nclightning.probe.batches import RowBuffer

D, K = 5, 3


@pytest.fixture
def samples(generator):
    return torch.randn(40, D, generator=generator), torch.randint(K, (40,), generator=generator)


@pytest.fixture
def taken():
    return []


@pytest.fixture
def buffer(taken):
    return RowBuffer(lambda features, labels: taken.append((features, labels)))


def test_rows_come_together_and_in_order(buffer, taken, samples):
    features, labels = torch.empty(8, D), torch.empty(8, dtype=torch.int64)
    for rows, index in zip(*(each.split(8) for each in samples), strict=True):
        labels.copy_(index)  # A loader may fill the same memory with the next batch; features are copies of the hooks.
        buffer.add({"": features.copy_(rows).clone(), "layer": rows[:, :2].clone()}, labels)
    assert not taken
    buffer.flush()
    buffer.flush()
    ((rows, index),) = taken
    assert torch.equal(rows[""], samples[0])
    assert torch.equal(rows["layer"], samples[0][:, :2])
    assert torch.equal(index, samples[1])


def test_few_rows_wait(buffer, taken):
    for _ in range(100):
        buffer.add({"": torch.zeros(64, 256)}, torch.zeros(64, dtype=torch.int64))
        assert buffer._num_rows < 2048
    buffer.flush()
    assert [len(labels) for _, labels in taken] == [2048, 2048, 2048, 256]


def test_empty_batches_do_not_wait(buffer, taken, samples):
    for _ in range(50):
        buffer.add({"": torch.zeros(0, D)}, torch.zeros(0, dtype=torch.int64))
    assert len(buffer._waiting) == 1  # One, so that all processes know the names.
    buffer.add({"": samples[0]}, samples[1])
    buffer.flush()
    assert len(taken[0][1]) == len(samples[1])


def test_places_behind_the_own_ones_are_left_out(buffer, taken, samples):
    for rows, index in zip(*(each.split(16) for each in samples), strict=True):
        buffer.add({"": rows}, index, num_own=20)
    buffer.flush()
    assert torch.equal(taken[0][1], samples[1][:20])
    assert buffer.seen == 20


def test_odd_batches_among_others_are_paired_for_themselves(buffer, taken, samples):
    """A label too many here and one too few there do not make a pair."""
    buffer.add({"": samples[0][:4]}, samples[1][:4].unsqueeze(1))
    buffer.add({"": samples[0][4:8]}, samples[1][4:8].int())
    buffer.flush()
    assert torch.equal(taken[0][1], samples[1][:8])
    buffer.add({"": samples[0][:4]}, samples[1][:5])
    buffer.add({"": samples[0][5:10]}, samples[1][6:10])
    with pytest.raises(ValueError, match="one label per feature row"):
        buffer.flush()


def test_features_of_one_size_are_asked_for(buffer, samples):
    for width in (2, 3):
        buffer.add({"": samples[0], "layer": samples[0][:, :width]}, samples[1])
    with pytest.raises(ValueError, match="'layer' have 2 numbers in one batch and 3 in another"):
        buffer.flush()
