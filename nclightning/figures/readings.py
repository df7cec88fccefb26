"""Read the table of a run folder."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

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
    """Read ``readings.csv`` of a run folder.

    Args:
        run: The run folder, or the file itself.

    Returns:
        All rows, in float64.

    Raises:
        ValueError: If there is no such file or it holds no row.
    """
    path = Path(run)
    path = path / "readings.csv" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"no readings.csv in {run}: give the folder of a run, such as lightning_logs/version_0.")
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    if not rows:
        raise ValueError(f"{path} holds no readings yet.")
    table = np.array([[float(cell) if cell else np.nan for cell in row] for row in rows if len(row) == len(header)])
    return Readings(table[:, 0], {tag: table[:, i] for i, tag in enumerate(header) if i > 0})
