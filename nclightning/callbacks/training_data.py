"""The training loaders as an evaluation pass reads them: each by itself, and to its last sample.

A step may get batches of several loaders together, and never sees the samples that ``drop_last`` drops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any

import lightning as L
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from nclightning.callbacks.modules import name_loaders
from nclightning.compat.lightning import batches_read
from nclightning.errors import UserError
from nclightning.probe.evaluation import leftover_error
from nclightning.probe.features import describe
from nclightning.probe.first_batch import IGNORED
from nclightning.probe.host import Host
from nclightning.probe.reader import PairReader
from nclightning.probe.sets import DataSet
from nclightning.probe.sweep import TraceError, limited_batches, num_planned_batches

__all__ = ["TrainingSets", "check_rest", "check_split", "evaluation_set", "labels_of", "num_left_over", "parts_of"]

Split = Callable[[Any], tuple[Any, Tensor]]


class TrainingSets:
    """The training loaders of the last fit. They are kept: a validation or test after it may need class means.

    Attributes:
        sets: By tag: ``train``, several loaders ``train/<loader>``; held to as many batches as training.
    """

    def __init__(self) -> None:
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"sets": {}}  # Loaders may not be picklable.

    def forget(self) -> None:
        """Forget those of an earlier fit."""
        self.sets: dict[str, DataSet] = {}
        self._most_read = 0

    def remember(self, trainer: L.Trainer) -> None:
        """Keep hold of a trainer's training loaders, and of how much training has read of them."""
        if trainer.train_dataloader is None:
            return
        # A loader without a length is read as far as training has come in its longest epoch.
        self._most_read = max(self._most_read, batches_read(trainer))
        self.sets = {
            f"train/{name}" if name else "train": DataSet(
                loader, limited_batches(loader, trainer.limit_train_batches, self._most_read)
            )
            for name, loader in name_loaders(trainer.train_dataloader)
        }

    def needed(self) -> dict[str, DataSet]:
        """Return the sets for their class means.

        Raises:
            ValueError: If there are none.
        """
        if not self.sets:
            raise UserError(
                "decisions by nearest centre and nc5 need the class means of the training set, and the monitor has "
                "seen none: fit first, or leave them out."
            )
        return self.sets


def evaluation_set(trainer: L.Trainer, loader: Any) -> DataSet:
    """Hold a loader without a length, which may have no end, to as many batches as Lightning's validation would."""
    limit = trainer.limit_val_batches
    return DataSet(loader, limit if num_planned_batches(loader) is None and isinstance(limit, int) else None)


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


def parts_of(batch: Any, loaders: Any) -> Iterator[Any]:
    """Yield the batches of single loaders out of one that several loaders made together."""
    if isinstance(loaders, Mapping) and isinstance(batch, Mapping) and batch.keys() == loaders.keys():
        yield from (each for each in batch.values() if each is not None)
    elif isinstance(loaders, list | tuple) and isinstance(batch, list | tuple) and len(batch) == len(loaders):
        yield from (each for each in batch if each is not None)
    else:
        yield batch


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


def check_rest(reader: PairReader, host: Host, batch: Any, rest: int) -> None:
    """Run a module on as many samples as are left over at the end of the training set.

    Args:
        reader: Of features and labels.
        host: Of the module.
        batch: The first one.
        rest: How many samples.

    Raises:
        ValueError: If that fails.
    """
    try:
        inputs, labels = reader.split(_first_samples(batch, len(reader.split(batch)[1]), rest))
        if len(labels) == rest:
            reader.pair(reader.features(host, inputs)[""], labels)
    except TraceError:
        raise
    except Exception as error:
        raise leftover_error(host.module, error, rest) from error


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
