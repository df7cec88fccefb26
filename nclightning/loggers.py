"""The logger of a run folder: TensorBoard events, and a table of the same readings in full precision."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from nclightning import environment
from nclightning.compat.lightning import WriterLogger, write_hyperparameters
from nclightning.compat.tensorboard import Summary
from nclightning.errors import UserError
from nclightning.files import FolderLock, WriteError, create, delete, delete_folder, make_folder, replaced
from nclightning.files.events import RunWriter
from nclightning.interrupts import deferred_interrupt
from nclightning.table import ReadingsTable, Row, WrittenRows

__all__ = ["ReadingsTable", "RunLogger"]


class RunLogger(WriterLogger):
    """TensorBoard logger that also writes ``readings.csv``, because TensorBoard's scalars are float32.

    The run folder is locked from :meth:`claim` or :meth:`continue_run` until the end of the fit, or of :meth:`locked`,
    so that no other process can write to it. A fit that ends with an error before its first value leaves no files.

    Args:
        save_dir: The folder in which ``name/version_N`` is created. None is the working directory; on the command line
            it is ``trainer.default_root_dir`` if that is given.
        name: Folder of all runs.
        version: Number or name of the run. None is the next free number. An existing run is never overwritten.

    Raises:
        ValueError: If ``save_dir`` is a URL, or ``name`` or ``version`` lead out of it; and when writing starts, if the
            run folder exists or cannot be written.
    """

    def __init__(
        self, save_dir: str | None = None, name: str = "lightning_logs", version: int | str | None = None
    ) -> None:
        if save_dir is not None and "://" in str(save_dir):
            raise UserError(
                f"save_dir={save_dir} is a URL, but runs can be written to local folders only: give a path."
            )
        for argument, value in (("name", name), ("version", version)):
            path = Path(str(value))
            if ".." in path.parts or path.is_absolute():
                raise UserError(
                    f"{argument}={value!r} leads out of save_dir: give a plain name, and the path as save_dir."
                )
        super().__init__(
            "." if save_dir is None else save_dir,
            name=name,
            version=version,
            default_hp_metric=False,
            max_queue=1000,
            flush_secs=10,
        )
        self._counts_versions = version is None
        self._claimed = self._keeps_lock = False
        self._last_iteration = self._last_held = self._last_in_events = -1
        self._continued: Path | None = None
        self._lock: FolderLock | None = None
        self._held: list[Row] = []  # Rows that are not in the table yet.
        self._table: ReadingsTable | None = None

    @property
    def log_dir(self) -> str:
        """The run folder."""
        return str(self._continued) if self._continued is not None else super().log_dir

    @property
    def table(self) -> ReadingsTable:
        """The table of the run's readings."""
        if self._table is None:
            self._table = ReadingsTable(Path(self.log_dir) / "readings.csv")
        return self._table

    def continue_run(self, folder: str | os.PathLike[str], iteration: int) -> None:
        """Continue in an existing run folder from a checkpoint. Call it before the fit.

        Readings from ``iteration`` on are replaced by new ones, in the table and in TensorBoard.

        Args:
            folder: The run folder.
            iteration: Iteration of the checkpoint.

        Raises:
            ValueError: If another process writes to the folder, or it cannot be written.
        """
        self._take(Path(folder))
        self._continued = Path(folder)
        self.set_writer_option("purge_step", iteration)
        self.table.replace_from = iteration

    @rank_zero_only
    def claim(self) -> None:
        """Create and lock the run folder.

        Raises:
            ValueError: If it exists and is not empty, or cannot be written.
        """
        if self._continued is not None or self._claimed:
            return
        folder = Path(self.log_dir)
        try:
            make_folder(folder.parent)
            while not _make_folder(folder, take_empty=not self._counts_versions):
                if not self._counts_versions:
                    raise UserError(
                        f"the run folder {folder} exists. Leave out the logger's version to get a new one, or continue "
                        f"that run with --ckpt_path {folder / 'checkpoints' / 'last.ckpt'}."
                    )
                self.count_version_up()  # Another run has taken the number in the meantime.
                folder = Path(self.log_dir)
            probe = folder / ".writable"
            create(probe, b"")
            delete(probe)
            self._take(folder)
        except OSError as error:
            raise UserError(
                f"cannot write the run folder {folder}: {error.strerror or error}. "
                "Choose another with --trainer.logger.init_args.save_dir."
            ) from error
        self._claimed = True

    @rank_zero_only
    def _take(self, folder: Path) -> None:
        """Lock a run folder, after releasing the lock of the last one."""
        self._release()
        lock = FolderLock(folder)
        lock.acquire()
        self._lock = lock

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep the lock of the run folder until the end of the block, and not only until the end of a fit in it."""
        self._keeps_lock = True
        try:
            yield
        finally:
            self._keeps_lock = False
            self._release()

    def _release(self) -> None:
        """Release the lock of the run folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def make_writer(self, options: dict[str, Any]) -> RunWriter:
        """Construct TensorBoard's writer, and create the run folder."""
        self.claim()
        return RunWriter(self.log_dir, **options)

    @rank_zero_only
    def log_rows(self, rows: Sequence[Row]) -> None:
        """Write readings: one event and one row of the table per iteration.

        Args:
            rows: Pairs of iteration and values by tag, in order. Values that are not finite are written to the table
                but not to the events, where they would interrupt the curve.

        Raises:
            ValueError: If an iteration was written before, so that the rows belong to another run.
        """
        if not rows:
            return
        if rows[0][0] <= self._last_iteration:
            raise UserError(
                f"iteration {rows[0][0]} came after iteration {self._last_iteration} in {self.log_dir}: two runs share "
                "a RunLogger. Give each fit one of its own."
            )
        # After an error the rows are written again with the next ones. Each file has its own count, so that no row is
        # written twice.
        writer = self.experiment.event_file
        for iteration, values in rows:
            if iteration > self._last_in_events:
                self._last_in_events = iteration
                finite = [Summary.Value(tag=tag, simple_value=v) for tag, v in values.items() if math.isfinite(v)]
                writer.add_summary(Summary(value=finite), iteration)
        self._held += [row for row in rows if row[0] > self._last_held]
        self._last_held = rows[-1][0]
        if self.experiment.matters:
            self._write_held()
        self._last_iteration = rows[-1][0]

    def _write_held(self) -> None:
        self.table.append(self._held)
        self._held = []

    @rank_zero_only
    def written(self, before: int) -> WrittenRows | None:
        """Write all rows, and return the fingerprint of those before a checkpoint, which the checkpoint saves.

        Args:
            before: Iteration of the checkpoint.
        """
        if self._held:
            self.experiment.matters = True
            self._write_held()
        return self.table.written(before)

    @rank_zero_only
    def save(self) -> None:
        """Flush events and readings to the disk. Before the first value no file is written."""
        if not (self.has_writer and self.experiment.matters):
            return
        with deferred_interrupt():
            hparams = Path(self.log_dir) / self.NAME_HPARAMS_FILE
            if not hparams.exists():
                with replaced(hparams) as partial:
                    write_hyperparameters(partial, self.hparams)
                with replaced(Path(self.log_dir) / environment.FILE_NAME) as partial:
                    partial.write_text(environment.environment_as_json())
            self._write_held()
            self.experiment.flush()
            self.table.sync()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the event file, with interrupts deferred, because a half-closed writer cannot be closed again.

        After an error of the fit, errors of writing are suppressed, because they would hide the first one.
        """
        try:
            with deferred_interrupt(), nullcontext() if status == "success" else suppress(OSError):
                if status == "success" and self._held and self._held[-1][0] > self.table.last:
                    # A resumed run that was already complete, whose last row is missing because it was killed.
                    self.written(self._held[-1][0])
                begun = self.experiment.matters if self.has_writer else status == "success"
                if not begun and (status != "success" or self._continued is not None):
                    self._leave_nothing()
                elif not begun:
                    self.experiment.matters = True
                super().finalize(status)
        finally:
            if not self._keeps_lock:
                self._release()

    def _leave_nothing(self) -> None:
        """Delete the run folder of a fit that ended with an error at its start."""
        if self.has_writer:
            self.experiment.discard()
        folder = Path(self.log_dir)
        if self._claimed and {path.name for path in folder.iterdir()} <= {".lock"}:
            self._release()
            delete_folder(folder)
            self._claimed = False


def _make_folder(folder: Path, take_empty: bool) -> bool:
    """Create a folder, and return whether it can be used. An empty existing one can, if ``take_empty`` is True."""
    try:
        make_folder(folder, exist_ok=False)
    except WriteError as error:
        if error.errno != errno.EEXIST:
            raise
        # If the version is a counted number, an empty folder belongs to another run that is just starting.
        return take_empty and folder.is_dir() and not any(folder.iterdir())
    return True
