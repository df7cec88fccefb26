"""Numbers that tell whether tensors were changed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from nclightning.sharding import own_shard

__all__ = ["fingerprint", "fingerprint_together"]

# Words of a tensor whose fingerprint is taken at a time: they stay in the cache.
_WORDS_AT_A_TIME = 2**15
# Tensors of so many numbers are put together with others.
_SMALL = 2**14
# Multiplies as random generators do.
_ODD = -7046029254386353131


def fingerprint(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """Return numbers that tell whether tensors, such as a module's parameters, have been changed, bit for bit.

    Version counters miss writes through ``.data`` and by fused optimizers. The numbers are sums of 64
    mixed bits per element and place: a change goes unseen with a probability of about :math:`2^{-64}`.

    Args:
        tensors: Dense ones; of sharded ones the part of this process counts.

    Returns:
        One number per tensor.
    """
    sums = [_checksum(own_shard(tensor.detach())) for tensor in tensors]
    # One transfer per device.
    devices = {each.device for each in sums}
    on_host = {device: iter(torch.stack([s for s in sums if s.device == device]).tolist()) for device in devices}
    return tuple(next(on_host[each.device]) for each in sums)


def fingerprint_together(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """Do as :func:`fingerprint` does, with one number for many small tensors.

    Args:
        tensors: As there; which of them there are is a part of what the numbers tell.
    """
    large, small = list[Tensor](), dict[tuple[torch.device, torch.dtype], list[Tensor]]()
    for tensor in tensors:
        own = own_shard(tensor.detach())
        if own.layout != torch.strided or own.numel() > _SMALL:
            large.append(own)
        else:
            small.setdefault((own.device, own.dtype), []).append(own.reshape(-1))
    return fingerprint([*large, *(torch.cat(each) for each in small.values())])


def _checksum(tensor: Tensor) -> Tensor:
    flat = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    flat = flat.contiguous().view(-1).view(torch.uint8)
    flat = flat.clone() if flat.storage_offset() % 8 else flat  # Words begin at multiples of their size.
    rest = len(flat) % 8
    total = _mixed_sum(flat[len(flat) - rest :].long())
    for part in torch.split(flat[: len(flat) - rest].view(torch.int64), _WORDS_AT_A_TIME):
        total = total * _ODD + _mixed_sum(part)
    return total


def _mixed_sum(words: Tensor) -> Tensor:
    """Sum words with a weight by place, mixed so that flipped signs do not cancel."""
    places = torch.arange(1, len(words) + 1, device=words.device).mul_(_ODD).bitwise_or_(1)
    mixed = places.mul_(words)
    return mixed.bitwise_xor_(mixed >> 32).sum()
