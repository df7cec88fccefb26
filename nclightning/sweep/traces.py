"""Running a model so that nothing of it is left changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from nclightning.sharding import own_shard
from nclightning.sweep.states import metrics_kept, random_states_kept, registered_metrics_kept

__all__ = ["compiled_parts", "eager", "fingerprint", "frozen", "shared_buffers", "untouched"]

# Words of a tensor whose fingerprint is taken at a time: they stay in the cache.
_WORDS_AT_A_TIME = 2**15
# Multiplies as random generators do.
_ODD = -7046029254386353131


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Look at a module without a trace: eval mode, no gradients, and the rest as :func:`untouched`.

    The random states of Python and numpy, and torchmetrics in any of its attributes, are put back, too.

    Args:
        module: Its training flags are restored one by one, so that parts that were frozen stay so.
    """
    modes = [(child, child.training) for child in module.modules()]
    try:
        with untouched(module), metrics_kept(module), random_states_kept(), torch.no_grad():
            for child, _ in modes:  # Not eval(): what layers do when their mode changes, such as merging, is a trace.
                child.training = False
            yield
    finally:
        for child, training in modes:
            child.training = training


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Run a module as it trains, without a trace.

    Its buffers, the states of the torchmetrics among its submodules, and torch's random states are put back afterwards.

    Args:
        module: Its modes stay, so that what is seen is what is trained.
    """
    modules = list(module.modules())
    with _buffers_kept(modules), registered_metrics_kept(modules), torch.random.fork_rng(devices=_cuda_devices(module)):
        yield


@contextmanager
def _buffers_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    buffers = [
        (child, name, buffer, buffer.detach().clone())
        for child in modules
        for name, buffer in child.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for child, name, buffer, value in buffers:
                child._buffers[name] = buffer.copy_(value)  # Some modules put a new tensor in its place.


def _cuda_devices(module: nn.Module) -> list[int]:
    return sorted(
        {p.device.index for p in module.parameters() if p.device.type == "cuda" and p.device.index is not None}
    )


@contextmanager
def shared_buffers(module: nn.Module, world_size: int) -> Iterator[None]:
    """Give all processes the buffers of the first, and put their own back afterwards.

    Batch norm keeps running statistics of its own on each process, so that processes would look at different models;
    the first one's is the model that checkpoints hold.

    Args:
        module: Any module.
        world_size: Number of processes, which must all come here.
    """
    if world_size == 1:
        yield
        return
    with _buffers_kept(module.modules()):
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, 0)
        yield


def eager() -> AbstractContextManager[Any]:
    """Run compiled modules uncompiled, since compiled ones do not see hooks that came later."""
    stance = getattr(torch.compiler, "set_stance", None)  # From torch 2.6 on.
    return nullcontext() if stance is None else stance("force_eager")


def compiled_parts(module: nn.Module) -> list[nn.Module]:
    """Return the parts of a module that ``torch.compile`` runs as graphs, in which hooks that came later do not fire.

    Args:
        module: Any module.

    Returns:
        Compiled submodules, and those that have a compiled function, such as a compiled ``validation_step``.
    """
    return [
        child
        for child in module.modules()
        if hasattr(child, "_orig_mod")
        or getattr(child, "_compiled_call_impl", None) is not None
        or any(hasattr(value, "_torchdynamo_orig_callable") for value in vars(child).values())
    ]


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
