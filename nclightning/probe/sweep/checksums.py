"""Fingerprints that show whether tensors were changed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from nclightning.sharding import own_shard

__all__ = ["fingerprint", "fingerprint_together"]

# Number of 64-bit words that are processed at once. They fit in the CPU's cache.
_WORDS_AT_A_TIME = 2**15
# Tensors up to this number of elements are concatenated.
_SMALL = 2**14
# An odd multiplier as in random number generators.
_ODD = -7046029254386353131


def fingerprint(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """Return 64-bit hashes of tensors, by which a change of a single bit can be detected.

    Torch's version counters miss writes through ``.data`` and by fused optimizers. A change goes undetected with a
    probability of about :math:`2^{-64}`.

    Args:
        tensors: Dense tensors. For a sharded tensor, the shard of this process is used.

    Returns:
        One number per tensor.
    """
    sums = [_checksum(own_shard(tensor.detach())) for tensor in tensors]
    # One transfer per device.
    devices = {each.device for each in sums}
    on_host = {device: iter(torch.stack([s for s in sums if s.device == device]).tolist()) for device in devices}
    return tuple(next(on_host[each.device]) for each in sums)


def fingerprint_together(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """Return hashes of tensors like :func:`fingerprint`, but one for all small tensors of a device and dtype.

    Args:
        tensors: As for :func:`fingerprint`. The hashes depend on which tensors there are and on their order.
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
    """Return a 64-bit hash of a tensor."""
    flat = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    flat = flat.contiguous().view(-1).view(torch.uint8)
    flat = flat.clone() if flat.storage_offset() % 8 else flat  # 64-bit words must be aligned.
    rest = len(flat) % 8
    total = _mixed_sum(flat[len(flat) - rest :].long())
    for part in torch.split(flat[: len(flat) - rest].view(torch.int64), _WORDS_AT_A_TIME):
        total = total * _ODD + _mixed_sum(part)
    return total


def _mixed_sum(words: Tensor) -> Tensor:
    """Sum words with weights that depend on the position, and mix bits so that two flipped signs do not cancel."""
    places = torch.arange(1, len(words) + 1, device=words.device).mul_(_ODD).bitwise_or_(1)
    mixed = places.mul_(words)
    return mixed.bitwise_xor_(mixed >> 32).sum()
