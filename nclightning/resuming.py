"""The folder of a resumed run that has no :class:`~nclightning.loggers.RunLogger`."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities import rank_zero_only

from nclightning.errors import UserError
from nclightning.files import keep_as, replaced
from nclightning.folders import run_folder

__all__ = ["continue_elsewhere"]

_BEFORE = "metrics_before_resume.csv"


def continue_elsewhere(
    trainer: L.Trainer, folder: Path, iteration: int, options: Sequence[Mapping[str, Any] | None]
) -> None:
    """Let a run continue in the folder of its checkpoint, or raise if it cannot.

    A ``CSVLogger`` then continues its table. On its own it would delete the table and begin a new one. The earlier
    table is kept as ``metrics_before_resume.csv``.

    Args:
        trainer: The trainer before the fit, without a ``RunLogger``.
        folder: The folder of the checkpoint.
        iteration: Iteration of the checkpoint. Later rows are removed.
        options: Arguments of the trainer's loggers, in order; None where they are not known.

    Raises:
        ValueError: If the run would continue in another folder.
    """
    place = run_folder(trainer)
    if place is None:
        return
    loggers = list(trainer.loggers)
    for i, (logger, given) in enumerate(zip(loggers, options, strict=False)):
        if type(logger) is CSVLogger and given is not None and (folder / "metrics.csv").is_file():
            there = {"save_dir": str(folder.parent), "name": "", "version": folder.name}
            loggers[i] = CSVLogger(**dict(given) | there)
            trainer.loggers = loggers
            _keep_table(loggers[i], folder, iteration)
            return
    is_run = any((folder / name).is_file() for name in ("config.yaml", "hparams.yaml"))
    if is_run and place.absolute() != folder.absolute():
        kinds = " and ".join(type(each).__name__ for each in loggers) or "no logger"
        raise UserError(
            f"the checkpoint is in the run folder {folder}, but with {kinds} the run would continue in {place}: give "
            "the logger the name and version of that folder."
        )


@rank_zero_only
def _keep_table(logger: Logger, folder: Path, iteration: int) -> None:
    """Let a logger append to the existing table, of which a copy is kept."""
    table, before = folder / "metrics.csv", folder / _BEFORE
    keep_as(table, before)
    rows = list(csv.reader(io.StringIO(before.read_text())))
    header = rows[0] if rows else []
    step = header.index("step") if "step" in header else None
    kept = [row for row in rows[1:] if step is None or _is_before(row, step, iteration)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Experiment logs directory")
        writer: Any = logger.experiment  # type: ignore[attr-defined]
    with replaced(table) as partial, partial.open("w", newline="") as file:
        csv.writer(file).writerows([header, *kept])
    writer.metrics_keys = header


def _is_before(row: Sequence[str], step: int, iteration: int) -> bool:
    """Return whether a row of a table is before an iteration; True if it has no step."""
    try:
        return float(row[step]) < iteration
    except (ValueError, IndexError):
        return True
