"""``readings.csv``: writing and reading of its rows, and their verification against a checkpoint."""

from __future__ import annotations

import csv
import io
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nclightning.errors import UserError
from nclightning.files import append, replaced, sync

__all__ = ["ReadingsTable", "Row", "WrittenRows", "check_rows", "read_rows"]

Row = tuple[int, Mapping[str, float]]


@dataclass(frozen=True)
class WrittenRows:
    """A fingerprint of the rows of a table.

    Attributes:
        count: Number of rows.
        last: Iteration of the last row.
        checksum: Checksum of iterations, tags and values. Empty cells are left out, because a new tag adds an empty
            cell to all earlier rows.
    """

    count: int = 0
    last: int = -1
    checksum: int = 0

    def with_row(self, tags: Sequence[str], cells: Sequence[str]) -> WrittenRows:
        """Return the fingerprint with one more row."""
        text = "\n".join([cells[0], *(f"{tag}={cell}" for tag, cell in zip(tags, cells[1:], strict=False) if cell)])
        return WrittenRows(self.count + 1, int(cells[0]), zlib.crc32(text.encode(), self.checksum))


def read_rows(path: Path) -> tuple[list[str], list[list[str]], int | None]:
    """Read a table up to its first damage.

    Args:
        path: The file.

    Returns:
        The tags; the cells of each row with the iteration first; and the number of the first damaged line, or None. A
        last line without a line break is left out, because it is incomplete.
    """
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    lines = csv.reader(text[: text.rfind("\n") + 1].splitlines())
    header: list[str] = []
    rows: list[list[str]] = []
    try:
        header = next(lines, ["iteration"])
        if header[:1] != ["iteration"]:
            return [], [], 1
        for cells in lines:
            if not _is_row(cells, len(header), int(rows[-1][0]) if rows else -1):
                return header[1:], rows, len(rows) + 2
            rows.append(cells)
    except csv.Error:
        return header[1:], rows, len(rows) + 2
    return header[1:], rows, None


def _is_row(cells: Sequence[str], width: int, last: int) -> bool:
    """Return whether cells are a valid row after the last one."""
    try:
        values = [float(cell) for cell in cells[1:] if cell]
    except ValueError:
        return False
    return len(cells) == width and len(values) <= width and cells[0].isdecimal() and int(cells[0]) > last


def check_rows(path: Path, iteration: int, written: Mapping[str, Any] | None) -> int:
    """Raise unless a table has the rows that a run had when a checkpoint was saved.

    Args:
        path: The file.
        iteration: Iteration of the checkpoint from which the run continues. Later rows will be written again, and may
            be missing or damaged.
        written: The checkpoint's :class:`WrittenRows` as a mapping; None if it has none.

    Returns:
        The iteration of the last row, also if it will be written again; -1 without rows.

    Raises:
        ValueError: If rows are missing, damaged or different.
    """
    repair = "Restore the table that belongs to the checkpoint, or start a new run without --ckpt_path."
    if not path.is_file():
        if written is None or not written["count"]:
            return -1
        raise UserError(f"{path} is missing, with all rows before the checkpoint at iteration {iteration}. {repair}")
    tags, rows, damaged = read_rows(path)
    found, widest, last = WrittenRows(), 0, -1
    for cells in rows:
        last, previous = int(cells[0]), last
        if last < iteration:
            found = found.with_row(tags, cells)
            widest = max(widest, last - previous) if previous >= 0 else 0
    if written is not None:
        complete = found == WrittenRows(**written)
        others = found.last >= written["last"]
    else:  # An earlier version wrote the checkpoint. The next row was due after at most the widest gap so far.
        complete, others = (
            last >= iteration or (found.count > 0 and found.last + (widest or iteration) >= iteration),
            False,
        )
    if complete:
        return last
    if damaged is not None:
        raise UserError(
            f"{path} is damaged in line {damaged}: not all rows before the checkpoint at iteration {iteration} can be "
            f"read. {repair}"
        )
    if others:
        raise UserError(f"{path} has other rows than when the checkpoint at iteration {iteration} was saved. {repair}")
    raise UserError(
        f"{path} ends at iteration {found.last}, and rows up to the checkpoint at iteration {iteration} are missing. "
        f"{repair}"
    )


class ReadingsTable:
    """``readings.csv``: a column ``iteration``, then one column per tag, with floats in full precision.

    Rows are appended, and reach the disk with :meth:`sync`. A new tag gets a new column.

    Args:
        path: The file.

    Attributes:
        replace_from: Iteration from which rows are dropped before the next append; None to keep all.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.replace_from: int | None = None
        self._tags: list[str] | None = None
        self._is_on_disk = True
        self._written = [WrittenRows()]  # The fingerprints without and with the last row.

    def append(self, rows: Sequence[Row]) -> None:
        """Add rows at the end, all of them or, after an error, none.

        Args:
            rows: Pairs of iteration and values by tag.

        Raises:
            OSError: If they cannot be written.
        """
        if not rows:
            return
        new = dict.fromkeys(tag for _, values in rows for tag in values)
        if self._tags is None or self.replace_from is not None or not new.keys() <= set(self._tags):
            self._rewrite(new)
        assert self._tags is not None
        cells = [
            [str(iteration), *(repr(float(values[tag])) if tag in values else "" for tag in self._tags)]
            for iteration, values in rows
        ]
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(cells)
        self._is_on_disk = False
        append(self.path, text.getvalue().encode())
        for row in cells:
            self._written = [self._written[-1], self._written[-1].with_row(self._tags, row)]

    def sync(self) -> None:
        """Flush the rows to the disk. Each monitor calls it at a checkpoint, and only the first call does something."""
        if not self._is_on_disk:
            sync(self.path)
            self._is_on_disk = True

    def written(self, before: int) -> WrittenRows:
        """Return the fingerprint of the rows before an iteration. At most one row may be later."""
        if self._tags is None:  # Nothing was added yet.
            self._written = _both_last(*self._read(before))
        return next(each for each in reversed(self._written) if each.last < before)

    @property
    def last(self) -> int:
        """Iteration of the last row; -1 without rows."""
        return self._written[-1].last if self._tags is not None else int((self._read(None)[1] or [["-1"]])[-1][0])

    def _read(self, before: int | None) -> tuple[list[str], list[list[str]]]:
        tags, rows, _ = read_rows(self.path) if self.path.exists() else ([], [], None)
        return tags, [row for row in rows if before is None or int(row[0]) < before]

    def _rewrite(self, new: Mapping[str, Any]) -> None:
        """Write the file again, with new tags and without the rows to drop."""
        tags, kept = self._read(self.replace_from)
        more = [tag for tag in new if tag not in tags]
        with replaced(self.path) as partial, partial.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["iteration", *tags, *more])
            writer.writerows([*row, *("" for _ in more)] for row in kept)
        self._tags, self.replace_from, self._written = [*tags, *more], None, _both_last(tags, kept)


def _both_last(tags: Sequence[str], rows: Sequence[Sequence[str]]) -> list[WrittenRows]:
    """Return the fingerprints of rows, without and with the last one."""
    both = [WrittenRows()]
    for row in rows:
        both = [both[-1], both[-1].with_row(tags, row)]
    return both
