"""Detection of changed parameters, bit for bit, also after writes that torch's version counters miss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from nclightning.ranks import world_size
from nclightning.sharding import own_shard

__all__ = ["Iterate", "IterateCopy", "differ_between_ranks", "remember"]

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_COPIED_BYTES = 2**20  # Up to this size, copying and comparing is several times faster than hashing.
_PART = 2**14  # Number of 64-bit words that are summed at once, each with its own weight.
_ROWS = 4  # Number of parts per operation, which then fit in the CPU's cache.


class Iterate(ABC):
    """A record of the values that parameters had at one time."""

    @abstractmethod
    def matches(self, params: Sequence[Tensor]) -> bool:
        """Return whether the parameters have the recorded values. On several processes: on this one."""


class IterateCopy(Iterate):
    """A record that keeps copies.

    Args:
        copies: One copy per parameter; None for a parameter that is not compared.
    """

    def __init__(self, copies: Sequence[Tensor | None]) -> None:
        self._copies = copies

    def matches(self, params: Sequence[Tensor]) -> bool:
        """Compare bit for bit."""
        pairs = [
            (own_shard(p.detach()), copy) for p, copy in zip(params, self._copies, strict=True) if copy is not None
        ]
        return all(_is_alike(p, copy) for p, copy in pairs) and all(torch.equal(_bits(p), _bits(c)) for p, c in pairs)


class Fingerprint(Iterate):
    """A record that keeps 64-bit hashes, for parameters that are too large to copy.

    A change goes unnoticed with a probability of about 2^-32.

    Args:
        params: The parameters with the values to record.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._hashes = _hashes(params)

    def matches(self, params: Sequence[Tensor]) -> bool:
        """Compare the hashes."""
        return torch.equal(self._hashes, _hashes(params))


def remember(params: Sequence[Tensor]) -> Iterate:
    """Record the values of parameters: in copies if these are small, else in hashes.

    Args:
        params: All parameters of an optimizer.

    Returns:
        The record, which can later be compared with the parameters.
    """
    shards = [own_shard(p.detach()) for p in params]
    if sum(shard.numel() * shard.element_size() for shard in shards) <= _COPIED_BYTES:
        return IterateCopy([shard.clone() for shard in shards])
    return Fingerprint(params)


def differ_between_ranks(params: Sequence[Tensor]) -> bool:
    """Return whether parameters differ between processes; every process returns the same. Shards are not compared."""
    whole = [p for p in params if own_shard(p) is p]
    if world_size() == 1 or not whole:
        return False
    hashes = _hashes(whole).to(whole[0].device)
    extremes = torch.stack([hashes, ~hashes])  # max(~x) is ~min(x): one message gives both.
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    return not torch.equal(extremes[0], ~extremes[1])


def _is_alike(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and left.dtype == right.dtype and left.device == right.device


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(_INTEGERS[tensor.element_size()])


def _hashes(params: Sequence[Tensor]) -> Tensor:
    return torch.stack([_hash(own_shard(p.detach())).cpu() for p in params])


def _hash(tensor: Tensor) -> Tensor:
    """Return a weighted sum of the bits modulo 2^64, which depends on the position of each number."""
    words = _words(tensor.reshape(-1))
    while len(words) > _PART:
        count = len(words) // _PART
        # All memory is allocated before the loop. Results allocated within it would fragment the memory between them.
        shorter, buffer = words.new_empty(len(words) - count * (_PART - 1)), words.new_empty(_ROWS, _PART)
        shorter[count:] = words[count * _PART :]
        for rows, sums in zip(
            torch.split(words[: count * _PART].view(count, _PART), _ROWS),
            torch.split(shorter[:count], _ROWS),
            strict=True,
        ):
            _add_up(rows, buffer[: len(rows)], sums)
        words = shorter
    total = words.new_empty(1)
    _add_up(words.view(1, -1), words.new_empty(1, len(words)), total)
    return total[0] + tensor.numel()  # Trailing zeros would not change the sum.


def _words(flat: Tensor) -> Tensor:
    """Return the bits as int64: several narrow entries per word if the memory is aligned, else one entry per word."""
    bits, per_word = _bits(flat), 8 // flat.element_size()
    whole = len(bits) // per_word * per_word
    if bits.storage_offset() % per_word or not whole:
        return bits.long()
    words = bits[:whole].view(torch.int64)
    return words if whole == len(bits) else torch.cat([words, bits[whole:].long()])


def _add_up(rows: Tensor, buffer: Tensor, sums: Tensor) -> None:
    """Write the weighted sum of each row to ``sums``. ``buffer`` has the shape of ``rows``."""
    low, high = _weights(rows.device)[:, : rows.shape[1]]
    on_cpu = rows.device.type == "cpu"  # Other devices have no product of integer matrices.
    sums.copy_(torch.mv(rows, low) if on_cpu else torch.mul(rows, low, out=buffer).sum(dim=1))
    # Signs and exponents are in the upper bits, of which a product modulo 2^64 keeps little.
    torch.bitwise_right_shift(rows, 32, out=buffer)
    sums.add_(torch.mv(buffer, high) if on_cpu else buffer.mul_(high).sum(dim=1))


@lru_cache(maxsize=8)
def _weights(device: torch.device) -> Tensor:
    drawn = torch.randint(-(2**63), 2**63 - 1, (2, _PART), generator=torch.Generator().manual_seed(0))
    return (drawn | 1).to(device)
