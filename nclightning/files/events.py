"""TensorBoard's event files, written through this layer."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.writer import FileWriter, SummaryWriter

from nclightning.files.operations import append, create, make_folder, replaced

__all__ = ["EventWriter", "RunWriter", "write_events"]

_NAME = re.compile(r"events\.out\.tfevents\.(\d+)\.")
_BUFFERED_BYTES = 1 << 20
_serial = count()


class _EventFile:
    """Stands in for TensorBoard's ``EventFileWriter``, which writes from a thread of its own.

    The file is made with the first bytes that reach it: a run that is refused leaves none. TensorBoard reads the files
    of a folder by name, which begins with a second: the name is later than all that are there, whatever the clock says.
    """

    def __init__(self, folder: Path, max_queue: int, flush_secs: float) -> None:
        self._folder = folder
        self._max_queue = max_queue
        self._flush_seconds = flush_secs
        self._path: Path | None = None
        self._clear()
        self.add_event(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def _clear(self) -> None:
        self._waiting = bytearray()
        self._count = 0
        self._since = time.monotonic()

    def get_logdir(self) -> str:
        return str(self._folder)

    def add_event(self, event: Event) -> None:
        record = _Record()
        RecordWriter(record).write(event.SerializeToString())
        self._waiting += record
        self._count += 1
        late = time.monotonic() - self._since > self._flush_seconds
        if late or self._count > self._max_queue or len(self._waiting) > _BUFFERED_BYTES:
            self.flush()

    def flush(self) -> None:
        if not self._waiting:
            return
        if self._path is None:
            make_folder(self._folder)
            path = self._folder / _later_name(self._folder)
            create(path, bytes(self._waiting))
            self._path = path
        else:
            append(self._path, bytes(self._waiting))
        self._clear()

    def discard(self) -> None:
        """Forget what waits."""
        self._clear()

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
    records = _Record()
    for event in (Event(wall_time=time.time(), file_version="brain.Event:2"), *events):
        RecordWriter(records).write(event.SerializeToString())
    # TensorBoard reads whatever has "tfevents" in its name.
    with replaced(folder / f"{_later_name(folder)}{suffix}", ".events.partial") as partial:
        partial.write_bytes(records)


class EventWriter(FileWriter):
    """Writes summaries to an event file in a folder.

    Args:
        folder: Made if it is not there.
        max_queue: Events that wait at most before they are written.
        flush_secs: For so long at most, once others come.
    """

    def __init__(self, folder: Path, max_queue: int = 10, flush_secs: float = 120) -> None:
        self.event_writer = _EventFile(folder, max_queue, flush_secs)

    def discard(self) -> None:
        """Forget what was not written yet."""
        self.event_writer.discard()


class RunWriter(SummaryWriter):
    """TensorBoard's writer for a run folder."""

    def _get_file_writer(self: Any) -> Any:
        """Make the writer, as torch's own method does."""
        if self.file_writer is None:
            self.file_writer = EventWriter(Path(self.log_dir), self.max_queue, self.flush_secs)
            self.all_writers = {self.log_dir: self.file_writer}
            if self.purge_step is not None:
                start = SessionLog(status=SessionLog.START)
                self.file_writer.add_event(Event(step=self.purge_step, session_log=start))
                self.purge_step = None
        return self.file_writer

    def discard(self: Any) -> None:
        """Forget what was not written yet."""
        if self.file_writer is not None:
            self.file_writer.discard()
