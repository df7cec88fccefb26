"""What processes do together, against the same done by one."""

import pytest
import torch
import torch.distributed as dist

from nclightning.ranks import (
    count_over_ranks,
    gather_rows,
    own_rows,
    sum_all_over_ranks,
    sum_over_ranks,
    world_size,
)
from tests.processes import on

WORLD, ROWS = 3, 7
TABLE = torch.arange(2.0 * ROWS, dtype=torch.float64).view(ROWS, 2)


def tensors(rank):
    """A float64 scalar, a float32 matrix and a float32 vector; a third has no exact sum in float32."""
    return [
        torch.tensor(1e-12 + rank, dtype=torch.float64),
        torch.full((2, 3), rank + 1 / 3),
        torch.tensor([rank, -rank], dtype=torch.float32),
    ]


def share():
    rank = dist.get_rank()
    summed = tensors(rank)
    sum_all_over_ranks(summed)
    sum_all_over_ranks([])
    first, count = own_rows(ROWS, rank, WORLD)
    return {
        "world": world_size(),
        "sum": sum_over_ranks(torch.tensor([rank, 1])).tolist(),
        "count": count_over_ranks(count, torch.device("cpu")),
        "sums": [each.tolist() for each in summed],
        "dtypes": [each.dtype for each in summed],
        "rows": gather_rows(TABLE.narrow(0, first, count), ROWS).tolist(),
    }


@pytest.mark.parametrize(("rows", "world"), [(20, 3), (7, 7), (1000, 6)])
def test_rows_are_shared_out_without_gap_or_overlap(rows, world):
    parts = [own_rows(rows, rank, world) for rank in range(world)]
    assert [first for first, _ in parts] == [sum(count for _, count in parts[:i]) for i in range(world)]
    assert sum(count for _, count in parts) == rows
    assert max(count for _, count in parts) - min(count for _, count in parts) <= 1


def test_three_processes(tmp_path):
    results = on(WORLD, tmp_path, share, group=True)
    expected = [sum(parts.double() for parts in each) for each in zip(*map(tensors, range(WORLD)), strict=True)]
    for result in results:
        assert result["world"] == WORLD
        assert result["sum"] == [3, 3]
        assert result["count"] == ROWS
        assert result["dtypes"] == [torch.float64, torch.float32, torch.float32]
        for total, reference, own in zip(result["sums"], expected, tensors(0), strict=True):
            assert total == reference.to(own.dtype).tolist()  # Added in float64, so that one rounding is left.
    assert results[0]["rows"] == TABLE.tolist()
    assert sum(len(results[rank]["rows"]) for rank in (1, 2)) == ROWS - ROWS // WORLD


def test_a_single_process_sums_nothing():
    summed = tensors(0)
    sum_all_over_ranks(summed)
    assert all(torch.equal(a, b) for a, b in zip(summed, tensors(0), strict=True))
    assert (world_size(), count_over_ranks(5, torch.device("cpu"))) == (1, 5)
    assert gather_rows(TABLE, ROWS) is TABLE
