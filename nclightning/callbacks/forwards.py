"""Readings from the ordinary forwards of a stage."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch import Tensor

from nclightning.callbacks.attach import Attachment, name_loaders
from nclightning.callbacks.collection import Centres, Collection, Decisions, Measuring, orthogonality
from nclightning.features import Taps
from nclightning.ranks import raise_together
from nclightning.sharding import reshard
from nclightning.sweep import num_own_samples

__all__ = ["ForwardPass"]


class ForwardPass:
    """Collects the features of one pass over the loaders of a stage.

    Args:
        attachment: Holds on to the module.
        measuring: What to read.
        ood: Names of loaders that are out of distribution.
        centres: Statistics of the training set for decisions by nearest centre and NC5; None leaves both out.
    """

    def __init__(
        self, attachment: Attachment, measuring: Measuring, ood: tuple[str, ...] = (), centres: Centres | None = None
    ) -> None:
        self._attachment, self._measuring = attachment, measuring
        self._ood, self._centres = ood, centres
        self._taps: Taps | None = None
        self._failure: Exception | None = None
        self._collections: dict[str, Collection] = {}
        self._decisions: dict[str, Decisions] = {}
        self._places: dict[int, tuple[str, int | None]] = {}

    @property
    def hooked(self) -> bool:
        """Whether the module is hooked, or need not be any more."""
        return self._taps is not None or self._failure is not None

    def hook(self, pl_module: L.LightningModule, batch: Any) -> None:
        """Hook the module before its first batch."""
        self._taps = self._attachment.tap(pl_module, self._attachment.split(batch)[0])

    def collect(self, pl_module: L.LightningModule, batch: Any, loaders: Any, index: int = 0) -> None:
        """Take the features of the batch that just ran."""
        if self._failure is not None:
            return
        assert self._taps is not None
        kept, labels = self._taps.take(), self._attachment.split(batch)[1]
        if index not in self._places:
            self._places[index] = self._open(pl_module, *list(name_loaders(loaders))[index])
        name, num_own = self._places[index]
        if name in self._ood:
            kept, labels = self._measuring.unlabelled(kept)
        self._collections[name].add(kept, labels, num_own)
        if name in self._decisions:
            self._decisions[name].add(kept, labels, num_own)

    def _open(self, pl_module: L.LightningModule, name: str, loader: Any) -> tuple[str, int | None]:
        """Start reading a loader; return its name and how many of its samples are no duplicates."""
        head = self._attachment.head_of(pl_module)
        self._collections[name] = self._measuring.collection(head)
        if self._centres is not None and self._measuring.decides(self._centres) and name not in self._ood:
            whole = self._attachment.whole_head_of(pl_module)
            self._decisions[name] = self._measuring.decisions(whole, self._centres)
        return name, num_own_samples(loader)

    def read(self, pl_module: L.LightningModule) -> dict[str, Tensor]:
        """Evaluate all measures, with the name of the loader in the tag where there are several.

        Raises:
            Exception: On all processes, if one of them failed on the way.
        """
        self.remove()
        raise_together(self._failure, pl_module.device)
        reshard(pl_module)  # The head in its own precision, not in that of the last forward.
        values: dict[str, Tensor] = {}
        for name, collection in self._collections.items():
            stats = collection.statistics()
            if name in self._ood:
                read = {} if self._centres is None else {"nc5": orthogonality(self._centres[""], stats[""])}
            else:
                read = collection.read(stats)
            if name in self._decisions:
                read |= self._decisions[name].read()
            values |= {f"{name}/{tag}" if name else tag: value for tag, value in read.items()}
        return values

    def fail(self, error: Exception) -> None:
        """Give up; the others hear of it when they read."""
        self.remove()
        self._failure = error

    def remove(self) -> None:
        """Remove the hooks."""
        if self._taps is not None:
            self._taps.remove()
        self._taps = None
