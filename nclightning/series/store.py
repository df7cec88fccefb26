"""The folder of a series: a table, TensorBoard events with the same rows, and a record of the measured files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nclightning.errors import UserError
from nclightning.files import FolderLock, WriteError, delete, delete_folder, make_folder, replaced
from nclightning.files.events import EventRows
from nclightning.series.source import Source
from nclightning.table import ReadingsTable, read_rows

__all__ = ["Store"]

_AGAIN = "--overwrite measures all files again, and another --out keeps both."


@dataclass
class _Record:
    """The settings of a series, and for each step the name and the fingerprint of the file."""

    settings: dict[str, Any]
    rows: dict[int, dict[str, str]] = field(default_factory=dict)


class Store:
    """The rows of a series in the order of steps.

    If the process is killed, complete rows remain and the next start continues. A row is written to the record, then to
    the table, then to the events. It exists once it is in the table.

    Args:
        folder: The folder, which need not exist.
        settings: All settings that change values, in the types of JSON.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self.table_path, self.picture = folder / "readings.csv", folder / "measured.png"
        self._record_path = folder / "measured.json"
        self._record = _Record(json.loads(json.dumps(settings)))
        self._lock, self._events = FolderLock(folder), EventRows(folder)
        self._table = ReadingsTable(self.table_path)
        self.rows: dict[int, dict[str, float]] = {}

    @contextmanager
    def opened(self, overwrite: bool) -> Iterator[None]:
        """Lock the folder and read its rows. A new folder without rows is deleted at the end of the block.

        Args:
            overwrite: Whether to ignore the rows of an earlier series.

        Raises:
            ValueError: If the folder cannot be written, is in use, or has other content.
        """
        made = [each for each in (self.folder, *self.folder.parents) if not each.exists()]
        locked_before = (self.folder / ".lock").exists()
        try:
            make_folder(self.folder)
            self._lock.acquire()
        except (WriteError, OSError) as error:
            raise UserError(
                f"cannot write {self.folder}: {error.strerror or error}. Choose another folder with --out."
            ) from error
        try:
            self._read(overwrite)
            yield
        finally:
            self._lock.release()
            if not self.rows and not locked_before:
                delete(self.folder / ".lock")
                for each in made:
                    if not any(each.iterdir()):
                        delete_folder(each)

    def _read(self, overwrite: bool) -> None:
        """Read the rows of an earlier series with the same settings."""
        if not self._record_path.exists():
            if self.table_path.exists():
                raise UserError(
                    f"{self.table_path} is not the table of a series, but perhaps of a training run: choose another "
                    "--out."
                )
            return
        if overwrite:
            return  # The earlier series is deleted when the first new row is written.
        known = self._read_record()
        for name in dict.fromkeys([*known.settings, *self._record.settings]):
            one, other = known.settings.get(name), self._record.settings.get(name)
            if one != other:
                raise UserError(
                    f"{self.folder} has a series with {name}={json.dumps(one)}, and this one has "
                    f"{name}={json.dumps(other)}: {_AGAIN}"
                )
        tags, rows, damaged = read_rows(self.table_path) if self.table_path.exists() else ([], [], None)
        if damaged is not None or not {int(row[0]) for row in rows} <= known.rows.keys():
            raise UserError(f"{self.table_path} is damaged, or has rows of another series: {_AGAIN}")
        for step, *cells in rows:
            self.rows[int(step)] = {tag: float(cell) for tag, cell in zip(tags, cells, strict=True) if cell}
        self._record.rows = {step: known.rows[step] for step in self.rows}

    def _read_record(self) -> _Record:
        """Read the record of an earlier series."""
        try:
            content = json.loads(self._record_path.read_text())
            rows = {
                int(step): {"file": row["file"], "content": row["content"]} for step, row in content["rows"].items()
            }
            return _Record(dict(content["settings"]), rows)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{self._record_path} is damaged: {_AGAIN}") from error

    def waiting(self, sources: Sequence[Source]) -> list[Source]:
        """Return the sources that have no row yet.

        Args:
            sources: The sources in the order of steps.

        Raises:
            ValueError: If a measured file has changed, or a new one belongs before the last row.
        """
        self._check_kinship(sources)
        waiting, last = [], max(self.rows, default=-1)
        for each in sources:
            row = self._record.rows.get(each.step)
            if row is None:
                if each.step < last:
                    raise UserError(
                        f"{each.name} has step {each.step}, which is before that of the last row in {self.folder}, "
                        f"{last}: {_AGAIN}"
                    )
                waiting.append(each)
            elif row["content"] != each.fingerprint():
                raise UserError(
                    f"{each.name} has changed since {row['file']} was measured (step {each.step}): {_AGAIN}"
                )
        return waiting

    def _check_kinship(self, sources: Sequence[Source]) -> None:
        """Raise if the files belong to another series: none has a row, and none is in the folder of a measured one."""
        known = {str(Path(row["file"]).resolve().parent) for row in self._record.rows.values()}
        beside = any(str(Path(each.name).resolve().parent) in known for each in sources)
        if self.rows and not beside and not any(each.step in self.rows for each in sources):
            raise UserError(
                f"{self.folder} has the series of {self.name(max(self.rows))}, to which {sources[0].name} does not "
                f"belong: {_AGAIN}"
            )

    def name(self, step: int) -> str:
        """Return the name of the file of a row."""
        return self._record.rows[step]["file"]

    def begin(self) -> None:
        """Prepare for new rows."""
        if self.rows:
            self._table.replace_from = max(self.rows) + 1  # Drop an incomplete line that a killed process left.
            self._events.begin(self.rows.items())

    def add(self, source: Source, values: Mapping[str, float]) -> None:
        """Add a row. It is on the disk when this method returns.

        Raises:
            WriteError: If it cannot be written.
        """
        if not self.rows:
            # The record is deleted last, because a table without a record is taken for that of a training run.
            for path in (self.picture, self.table_path, self._record_path):
                delete(path)
            self._events.begin([])
        self._record.rows[source.step] = {"file": source.name, "content": source.fingerprint()}
        content = {"settings": self._record.settings, "rows": self._record.rows}
        with replaced(self._record_path) as partial:
            partial.write_text(json.dumps(content, indent=1))
        self._table.append([(source.step, values)])
        self._table.sync()
        self.rows[source.step] = dict(values)
        self._events.add(source.step, values)
