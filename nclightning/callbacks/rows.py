"""The rows of a run: where values wait for the others of their iterate, and how they reach the loggers."""

from __future__ import annotations

import math
from collections.abc import Set
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from nclightning.callbacks.publishing import as_metrics
from nclightning.errors import UserError, say_the_same
from nclightning.interrupts import deferred_interrupt
from nclightning.loggers import RunLogger
from nclightning.quantities import log10_tag
from nclightning.sending import send_rows

__all__ = ["Rows"]


class Rows:
    """The rows of one trainer's table: one for each iterate, with the values of all its monitors.

    A row is complete, and goes to the loggers, once nothing reads at its iterate any more: when the next iteration is
    done, or training has ended for all readers. It is kept until every logger has taken it.
    """

    _by_trainer: ClassVar[WeakKeyDictionary[L.Trainer, Rows]] = WeakKeyDictionary()

    def __init__(self) -> None:
        self._rows: dict[int, dict[str, Tensor | float]] = {}
        self._log10_tags: set[str] = set()
        self._last: dict[str, float] = {}
        self._logged: WeakKeyDictionary[Logger, int] = WeakKeyDictionary()  # The last iteration that each has.
        self._complete_to = -1
        self._readers: set[Any] = set()  # Those that may still read at the last iterate.

    @classmethod
    def of(cls, trainer: L.Trainer) -> Rows:
        """Return the trainer's rows."""
        return cls._by_trainer.setdefault(trainer, cls())

    def begin(self, reader: Any) -> None:
        """Wait for a reader from here on: the last row is complete once all have ended."""
        self._readers.add(reader)

    def end(self, reader: Any) -> None:
        """Note that a reader has read the last iterate of a fit."""
        self._readers.discard(reader)

    def add(self, iteration: int, values: dict[str, Tensor | float], log10_tags: Set[str] = frozenset()) -> None:
        """Add values to the row of an iterate.

        Args:
            iteration: Of the iterate.
            values: By tag; tensors are scalars and may stay on their device.
            log10_tags: Tags that are logged a second time as ``log10/<tag>``.

        Raises:
            ValueError: If the row is with the loggers already.
        """
        if iteration <= self._complete_to:
            raise UserError(
                f"values of iteration {iteration} ({', '.join(values)}) came after its row was complete: add them in "
                "on_iteration_end, those of the last iterate in on_train_end at the latest."
            )
        self._rows.setdefault(iteration, {}).update(values)
        self._log10_tags |= log10_tags

    def value(self, iteration: int, tag: str) -> Tensor | float:
        """Return a value that waits."""
        return self._rows[iteration][tag]

    def latest(self, tags: Set[str]) -> dict[str, float]:
        """Return the last value of each tag, also of those that wait."""
        self._bring_to_host()
        return {tag: value for tag, value in self._last.items() if tag in tags}

    def flush(self, trainer: L.Trainer) -> None:
        """Log the rows that are complete; the values of all rows are then in ``trainer.callback_metrics``."""
        self._flush(trainer, trainer.global_step if self._readers else math.inf)

    def save(self, trainer: L.Trainer) -> None:
        """Log the rows that are complete, and have all loggers write to disk what they have."""
        self.flush(trainer)
        for logger in trainer.loggers:
            logger.save()

    def rescue(self, trainer: L.Trainer, exception: BaseException | None = None) -> None:
        """Log all rows, complete or not, when a fit ends in an exception; say what could not be written.

        Args:
            trainer: Whose fit ended.
            exception: Why. An error that is its cause is not said twice.
        """
        try:
            self._flush(trainer, math.inf)
            for logger in trainer.loggers:
                logger.save()
        except Exception as error:
            if not say_the_same(error, exception):
                rank_zero_warn(f"the last readings could not be written: {error}")

    def _flush(self, trainer: L.Trainer, end: float) -> None:
        if not self._rows:
            return
        with deferred_interrupt():
            if arrived := self._bring_to_host():
                trainer.callback_metrics.update(as_metrics(arrived))
            complete = {iteration: row for iteration, row in self._rows.items() if iteration < end}
            if not complete:
                return
            self._complete_to = max(complete)
            failures = [error for logger in trainer.loggers if (error := self._log(logger, complete)) is not None]
            if failures:
                raise failures[0]
            for iteration in complete:
                del self._rows[iteration]

    def _log(self, logger: Logger, rows: dict[int, dict[str, Any]]) -> Exception | None:
        """Log what a logger does not have yet. An error is returned: the other loggers have their turn first."""
        logged = self._logged.get(logger, -1)
        missing = [(iteration, row | self._logarithms(row)) for iteration, row in rows.items() if iteration > logged]
        try:
            if isinstance(logger, RunLogger):
                logger.log_rows(missing)
                self._logged[logger] = max(logged, self._complete_to)
            else:
                for iteration in send_rows(logger, missing):
                    self._logged[logger] = iteration
        except Exception as error:
            return error
        return None

    def _bring_to_host(self) -> dict[str, float]:
        """Transfer what is on the device, in one go; return the last value of each tag in the rows that wait."""
        waiting = [v.double() for row in self._rows.values() for v in row.values() if isinstance(v, Tensor)]
        arrived = iter(torch.stack(waiting).tolist() if waiting else [])
        values: dict[str, float] = {}
        for row in self._rows.values():
            on_host = {tag: next(arrived) if isinstance(v, Tensor) else float(v) for tag, v in row.items()}
            row.update(on_host)
            values |= on_host | self._logarithms(on_host)
        self._last |= values
        return values

    def _logarithms(self, row: dict[str, Any]) -> dict[str, float]:
        return {log10_tag(tag): _log10(value) for tag, value in row.items() if tag in self._log10_tags}


def _log10(value: float) -> float:
    if value > 0:
        return math.log10(value)
    return -math.inf if value == 0 else math.nan
