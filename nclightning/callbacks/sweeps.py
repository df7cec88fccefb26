"""Measurements from passes of their own over the training set and further ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import lightning as L
from torch import Tensor

from nclightning.callbacks.attach import Attachment
from nclightning.callbacks.collection import Centres, Collection, Measuring, orthogonality
from nclightning.callbacks.modules import name_loaders
from nclightning.compat.lightning import batches_read
from nclightning.errors import UserError
from nclightning.functional import ClassStatistics
from nclightning.heads import Head
from nclightning.probe.sweep import limited_batches, num_planned_batches

__all__ = ["Sweeps", "Swept"]


class Swept(NamedTuple):
    """What was measured at one state of the weights.

    Attributes:
        values: By ``<set>/<measure>``; the training set is ``train``, several loaders of it ``train/<loader>``.
        centres: Statistics of all training loaders together; None if nothing needed them.
        head: The head then.
    """

    values: dict[str, Tensor]
    centres: Centres | None
    head: Head


class Sweeps:
    """Runs a frozen module over data sets. Nothing is kept from one measurement to the next.

    Args:
        attachment: Holds on to the module.
        measuring: What to read.
        datasets: Loaders by name, beside those of the trainer.
        ood: Names of those that are out of distribution.
    """

    def __init__(
        self, attachment: Attachment, measuring: Measuring, datasets: Mapping[str, Iterable[Any]], ood: Sequence[str]
    ) -> None:
        self._attachment, self._measuring = attachment, measuring
        self._datasets, self._ood = datasets, set(ood) & datasets.keys()
        self._reader: Collection | None = None  # Of the last sweep.
        # Of the last fit, by tag, with the number of batches to which training is held: a validation or test after it
        # needs class means, too.
        self._loaders: dict[str, tuple[Any, int | None]] = {}
        self._most_read = 0

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_reader": None, "_loaders": {}}  # Loaders may not be picklable; both are made again.

    def forget(self) -> None:
        """Forget the training loaders of an earlier fit."""
        self._loaders, self._most_read = {}, 0

    def remember(self, trainer: L.Trainer) -> None:
        """Keep hold of a trainer's training loaders, and of how much training has read of them."""
        if trainer.train_dataloader is not None:
            # A loader without a length is read as far as training has come in its longest epoch.
            self._most_read = max(self._most_read, batches_read(trainer))
            self._loaders = {
                f"train/{name}" if name else "train": (
                    loader,
                    limited_batches(loader, trainer.limit_train_batches, self._most_read),
                )
                for name, loader in name_loaders(trainer.train_dataloader)
            }

    def check(self, trainer: L.Trainer, pl_module: L.LightningModule, training: bool) -> None:
        """Refuse loaders that cannot be swept, before anything runs.

        Raises:
            ValueError: With the reason.
        """
        self.remember(trainer)
        loaders = list(self._loaders.values()) if self._needs_centres(training) else []
        loaders += [(loader, _evaluation_limit(trainer, loader)) for loader in self._datasets.values()]
        for loader, limit in loaders:
            self._attachment.check_loader(trainer, pl_module, loader, limit)

    def _needs_centres(self, training: bool) -> bool:
        return training or bool(self._ood or self._measuring.of_decisions)

    def read(self, trainer: L.Trainer, pl_module: L.LightningModule, training: bool) -> Swept:
        """Read all sets at the weights as they are.

        Args:
            trainer: With the training loaders.
            pl_module: The module.
            training: Whether the training set is read, and not only its class means where others need them.
        """
        trained = self._training(trainer, pl_module) if self._needs_centres(training) else {}
        centres = _together(trained) if trained else None
        sets = {name: (*self._loaders[name], stats) for name, stats in trained.items()} if training else {}
        for name, loader in self._datasets.items():
            limit = _evaluation_limit(trainer, loader)
            stats = self.statistics(trainer, pl_module, loader, name not in self._ood, limit)
            sets[name] = loader, limit, stats
        head, values = self._attachment.whole_head_of(pl_module), {}
        for name, (loader, limit, stats) in sets.items():
            if name in self._ood:
                assert centres is not None
                values[f"{name}/nc5"] = orthogonality(centres[""], stats[""])
                continue
            assert self._reader is not None
            read = self._reader.read(stats)
            if centres is not None and self._measuring.decides(centres):
                decisions = self._measuring.decisions(head, centres)
                self._attachment.sweep(trainer, pl_module, loader, decisions.add, limit)
                read |= decisions.read()
            values |= {f"{name}/{tag}": value for tag, value in read.items()}
        return Swept(values, centres, head)

    def centres(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Centres:
        """Statistics of all training loaders together at the weights as they are.

        Raises:
            ValueError: If the trainer has no training loader.
        """
        return _together(self._training(trainer, pl_module))

    def _training(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Centres]:
        self.remember(trainer)
        if not self._loaders:
            raise UserError(
                "decisions by nearest centre and nc5 need the class means of the training set, and the monitor has "
                "seen none: fit first, or leave them out."
            )
        return {
            name: self.statistics(trainer, pl_module, loader, limit=limit)
            for name, (loader, limit) in self._loaders.items()
        }

    def statistics(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        loader: Any,
        labelled: bool = True,
        limit: int | None = None,
    ) -> Centres:
        """Sweep one loader."""
        collection: list[Collection] = []  # Of one: the head is known from the first batch on.

        def add(kept: dict[str, Tensor], labels: Tensor) -> None:
            if not collection:
                collection.append(self._measuring.collection(self._attachment.head_of(pl_module), self._reader))
            collection[0].add(*((kept, labels) if labelled else self._measuring.unlabelled(kept)))

        self._attachment.sweep(trainer, pl_module, loader, add, limit)
        self._reader = collection[0]
        return collection[0].statistics()


def _together(parts: Mapping[str, Centres]) -> Centres:
    first = next(iter(parts.values()))
    return {name: reduce(ClassStatistics.merge, (stats[name] for stats in parts.values())) for name in first}


def _evaluation_limit(trainer: L.Trainer, loader: Any) -> int | None:
    """Read a loader without a length, which may have no end, no further than Lightning's validation would."""
    limit = trainer.limit_val_batches
    return limit if num_planned_batches(loader) is None and isinstance(limit, int) else None
