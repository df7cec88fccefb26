"""The tensors in the inputs of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nclightning.compat.torch import version_of

__all__ = ["inputs_kept", "tensors_of"]


def tensors_of(inputs: Any, depth: int = 4) -> Iterator[Tensor]:
    """Yield the tensors in the inputs of a batch."""
    if isinstance(inputs, Tensor):
        yield inputs
    elif depth and not isinstance(inputs, str | bytes | nn.Module):
        items: Any = (
            inputs.values()
            if isinstance(inputs, Mapping)
            else inputs
            if isinstance(inputs, Sequence)
            else getattr(inputs, "__dict__", {}).values()
        )
        for each in items:
            yield from tensors_of(each, depth - 1)


@contextmanager
def inputs_kept(inputs: Any) -> Iterator[list[Tensor]]:
    """Restore inputs that a model overwrites in the block, for example by normalizing them in place.

    Without this the next forward, which may be the user's own, would get changed inputs.

    Args:
        inputs: The inputs of a batch.

    Yields:
        A list. After the block it contains the tensors that were overwritten.
    """
    before = [(tensor, version_of(tensor), tensor.detach().clone()) for tensor in tensors_of(inputs)]
    written: list[Tensor] = []
    try:
        yield written
    finally:
        for tensor, version, value in before:
            now = version_of(tensor)
            if now != version or (now < 0 and not torch.equal(tensor, value)):
                written.append(tensor)
                with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                    tensor.copy_(value)
