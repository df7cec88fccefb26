"""Read what a run recorded."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nclightning.errors import UserError

__all__ = ["Readings", "read_readings"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Readings:
    """Recorded values of a run.

    Attributes:
        iterations: ``(R,)``, increasing.
        values: One array ``(R,)`` per tag; nan where a row has no value.
    """

    iterations: Array
    values: dict[str, Array]


def read_readings(run: str | Path) -> Readings:
    """Read what a run recorded.

    That is ``readings.csv`` of a run folder, in float64; in folders of Lightning's own loggers ``metrics.csv``, or the
    scalars of TensorBoard's event files, which are float32.

    Args:
        run: The run folder, or the table itself.

    Returns:
        All rows.

    Raises:
        ValueError: If there is no such file or it holds no row.
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
    text = path.read_text()
    # A last line without its end is in writing, and its last number may be cut.
    header, *rows = [*csv.reader(text[: text.rfind("\n") + 1].splitlines())] or [[]]
    rows = [row for row in rows if len(row) == len(header)]
    if not rows:
        raise UserError(f"{path} holds no readings yet.")
    try:
        table = np.array([[float(cell) if cell else np.nan for cell in row] for row in rows])
    except ValueError as error:
        raise UserError(f"{path} is no table of readings: {error}.") from error
    if "step" not in header:
        return Readings(table[:, 0], {tag: table[:, i] for i, tag in enumerate(header) if i > 0})
    at = header.index("step")  # Lightning's tables sort their columns.
    return _measured(Readings(table[:, at], {tag: table[:, i] for i, tag in enumerate(header) if i != at}))


def _read_events(folder: Path) -> Readings:
    # Slow to import, and seldom needed.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    curves = {tag: {e.step: e.value for e in accumulator.Scalars(tag)} for tag in accumulator.Tags()["scalars"]}
    steps = sorted({step for curve in curves.values() for step in curve})
    if not steps:
        raise UserError(f"the TensorBoard events in {folder} hold no readings yet.")
    values = {tag: np.array([curve.get(step, np.nan) for step in steps]) for tag, curve in curves.items()}
    return _measured(Readings(np.array(steps, dtype=float), values))


def _measured(readings: Readings) -> Readings:
    """Leave out the rows of Lightning's loggers that hold other things only, such as a loss between two readings."""
    ours = [values for tag, values in readings.values.items() if tag.startswith(("nc/", "optimality/"))]
    if not ours:
        return readings
    rows = ~np.isnan(ours).all(axis=0)
    if not rows.any():
        raise UserError("no row of the run holds a reading of nc/ or optimality/ yet.")
    return Readings(readings.iterations[rows], {tag: values[rows] for tag, values in readings.values.items()})
