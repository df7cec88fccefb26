"""The recorded values of a run."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nclightning.compat.recorded import read_scalars
from nclightning.errors import UserError
from nclightning.quantities import NC, OPTIMALITY, parse_tag

__all__ = ["Readings", "read_readings"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Readings:
    """Recorded values of a run.

    Attributes:
        iterations: ``(R,)``, increasing.
        values: One array ``(R,)`` per tag; nan where a row has no value.

    Example:
        >>> import numpy as np
        >>> from nclightning.figures import Readings
        >>> readings = Readings(np.array([0.0, 10.0]), {"optimality/gap": np.array([1.0, 0.1])})
        >>> float(readings.values["optimality/gap"][-1])
        0.1
    """

    iterations: Array
    values: dict[str, Array]


def read_readings(run: str | Path) -> Readings:
    r"""Read the recorded values of a run.

    They come from ``readings.csv`` of a run folder, which has float64 precision. In folders of Lightning's own loggers
    they come from ``metrics.csv``, or from the scalars of TensorBoard's event files, which are float32.

    Args:
        run: The run folder, or the table itself.

    Returns:
        All rows.

    Raises:
        ValueError: If there is no such file, or if it is damaged or has no rows.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from nclightning.figures import read_readings
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "readings.csv").write_text("iteration,optimality/gap\n0,1.0\n10,0.1\n")
        ...     readings = read_readings(folder)
        >>> readings.values["optimality/gap"].tolist()
        [1.0, 0.1]
    """
    path = Path(run)
    tables = [path] if path.is_file() else [path / "readings.csv", path / "metrics.csv"]
    for table in tables:
        if table.is_file():
            return _read_table(table)
    if any(path.glob("events.out.tfevents.*")):
        return _read_events(path)
    raise UserError(
        f"no readings.csv, metrics.csv or TensorBoard events in {run}: give the folder of a run, such as "
        "lightning_logs/version_0."
    )


def _read_table(path: Path) -> Readings:
    try:
        text = path.read_bytes().decode("utf-8-sig")  # Spreadsheets begin the file with a byte-order mark.
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text, so it is not a table of readings.") from error
    # A last line without a newline is still being written, and its last number may be incomplete.
    lines = text[: text.rfind("\n") + 1].splitlines()
    if len(lines) < 2:
        raise UserError(f"{path} holds no readings yet.")
    try:
        header, *rows = csv.reader(lines)
    except csv.Error as error:
        raise UserError(f"{path} is no table of readings: {error}.") from error
    if len(set(header)) < len(header):
        raise UserError(f"{path} is no table of readings: a column occurs twice.")
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise UserError(
                f"{path} is damaged: line {number} has {len(row)} of {len(header)} cells. Delete the line to go on "
                "without it."
            )
    try:
        table = np.array([[float(cell) if cell else np.nan for cell in row] for row in rows])
    except ValueError as error:
        raise UserError(f"{path} is no table of readings: {error}.") from error
    at = header.index("step") if "step" in header else 0  # Lightning's tables sort their columns.
    _check_iterations(path, table[:, at], several="step" in header)
    table = table[np.argsort(table[:, at], kind="stable")]
    iterations, values = table[:, at], {tag: table[:, i] for i, tag in enumerate(header) if i != at}
    readings = Readings(iterations, values)
    return _measured(readings) if "step" in header else readings


def _check_iterations(path: Path, iterations: Array, several: bool) -> None:
    """Refuse rows whose iterations are not whole numbers in increasing order.

    Lightning's tables may have several rows of one step, and log the end of an epoch under the step before.
    """
    wrong = ~((iterations >= 0) & (iterations < 2**53) & (iterations == np.floor(iterations)))
    if wrong.any():
        line = int(wrong.argmax())
        raise UserError(
            f"{path} is damaged: line {line + 2} has iteration {iterations[line]:g}, which is not a whole number."
        )
    falls = np.diff(iterations) < (-1 if several else 1)
    if falls.any():
        line = int(falls.argmax())
        raise UserError(
            f"{path} is damaged: line {line + 3} has iteration {iterations[line + 1]:.0f} after "
            f"{iterations[line]:.0f}. Sort the rows by iteration and keep one row for each."
        )


def _read_events(folder: Path) -> Readings:
    curves = {tag: dict(events) for tag, events in read_scalars(str(folder)).items()}
    steps = sorted({step for curve in curves.values() for step in curve})
    if not steps:
        raise UserError(f"the TensorBoard events in {folder} have no readings yet.")
    values = {tag: np.array([curve.get(step, np.nan) for step in steps]) for tag, curve in curves.items()}
    return _measured(Readings(np.array(steps, dtype=float), values))


def _measured(readings: Readings) -> Readings:
    """Keep the rows of Lightning's loggers that have a value of ours: others may have a training loss only."""
    ours = [values for tag, values in readings.values.items() if parse_tag(tag).group in (NC, OPTIMALITY)]
    if not ours:
        return readings
    rows = ~np.isnan(ours).all(axis=0)
    if not rows.any():
        raise UserError(f"no row of the run holds a reading of {NC}/ or {OPTIMALITY}/ yet.")
    return Readings(readings.iterations[rows], {tag: values[rows] for tag, values in readings.values.items()})
