"""The samples at the end of a training set that ``drop_last`` keeps from training, and not from an evaluation pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import lightning as L
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from nclightning.errors import UserError
from nclightning.sweep import limited_batches

__all__ = ["first_samples", "left_over", "num_left_over", "saying_so"]


def num_left_over(trainer: L.Trainer) -> int:
    """Count the samples of the last batch of an evaluation pass, where training drops it; 0 where it does not."""
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or trainer.world_size > 1:
        return 0
    whole = limited_batches(loader, trainer.limit_train_batches, 0) is None
    sampler = loader.sampler
    if not whole or not loader.drop_last or loader.batch_size is None or not isinstance(sampler, Sized):
        return 0
    return len(sampler) % loader.batch_size


def first_samples(batch: Any, count: int, rest: int) -> Any:
    """Take the first ``rest`` samples of a batch of ``count``."""
    if isinstance(batch, Tensor):
        return batch[:rest] if batch.ndim and len(batch) == count else batch
    if isinstance(batch, Mapping):
        return {key: first_samples(value, count, rest) for key, value in batch.items()}
    if type(batch) in (tuple, list):
        return type(batch)(first_samples(value, count, rest) for value in batch)
    return batch


def left_over(module: nn.Module, error: Exception, rest: int | None = None) -> UserError:
    """Say why a batch of the samples left over could not be read."""
    many = "the last samples" if rest is None else f"a batch of the {rest} samples"
    return UserError(
        f"{type(module).__name__} could not be measured on {many} that drop_last=True leaves out of training, and an "
        f"evaluation pass over the training set reads: {type(error).__name__}: {error} Use source='online', or let "
        "forward and collate_fn take batches of any size."
    )


def saying_so(module: nn.Module, loader: Any, batches: Iterable[Any]) -> Iterator[Any]:
    """Yield batches; if that fails where the last ones are never seen in training, say so."""
    try:
        yield from batches
    except UserError:
        raise
    except Exception as error:
        if getattr(loader, "drop_last", False):
            raise left_over(module, error) from error
        raise
