"""Measurement from the forwards of a training epoch, in the user's own loop."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Literal, TypeVar

from torch.utils.data import DataLoader

from nclightning.compat.fabric import loader_of_fabric
from nclightning.errors import UserError
from nclightning.probe.building import Conventions, build
from nclightning.probe.collectors import Measuring
from nclightning.probe.host import PlainHost, moved
from nclightning.probe.reader import PairReader
from nclightning.probe.results import Measurement
from nclightning.probe.step_measurement import StepMeasurement
from nclightning.probe.sweep import num_own_samples
from nclightning.ranks import rank_zero_warn, wait_for_all

__all__ = ["OnlineEpoch"]

Batch = TypeVar("Batch")


class OnlineEpoch:
    """A block in which the features of one training epoch are collected. :meth:`Probe.online` returns it.

    Args:
        host: The host of the model.
        reader: Reader of features and labels.
        measuring: The measures to evaluate.
        conventions: Conventions of NC1.
        active_epochs: The epochs of the same probe whose blocks are running; this one adds itself.
    """

    def __init__(
        self,
        host: PlainHost,
        reader: PairReader,
        measuring: Measuring,
        conventions: Conventions,
        active_epochs: list[OnlineEpoch],
    ) -> None:
        self._host, self._reader, self._conventions, self._active_epochs = host, reader, conventions, active_epochs
        self._steps = StepMeasurement(reader, measuring, online=True)
        self._state: Literal["new", "open", "failed", "over"] = "new"
        self._loader: Any = None
        self._runs_step = False
        self._num_measured = self._num_left_out = 0
        self._failure: Exception | None = None
        self._measurement: Measurement | None = None

    @property
    def measurement(self) -> Measurement:
        """The measurement of the epoch, with the head at the end of the block.

        Raises:
            ValueError: Before the end of the block, or if the block ended with an error.
        """
        if self._measurement is None:
            when = "after" if self._state != "failed" else "only if no error ended"
            raise UserError(f"there is a measurement {when} the block 'with probe.online() as epoch:'.")
        return self._measurement

    def __enter__(self) -> OnlineEpoch:
        if self._state != "new":
            raise UserError("a block measures one epoch: call probe.online() again for each epoch.")
        if self._active_epochs:
            raise UserError("this probe is already measuring an epoch: end that block first, or make another Probe.")
        self._active_epochs.append(self)
        self._state, self._start = "open", time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._leave()
                self._measurement = self._read()
        finally:
            self._state = "failed" if self._measurement is None else "over"
            self._steps.remove()
            self._active_epochs.clear()

    def batches(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches of the epoch on the device of the model, and collect the features of each.

        The loop must run the model on each batch as it is. If it runs the model several times between one batch and the
        next, the first forward on the batch itself counts.

        Args:
            loader: The training loader: a ``DataLoader``, or any iterable of batches. With several processes, pass the
                loader itself, because only it shows which samples are repeated at its end.

        Raises:
            ValueError: Outside of the block, or for a second loader in the same block.
        """
        self._check_open()
        if self._loader is not None:
            raise UserError(
                "epoch.batches was called twice in a block, which measures one pass over one loader: call "
                "probe.online() again for each epoch, and leave validation loaders as they are."
            )
        self._loader = loader_of_fabric(loader)
        if self._host.world_size > 1 and not isinstance(self._loader, DataLoader):
            rank_zero_warn(
                f"a {type(loader).__name__} does not show which samples a distributed sampler repeats at its end, so "
                "that they count twice: pass the loader itself to epoch.batches, and wrap what that returns."
            )
        return self._steps_over(loader)

    def _steps_over(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Yield batches, and collect the features of each after its step."""
        for batch in loader:
            self._check_open()
            here: Batch = moved(batch, self._host.device)
            self._steps.hook(self._host, self._host.converted(here))
            self._runs_step = True
            try:
                yield here
            except GeneratorExit:  # The loop ended early, by a break or an error.
                try:
                    self._leave()
                except Exception as error:  # Raised later, because Python would only print it here.
                    self._failure = error
                raise
            self._check_open()
            self._end_step()

    def _check_open(self) -> None:
        if self._state != "open":
            raise UserError("epoch.batches must be used inside the block 'with probe.online() as epoch:'.")

    def _leave(self) -> None:
        """End the last step of a loop that ended early, if the model ran in it."""
        if self._state == "open" and self._runs_step and not self._steps.is_idle:
            self._end_step()
        self._runs_step = False

    def _end_step(self) -> None:
        """Collect the features of the step, or count the batch as left out."""
        self._runs_step = False
        if not self._steps.is_idle:
            self._steps.collect(self._host, loader=self._loader)
            self._num_measured += 1
        elif num_own_samples(self._loader) is None:
            self._num_left_out += 1  # For example a batch that the loop skips.
        else:
            raise UserError(
                f"{type(self._host.module).__name__} did not run on a batch, so that samples that the distributed "
                "sampler repeats cannot be identified: use Probe.read, or run the model on each batch."
            )

    def _read(self) -> Measurement:
        """Return the measurement of the epoch. All processes must call it."""
        title = type(self._host.module).__name__
        wait_for_all("the end of a block of Probe.online", "Let all processes enter it.")
        if self._failure is not None:
            self._steps.fail(self._failure)
        elif not self._num_measured:
            self._steps.fail(self._refusal(title))
        elif self._num_left_out:
            rank_zero_warn(
                f"{title} ran on {self._num_measured} batches of the epoch, which were measured, and not on "
                f"{self._num_left_out}, which were left out."
            )
        values = self._steps.read(self._host)
        statistics, head = self._steps.statistics[""], self._reader.head_snapshot(self._host.module)
        return build(statistics, values, {}, head, self._conventions, self._start)

    def _refusal(self, title: str) -> UserError:
        """Return the error for an epoch in which no batch was measured."""
        reason = (
            f"{title} did not run on any of {self._num_left_out} batches: let the loop run the model of the probe "
            "itself, neither a copy nor torch.compile of it, on each before it takes the next; or use Probe.read."
            if self._num_left_out
            else "it yielded no batch: write 'for batch in epoch.batches(loader):' around the steps."
        )
        return UserError(f"the block 'with probe.online() as epoch:' has no measurement: {reason}")
