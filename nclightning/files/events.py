"""TensorBoard's event files, written through the file layer."""

from __future__ import annotations

import math
import os
import re
import socket
import time
from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path

from nclightning.compat.tensorboard import Event, EventFile, OwnFileWriter, RecordWriter, Summary
from nclightning.files.operations import append, create, make_folder, replaced

__all__ = ["EventRows", "EventWriter", "RunWriter", "write_events"]

_NAME = re.compile(r"events\.out\.tfevents\.(\d+)\.")
_LAYOUTS = ("custom_scalars__", "_hparams_/")
_BUFFERED_BYTES = 1 << 20
_serial = count()


class _EventFile:
    """A replacement for TensorBoard's ``EventFileWriter``, which writes from a separate thread.

    The file is created with the first value, or when ``matters`` is set, so that a run that ends with an error at its
    start leaves no file. TensorBoard reads the files of a folder in the order of their names, which begin with a time
    in seconds. The new name is later than all existing ones, independent of the clock.
    """

    def __init__(self, folder: Path, max_queue: int, flush_secs: float, start: int | None) -> None:
        self.matters = False
        self._folder = folder
        self._max_queue = max_queue
        self._flush_seconds = flush_secs
        self._start = start
        self._path: Path | None = None
        self.discard()
        self.add_event(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def get_logdir(self) -> str:
        return str(self._folder)

    def add_event(self, event: Event) -> None:
        """Add an event, and write the file if enough events or time have accumulated."""
        self.matters = self.matters or self._has_value(event)
        record = _Record()
        RecordWriter(record).write(event.SerializeToString())
        self._waiting += record
        self._count += 1
        late = time.monotonic() - self._since > self._flush_seconds
        if late or self._count > self._max_queue or len(self._waiting) > _BUFFERED_BYTES:
            self.flush()

    def _has_value(self, event: Event) -> bool:
        """Return whether an event has a new value: not a layout, and later than the step from which a run continues."""
        if self._start is not None and event.step <= self._start:
            return False
        return any(not value.tag.startswith(_LAYOUTS) for value in event.summary.value)

    def flush(self) -> None:
        """Write the events in memory to the file, unless it has no value yet."""
        if not self._waiting or not self.matters:
            return
        if self._path is None:
            make_folder(self._folder)
            path = self._folder / _later_name(self._folder)
            create(path, bytes(self._waiting))
            self._path = path
        else:
            append(self._path, bytes(self._waiting))
        self.discard()

    def discard(self) -> None:
        """Drop the events that are not written yet."""
        self._waiting = bytearray()
        self._count = 0
        self._since = time.monotonic()

    close = flush


class _Record(bytearray):
    """A buffer to which TensorBoard writes a record."""

    write = bytearray.extend


def _later_name(folder: Path) -> str:
    """Return the name for a new event file that TensorBoard reads after the files of a folder."""
    seconds = [int(found[1]) for path in folder.iterdir() if (found := _NAME.match(path.name))]
    second = max(int(time.time()), *(each + 1 for each in seconds), 0)
    return f"events.out.tfevents.{second:010d}.{socket.gethostname()}.{os.getpid()}.{next(_serial)}"


def write_events(folder: Path, events: Iterable[Event], suffix: str) -> None:
    """Write a complete event file in one step. TensorBoard reads it after the existing ones.

    Args:
        folder: The folder. It is created if it does not exist.
        events: The events.
        suffix: End of the file's name.

    Raises:
        WriteError: If it cannot be written.
    """
    make_folder(folder)
    records = _records([Event(wall_time=time.time(), file_version="brain.Event:2"), *events])
    # The partial file has another name, because TensorBoard reads every file with "tfevents" in its name.
    with replaced(folder / f"{_later_name(folder)}{suffix}", ".events.partial") as partial:
        partial.write_bytes(records)


class EventRows:
    """A single event file with one event per row of a table.

    Args:
        folder: The folder, which must exist.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "events.out.tfevents.0000000000.rows"

    def begin(self, rows: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Write the file again with the rows of the table, because a killed process may have left it incomplete.

        Raises:
            WriteError: If it cannot be written.
        """
        records = _records([Event(wall_time=time.time(), file_version="brain.Event:2"), *map(_row_event, rows)])
        with replaced(self.path, ".events.partial") as partial:
            partial.write_bytes(records)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add a row.

        Raises:
            WriteError: If it cannot be written.
        """
        append(self.path, _records([_row_event((step, values))]))


def _row_event(row: tuple[int, Mapping[str, float]]) -> Event:
    finite = [Summary.Value(tag=tag, simple_value=value) for tag, value in row[1].items() if math.isfinite(value)]
    return Event(wall_time=time.time(), step=row[0], summary=Summary(value=finite))


def _records(events: Iterable[Event]) -> bytes:
    """Serialise events in TensorBoard's format."""
    records = _Record()
    for event in events:
        RecordWriter(records).write(event.SerializeToString())
    return bytes(records)


class EventWriter(EventFile):
    """Writes summaries to an event file in a folder.

    Args:
        folder: The folder. It is created if it does not exist.
        max_queue: Largest number of events in memory.
        flush_secs: Number of seconds after which the next event is written to the file, with those before it.
        start: Step from which a run continues; None for a new run.
    """

    def __init__(self, folder: Path, max_queue: int = 10, flush_secs: float = 120, start: int | None = None) -> None:
        super().__init__(_EventFile(folder, max_queue, flush_secs, start))


class RunWriter(OwnFileWriter):
    """TensorBoard's writer for a run folder. It creates its file with the first value."""

    def make_event_file(self, max_queue: int, flush_secs: float, start: int | None) -> EventFile:
        """Construct the writer of events; see :class:`EventWriter`."""
        return EventWriter(Path(self.log_dir), max_queue, flush_secs, start)

    @property
    def matters(self) -> bool:
        """Whether the event file is written: from the first value on, or once this is set."""
        matters: bool = self.event_file.event_writer.matters
        return matters

    @matters.setter
    def matters(self, matters: bool) -> None:
        self.event_file.event_writer.matters = matters

    def discard(self) -> None:
        """Drop the events that are not written yet."""
        self.event_file.event_writer.discard()
