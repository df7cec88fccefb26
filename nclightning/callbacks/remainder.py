"""What an evaluation pass over training loaders meets, and no step: each alone, and samples that they drop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import lightning as L
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from nclightning.callbacks.first_batch import IGNORED
from nclightning.errors import UserError
from nclightning.probe.features import describe, pair_rows
from nclightning.probe.sweep import TraceError, limited_batches

__all__ = ["check_rest", "check_split", "labels_of", "num_left_over", "saying_so"]

Split = Callable[[Any], tuple[Any, Tensor]]


def check_split(split: Split, parts: Sequence[Any]) -> None:
    """Refuse a ``batch_fn`` for the batches of several loaders together.

    Args:
        split: Splits batches.
        parts: A batch of each training loader.

    Raises:
        ValueError: If that fails on one of them.
    """
    for part in parts if len(parts) > 1 else ():
        _check_split(split, part)


def _check_split(split: Split, part: Any) -> None:
    try:
        split(part)
    except UserError:
        pass  # Said later, and better.
    except Exception as error:
        raise UserError(
            f"batch_fn failed on {describe(part)}: {type(error).__name__}: {error}. An evaluation pass gives it "
            "batches of one loader, also where the training step gets those of several: let it return (inputs, "
            f"labels) of each, with labels {IGNORED} for samples without."
        ) from error


def labels_of(split: Split, batch: Any) -> Tensor:
    """Return the labels of a further training loader.

    Raises:
        ValueError: If it has none.
    """
    try:
        return split(batch)[1]
    except UserError as error:
        raise UserError(
            f"{error} It is of another training loader than the first, and each is swept: give samples without "
            f"labels the label {IGNORED} by batch_fn."
        ) from None


def check_rest(
    module: L.LightningModule,
    split: Split,
    features: Callable[[L.LightningModule, Any], Mapping[str, Tensor]],
    batch: Any,
    rest: int,
) -> None:
    """Run a module on as many samples as are left over at the end of the training set.

    Args:
        module: The module.
        split: Splits batches.
        features: Runs the module on inputs.
        batch: The first one.
        rest: How many samples.

    Raises:
        ValueError: If that fails.
    """
    try:
        inputs, labels = split(_first_samples(batch, len(split(batch)[1]), rest))
        if len(labels) == rest:
            pair_rows(features(module, inputs)[""], labels)
    except TraceError:
        raise
    except Exception as error:
        raise _left_over(module, error, rest) from error


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


def _first_samples(batch: Any, count: int, rest: int) -> Any:
    """Take the first ``rest`` samples of a batch of ``count``."""
    if isinstance(batch, Tensor):
        return batch[:rest] if batch.ndim and len(batch) == count else batch
    if isinstance(batch, Mapping):
        return {key: _first_samples(value, count, rest) for key, value in batch.items()}
    if type(batch) in (tuple, list):
        return type(batch)(_first_samples(value, count, rest) for value in batch)
    return batch


def _left_over(module: nn.Module, error: Exception, rest: int | None = None) -> UserError:
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
            raise _left_over(module, error) from error
        raise
