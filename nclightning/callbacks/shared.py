"""Evaluation passes that the monitors of a trainer share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Protocol, TypeVar
from weakref import WeakKeyDictionary

import lightning as L

from nclightning.probe.evaluation import Gatherer, evaluate
from nclightning.probe.host import Host
from nclightning.probe.sets import DataSet, gather_alone
from nclightning.probe.sweep import TraceError, fingerprint_together
from nclightning.ranks import count_over_ranks

__all__ = ["SharedPasses", "Sharer"]

AnyGatherer = TypeVar("AnyGatherer", bound=Gatherer)


class Sharer(Protocol):
    """A monitor that makes evaluation passes over training sets."""

    def gathers(self, trainer: L.Trainer, data: DataSet) -> bool:
        """Whether it is about to gather something of a training set at the end of this epoch."""

    def gatherer(self) -> Gatherer:
        """Start gathering it."""


class SharedPasses:
    """Makes the passes of one monitor, and lets those of its trainer whose turn comes later take part.

    What a pass has gathered for another monitor counts only if no weight and no buffer has changed when its turn comes.

    Args:
        owner: The monitor.
    """

    _by_trainer: ClassVar[WeakKeyDictionary[L.Trainer, list[SharedPasses]]] = WeakKeyDictionary()

    def __init__(self, owner: Sharer) -> None:
        self._owner = owner
        self._trainer: L.Trainer | None = None
        self._gathered: list[tuple[DataSet, tuple[int, ...], Gatherer]] = []

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_trainer": None, "_gathered": []}

    def join(self, trainer: L.Trainer) -> None:
        """Take part in the passes of a trainer."""
        self.leave()
        self._trainer = trainer
        self._by_trainer.setdefault(trainer, []).append(self)

    def leave(self) -> None:
        """Do so no more."""
        if self._trainer is not None:
            self._by_trainer[self._trainer].remove(self)
        self._trainer, self._gathered = None, []

    def gather(self, host: Host, data: DataSet, make: Callable[[], AnyGatherer]) -> AnyGatherer:
        """Make a pass over a data set at the end of an epoch, unless another monitor has just made it.

        Args:
            host: Of the module.
            data: Of the pass.
            make: Makes what gathers.

        Returns:
            What has gathered.
        """
        gathered, self._gathered = self._gathered, []
        of_this = [each for each in gathered if each[0].is_same(data)]
        others = self._others(data)
        weights = self._weights(host) if of_this or others else ()
        if of_this and not count_over_ranks(int(of_this[0][1] != weights), host.device):
            self._gathered = [each for each in gathered if each is not of_this[0]]
            return of_this[0][2]  # type: ignore[return-value]
        if not others:
            return gather_alone(host, data, make)
        made, theirs = make(), [each._owner.gatherer() for each in others]
        try:
            evaluate(host, data.loader, [made, *theirs], data.limit)
        except TraceError:
            raise
        except Exception:  # Perhaps of another monitor, which is to say so itself.
            return gather_alone(host, data, make)
        for other, gatherer in zip(others, theirs, strict=True):
            other._gathered.append((data, weights, gatherer))
        return made

    def _others(self, data: DataSet) -> list[SharedPasses]:
        """Return the monitors whose turn comes later in the hook that runs, and who want the same data."""
        trainer = self._trainer
        if trainer is None:
            return []
        joined = self._by_trainer[trainer]
        return [each for each in joined[joined.index(self) + 1 :] if each._owner.gathers(trainer, data)]

    @staticmethod
    def _weights(host: Host) -> tuple[int, ...]:
        return fingerprint_together((*host.module.parameters(), *host.module.buffers()))
