"""TensorBoard's event files, written through this layer."""

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
    """Stands in for TensorBoard's ``EventFileWriter``, which writes from a thread of its own.

    The file is made when there is something in it that matters, or the writer is told that it does: a run that is
    refused leaves none. TensorBoard reads the files of a folder by name, which begins with a second: the name is later
    than all that are there, whatever the clock says.
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
        self.matters = self.matters or self._has_value(event)
        record = _Record()
        RecordWriter(record).write(event.SerializeToString())
        self._waiting += record
        self._count += 1
        late = time.monotonic() - self._since > self._flush_seconds
        if late or self._count > self._max_queue or len(self._waiting) > _BUFFERED_BYTES:
            self.flush()

    def _has_value(self, event: Event) -> bool:
        """Whether an event holds a value that is not there yet: no layout, and nothing from where the run goes on."""
        if self._start is not None and event.step <= self._start:
            return False
        return any(not value.tag.startswith(_LAYOUTS) for value in event.summary.value)

    def flush(self) -> None:
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
        """Forget what waits."""
        self._waiting = bytearray()
        self._count = 0
        self._since = time.monotonic()

    close = flush


class _Record(bytearray):
    """Where TensorBoard puts a record."""

    write = bytearray.extend


def _later_name(folder: Path) -> str:
    """Name for a new event file that TensorBoard reads after those of a folder."""
    seconds = [int(found[1]) for path in folder.iterdir() if (found := _NAME.match(path.name))]
    second = max(int(time.time()), *(each + 1 for each in seconds), 0)
    return f"events.out.tfevents.{second:010d}.{socket.gethostname()}.{os.getpid()}.{next(_serial)}"


def write_events(folder: Path, events: Iterable[Event], suffix: str) -> None:
    """Write a whole event file, which appears in one step and is read after those that are there.

    Args:
        folder: Made if it is not there.
        events: Its content.
        suffix: End of its name.

    Raises:
        WriteError: If the disk refuses.
    """
    make_folder(folder)
    records = _records([Event(wall_time=time.time(), file_version="brain.Event:2"), *events])
    # TensorBoard reads whatever has "tfevents" in its name.
    with replaced(folder / f"{_later_name(folder)}{suffix}", ".events.partial") as partial:
        partial.write_bytes(records)


class EventRows:
    """The one event file of a folder whose rows are kept in a table: of each row one event.

    Args:
        folder: It exists.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "events.out.tfevents.0000000000.rows"

    def begin(self, rows: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Write the file anew with the rows of the table: what a kill has left of it may be short, or torn.

        Raises:
            WriteError: If the disk refuses.
        """
        records = _records([Event(wall_time=time.time(), file_version="brain.Event:2"), *map(_row_event, rows)])
        with replaced(self.path, ".events.partial") as partial:
            partial.write_bytes(records)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add a row.

        Raises:
            WriteError: If the disk refuses.
        """
        append(self.path, _records([_row_event((step, values))]))


def _row_event(row: tuple[int, Mapping[str, float]]) -> Event:
    finite = [Summary.Value(tag=tag, simple_value=value) for tag, value in row[1].items() if math.isfinite(value)]
    return Event(wall_time=time.time(), step=row[0], summary=Summary(value=finite))


def _records(events: Iterable[Event]) -> bytes:
    records = _Record()
    for event in events:
        RecordWriter(records).write(event.SerializeToString())
    return bytes(records)


class EventWriter(EventFile):
    """Writes summaries to an event file in a folder.

    Args:
        folder: Made if it is not there.
        max_queue: Events that wait at most before they are written.
        flush_secs: For so long at most, once others come.
        start: Step from which a run goes on; None for a new one.
    """

    def __init__(self, folder: Path, max_queue: int = 10, flush_secs: float = 120, start: int | None = None) -> None:
        super().__init__(_EventFile(folder, max_queue, flush_secs, start))


class RunWriter(OwnFileWriter):
    """TensorBoard's writer for a run folder, which makes its file with the first value."""

    def make_event_file(self, max_queue: int, flush_secs: float, start: int | None) -> EventFile:
        """Make what summaries are written to; see :class:`EventWriter`."""
        return EventWriter(Path(self.log_dir), max_queue, flush_secs, start)

    @property
    def matters(self) -> bool:
        """Whether the event file is to be written: with its first value, or once this is set."""
        matters: bool = self.event_file.event_writer.matters
        return matters

    @matters.setter
    def matters(self, matters: bool) -> None:
        self.event_file.event_writer.matters = matters

    def discard(self) -> None:
        """Forget what was not written."""
        self.event_file.event_writer.discard()
