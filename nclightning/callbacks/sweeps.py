"""Readings from passes of their own over the training set and further ones."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from typing import Any

import lightning as L
from torch import Tensor

from nclightning.callbacks.attach import Attachment, name_loaders
from nclightning.callbacks.collection import Centres, Collection, Measuring, orthogonality
from nclightning.functional import ClassStatistics

__all__ = ["Sweeps"]


class Sweeps:
    """Runs a frozen module over data sets.

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
        self._loaders: Any = None  # Of the last fit: a validation or test after it may be of other weights.
        # Training loaders with their statistics, by tag, and the module and its version for which they are good.
        self._swept: tuple[tuple[Any, int, int], dict[str, tuple[Any, Centres]]] | None = None

    def remember(self, trainer: L.Trainer) -> None:
        """Keep hold of a trainer's training loaders."""
        if trainer.train_dataloader is not None:
            self._loaders = trainer.train_dataloader

    def __getstate__(self) -> dict[str, Any]:
        # A weak reference cannot be pickled; the rest is made again.
        return vars(self) | {"_reader": None, "_swept": None, "_loaders": None}

    def read(self, trainer: L.Trainer, pl_module: L.LightningModule, training: bool) -> dict[str, Tensor]:
        """Read all sets.

        Args:
            trainer: With the training loaders.
            pl_module: The module.
            training: Whether the training set is read, and not only its class means where others need them.

        Returns:
            Values by ``<set>/<measure>``; the training set is ``train``, several loaders of it ``train/<loader>``.
        """
        self._swept = None  # Fused optimizers change weights without their versions: reuse within one reading only.
        sets = dict(self._training(trainer, pl_module)) if training else {}
        for name, loader in self._datasets.items():
            sets[name] = loader, self.statistics(trainer, pl_module, loader, name not in self._ood)
        needed = training or self._ood or self._measuring.of_decisions
        centres = self.centres(trainer, pl_module) if needed else None
        head, values = self._attachment.whole_head_of(pl_module), {}
        for name, (loader, stats) in sets.items():
            if name in self._ood:
                assert centres is not None
                values[f"{name}/nc5"] = orthogonality(centres[""], stats[""])
                continue
            assert self._reader is not None
            read = self._reader.read(stats)
            if centres is not None and self._measuring.decides(centres):
                decisions = self._measuring.decisions(head, centres)
                self._attachment.sweep(trainer, pl_module, loader, decisions.add)
                read |= decisions.read()
            values |= {f"{name}/{tag}": value for tag, value in read.items()}
        return values

    def centres(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Centres:
        """Statistics of all training loaders together at the weights as they are.

        Raises:
            ValueError: If the trainer has no training loader.
        """
        parts = [stats for _, stats in self._training(trainer, pl_module).values()]
        return {name: reduce(ClassStatistics.merge, (stats[name] for stats in parts)) for name in parts[0]}

    def _training(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, tuple[Any, Centres]]:
        """Sweep the training loaders, unless that was done at these weights."""
        version = sum(parameter._version for parameter in pl_module.parameters())
        key = weakref.ref(pl_module), trainer.global_step, version
        if self._swept is None or self._swept[0] != key:
            self.remember(trainer)
            if self._loaders is None:
                raise ValueError(
                    "decisions by nearest centre and nc5 need the class means of the training set, and the monitor has "
                    "seen none: fit first, or leave them out."
                )
            swept = {}
            for name, loader in name_loaders(self._loaders):
                swept[f"train/{name}" if name else "train"] = loader, self.statistics(trainer, pl_module, loader)
            self._swept = key, swept
        return self._swept[1]

    def statistics(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loader: Any, labelled: bool = True
    ) -> Centres:
        """Sweep one loader."""
        collection: list[Collection] = []  # Of one: the head is known from the first batch on.

        def add(kept: dict[str, Tensor], labels: Tensor) -> None:
            if not collection:
                collection.append(self._measuring.collection(self._attachment.head_of(pl_module), self._reader))
            collection[0].add(*((kept, labels) if labelled else self._measuring.unlabelled(kept)))

        self._attachment.sweep(trainer, pl_module, loader, add)
        self._reader = collection[0]
        return collection[0].statistics()
