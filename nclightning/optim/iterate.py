"""Whether parameters still are where a step left them, bit for bit, also after writes that torch does not count."""

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
_COPIED_BYTES = 2**20  # So few are copied and compared several times faster than they are hashed.
_PART = 2**14  # Words that are added up with weights of their own.
_ROWS = 4  # Parts at a time: they stay in a CPU's cache.


class Iterate(ABC):
    """The values that parameters had when it was made."""

    @abstractmethod
    def matches(self, params: Sequence[Tensor]) -> bool:
        """Say whether they have them still. On several processes it speaks for this one alone."""


class IterateCopy(Iterate):
    """Compares with copies.

    Args:
        copies: One per parameter; None where nothing is to be compared.
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
    """Compares 64-bit hashes, for parameters of which there is no memory for a copy.

    A change that goes unnoticed has a chance of about one in 2^32.

    Args:
        params: As they are.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._hashes = _hashes(params)

    def matches(self, params: Sequence[Tensor]) -> bool:
        """Compare the hashes."""
        return torch.equal(self._hashes, _hashes(params))


def remember(params: Sequence[Tensor]) -> Iterate:
    """Remember parameters as they are: by copies where these are small, else by hashes.

    Args:
        params: All that an optimizer has.

    Returns:
        To be asked later whether they still are there.
    """
    shards = [own_shard(p.detach()) for p in params]
    if sum(shard.numel() * shard.element_size() for shard in shards) <= _COPIED_BYTES:
        return IterateCopy([shard.clone() for shard in shards])
    return Fingerprint(params)


def differ_between_ranks(params: Sequence[Tensor]) -> bool:
    """Say, on all processes alike, whether parameters that each has as a whole are not the same on each."""
    whole = [p for p in params if own_shard(p) is p]
    if world_size() == 1 or not whole:
        return False
    hashes = _hashes(whole).to(whole[0].device)
    extremes = torch.stack([hashes, ~hashes])  # The complement turns the order round: one message for both ends.
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    return not torch.equal(extremes[0], ~extremes[1])


def _is_alike(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and left.dtype == right.dtype and left.device == right.device


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(_INTEGERS[tensor.element_size()])


def _hashes(params: Sequence[Tensor]) -> Tensor:
    return torch.stack([_hash(own_shard(p.detach())).cpu() for p in params])


def _hash(tensor: Tensor) -> Tensor:
    """Add bits up with weights, modulo 2^64: where a number sits counts."""
    words = _words(tensor.reshape(-1))
    while len(words) > _PART:
        count = len(words) // _PART
        # Everything has its place beforehand: results that wait would keep the memory between them from being reused.
        shorter, room = words.new_empty(len(words) - count * (_PART - 1)), words.new_empty(_ROWS, _PART)
        shorter[count:] = words[count * _PART :]
        for rows, sums in zip(
            torch.split(words[: count * _PART].view(count, _PART), _ROWS),
            torch.split(shorter[:count], _ROWS),
            strict=True,
        ):
            _add_up(rows, room[: len(rows)], sums)
        words = shorter
    total = words.new_empty(1)
    _add_up(words.view(1, -1), words.new_empty(1, len(words)), total)
    return total[0] + tensor.numel()  # Padded by zeros it would be the same sum.


def _words(flat: Tensor) -> Tensor:
    """Return the bits as int64: narrow entries several at a time where memory allows it."""
    bits, per_word = _bits(flat), 8 // flat.element_size()
    whole = len(bits) // per_word * per_word
    if bits.storage_offset() % per_word or not whole:
        return bits.long()
    words = bits[:whole].view(torch.int64)
    return words if whole == len(bits) else torch.cat([words, bits[whole:].long()])


def _add_up(rows: Tensor, room: Tensor, sums: Tensor) -> None:
    """Write the weighted sum of each row."""
    low, high = _weights(rows.device)[:, : rows.shape[1]]
    on_cpu = rows.device.type == "cpu"  # Elsewhere there are no products of integer matrices.
    sums.copy_(torch.mv(rows, low) if on_cpu else torch.mul(rows, low, out=room).sum(dim=1))
    # Signs and exponents are the upper bits, of which a product modulo 2^64 would keep little.
    torch.bitwise_right_shift(rows, 32, out=room)
    sums.add_(torch.mv(room, high) if on_cpu else room.mul_(high).sum(dim=1))


@lru_cache(maxsize=8)
def _weights(device: torch.device) -> Tensor:
    drawn = torch.randint(-(2**63), 2**63 - 1, (2, _PART), generator=torch.Generator().manual_seed(0))
    return (drawn | 1).to(device)
