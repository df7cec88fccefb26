"""Undocumented names of TensorBoard, and of torch's writer for it.

TensorBoard documents how to write summaries with TensorFlow, and how to view them. The content of its files is defined
by its protocol buffers.

Non-public: ``tensorboard.compat.proto.event_pb2``, ``tensorboard.compat.proto.summary_pb2``,
``tensorboard.summary.writer.record_writer`` (tensorboard 2.21). torch imports the same. Without them there would be one
event for each value instead of one for each row, five times slower, and no event file that appears in one step.
"""

from __future__ import annotations

from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.writer import FileWriter, SummaryWriter

__all__ = ["Event", "EventFile", "OwnFileWriter", "RecordWriter", "SessionLog", "Summary"]


class EventFile(FileWriter):
    """A writer that converts summaries to events, and passes them to any object that accepts events.

    Non-public: ``torch.utils.tensorboard.writer.FileWriter`` and its ``event_writer`` (torch 2.13). Without it event
    files would be written in a separate thread of TensorBoard, whose errors, such as a full disk, are lost.

    Args:
        event_writer: An object with ``add_event``, ``flush``, ``close`` and ``get_logdir``.
    """

    def __init__(self, event_writer: Any) -> None:
        self.event_writer = event_writer


class OwnFileWriter(SummaryWriter):
    """TensorBoard's writer with an :class:`EventFile`.

    Non-public: ``SummaryWriter._get_file_writer`` and the attributes ``file_writer``, ``all_writers``, ``purge_step``,
    ``max_queue`` and ``flush_secs`` (torch 2.13). Without them a run that ends with an error at its start
    would leave an event file, and rows would be written value by value.
    """

    def make_event_file(self, max_queue: int, flush_secs: float, start: int | None) -> EventFile:
        """Construct the writer of events.

        Args:
            max_queue: Largest number of events in memory.
            flush_secs: Number of seconds after which the next event is written to the file, with those before it.
            start: Step from which a run continues; None for a new run.
        """
        raise NotImplementedError

    @property
    def event_file(self: Any) -> EventFile:
        """The writer of events."""
        file: EventFile = self._get_file_writer()
        return file

    def _get_file_writer(self: Any) -> Any:
        """Return the writer of events, and construct it at first use."""
        if self.file_writer is None:
            start, self.purge_step = self.purge_step, None
            self.file_writer = self.make_event_file(self.max_queue, self.flush_secs, start)
            self.all_writers = {self.log_dir: self.file_writer}
            if start is not None:
                self.file_writer.add_event(Event(step=start, session_log=SessionLog(status=SessionLog.START)))
        return self.file_writer
