"""Evaluation passes that the monitors of a trainer share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from itertools import dropwhile
from typing import Any, TypeVar

import lightning as L

from nclightning.callbacks.either import EitherMonitor
from nclightning.callbacks.publishing import HookingMonitor
from nclightning.compat.twins import only_looks
from nclightning.probe.evaluation import Gatherer, evaluate
from nclightning.probe.host import Host
from nclightning.probe.sets import DataSet, gather_alone
from nclightning.probe.sweep import TraceError

__all__ = ["SharingMonitor"]

AnyGatherer = TypeVar("AnyGatherer", bound=Gatherer)


class SharingMonitor(HookingMonitor):
    """Base of monitors that make passes over training sets at ends of epochs.

    A pass is made for all of them whose turns follow each other. A callback of the user's that has its turn between two
    of them ends that: it may change weights, data, or anything else that the module and its data set consist of.
    """

    def __init__(self) -> None:
        super().__init__()
        self._gathered: list[tuple[tuple[int, int], DataSet, Gatherer]] = []

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_gathered": []}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget what was gathered in a fit that an error ended."""
        self._gathered = []
        super().on_fit_start(trainer, pl_module)

    @abstractmethod
    def gathers(self, trainer: L.Trainer, data: DataSet) -> bool:
        """Whether it is about to gather something of a training set at the end of this epoch."""

    @abstractmethod
    def gatherer(self) -> Gatherer:
        """Start gathering it."""

    def gather_shared(
        self, trainer: L.Trainer, host: Host, data: DataSet, make: Callable[[], AnyGatherer]
    ) -> AnyGatherer:
        """Make a pass over a data set at the end of an epoch, unless another monitor has just made it.

        Args:
            trainer: Of the epoch.
            host: Of the module.
            data: Of the pass.
            make: Makes what gathers.

        Returns:
            What has gathered.
        """
        now = trainer.current_epoch, trainer.global_step
        waiting = [each for each in self._gathered if each[0] == now]
        of_this = next((each for each in waiting if each[1].is_same(data)), None)
        self._gathered = [each for each in waiting if each is not of_this]
        if of_this is not None:
            return of_this[2]  # type: ignore[return-value]
        others = list(self._next(trainer, data))
        if not others:
            return gather_alone(host, data, make)
        made, theirs = make(), [each.gatherer() for each in others]
        try:
            evaluate(host, data.loader, [made, *theirs], data.limit)
        except TraceError:
            raise
        except Exception:  # Perhaps of another monitor, which is to say so itself.
            return gather_alone(host, data, make)
        for other, gatherer in zip(others, theirs, strict=True):
            other._gathered.append((now, data, gatherer))
        return made

    def _next(self, trainer: L.Trainer, data: DataSet) -> Iterator[SharingMonitor]:
        """Yield the monitors that want the same data and have their turns next in the hook that runs."""
        turns = dropwhile(lambda callback: callback is not self, _turns(trainer))
        next(turns, None)
        for callback in turns:
            if not only_looks(callback, "on_train_epoch_end"):
                return
            if isinstance(callback, SharingMonitor) and callback.gathers(trainer, data):
                yield callback

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave no hook behind, and forget what was gathered."""
        super().teardown(trainer, pl_module, stage)
        self._gathered = []


def _turns(trainer: L.Trainer) -> Iterator[L.Callback]:
    """Yield callbacks in the order in which their ``on_train_epoch_end`` run."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, EitherMonitor) and only_looks(callback, "on_train_epoch_end"):
            yield from callback.parts
        else:
            yield callback
