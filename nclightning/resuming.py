"""Where a resumed run goes on if it has no :class:`~nclightning.loggers.RunLogger`."""

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
    """Let a run go on in the folder of its checkpoint, or say why it cannot.

    A ``CSVLogger`` goes on with its table: by itself it would begin a new one, and delete the one that is there. What
    that held stays as ``metrics_before_resume.csv``.

    Args:
        trainer: Before the fit, without a ``RunLogger``.
        folder: In which the checkpoint lies.
        iteration: Of the checkpoint. Rows from there on are taken again.
        options: Arguments of the trainer's loggers, in order; None where they are not known.

    Raises:
        ValueError: If the run would go on somewhere else.
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
            f"the checkpoint lies in the run folder {folder}, and with {kinds} the run would go on in {place}: give "
            "the logger the name and version of that folder."
        )


@rank_zero_only
def _keep_table(logger: Logger, folder: Path, iteration: int) -> None:
    """Have a logger add to the table that is there, once what it replaces has a second name."""
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
    try:
        return float(row[step]) < iteration
    except (ValueError, IndexError):
        return True
