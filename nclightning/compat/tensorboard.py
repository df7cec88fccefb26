"""Names of TensorBoard, and of torch's writer for it, that their documentation does not promise.

TensorBoard documents how to write summaries with TensorFlow and how to look at them; what its files hold is documented
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
    """Turns summaries into events for anything that takes them.

    Non-public: ``torch.utils.tensorboard.writer.FileWriter`` and its ``event_writer`` (torch 2.13). Without it event
    files would be written from a thread of TensorBoard's own, whose errors, such as a full disk, nobody hears.

    Args:
        event_writer: With ``add_event``, ``flush``, ``close`` and ``get_logdir``.
    """

    def __init__(self, event_writer: Any) -> None:
        self.event_writer = event_writer


class OwnFileWriter(SummaryWriter):
    """TensorBoard's writer with an :class:`EventFile` of its own.

    Non-public: ``SummaryWriter._get_file_writer`` and the attributes ``file_writer``, ``all_writers``, ``purge_step``,
    ``max_queue`` and ``flush_secs`` (torch 2.13). Without them a run that is refused at its start would leave an event
    file, and rows would be written value by value.
    """

    def make_event_file(self, max_queue: int, flush_secs: float, start: int | None) -> EventFile:
        """Make what summaries are written to.

        Args:
            max_queue: Events that wait at most.
            flush_secs: For so long at most.
            start: Step from which a run goes on; None for a new one.
        """
        raise NotImplementedError

    @property
    def event_file(self: Any) -> EventFile:
        """What summaries are written to."""
        file: EventFile = self._get_file_writer()
        return file

    def _get_file_writer(self: Any) -> Any:
        if self.file_writer is None:
            start, self.purge_step = self.purge_step, None
            self.file_writer = self.make_event_file(self.max_queue, self.flush_secs, start)
            self.all_writers = {self.log_dir: self.file_writer}
            if start is not None:
                self.file_writer.add_event(Event(step=start, session_log=SessionLog(status=SessionLog.START)))
        return self.file_writer
