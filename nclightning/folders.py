"""The folder of a run, for checkpoints, the saved configuration, resumes and the final summary."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L

from nclightning.errors import UserError
from nclightning.loggers import RunLogger

__all__ = ["checkpoint_of", "find_run_logger", "folder_of_checkpoint", "run_folder"]


def find_run_logger(trainer: L.Trainer) -> RunLogger | None:
    """Return the first :class:`RunLogger` among the loggers of a trainer; None if there is none."""
    return next((logger for logger in trainer.loggers if isinstance(logger, RunLogger)), None)


def run_folder(trainer: L.Trainer) -> Path | None:
    """Return the folder of a trainer's run, without communication between processes.

    It is the folder of a :class:`RunLogger`; without one, that of the first logger that has a folder; without any,
    ``default_root_dir``.

    Args:
        trainer: Any trainer.

    Returns:
        The folder, which need not exist yet; None for ``fast_dev_run``, which writes nothing.

    Raises:
        ValueError: If it is not a local folder.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    own = find_run_logger(trainer)
    places = [own.log_dir] if own is not None else [place for place in map(_place, trainer.loggers) if place]
    place = str(places[0] if places else trainer.default_root_dir)
    if "://" in place:
        raise UserError(
            f"the run folder {place} is a URL, but last.ckpt can be written to local folders only: give a "
            "local save_dir or default_root_dir, or use Lightning's ModelCheckpoint instead of LastCheckpoint."
        )
    return Path(place)


def _place(logger: Any) -> str | None:
    """Return the folder of a logger's run, by the rule of Lightning's ``ModelCheckpoint``; None if it has none."""
    folder = getattr(logger, "log_dir", None)
    if isinstance(folder, str | os.PathLike):
        return os.fspath(folder)
    if not logger.save_dir:
        return None
    version = logger.version
    parts = [logger.name, version if isinstance(version, str) or version is None else f"version_{version}"]
    return os.path.join(logger.save_dir, *(str(part) for part in parts if part is not None))


def checkpoint_of(folder: Path) -> Path:
    """Return the path of the last checkpoint of a run."""
    return folder / "checkpoints" / "last.ckpt"


def folder_of_checkpoint(path: Path) -> Path:
    """Return the run folder of a checkpoint path, in which the run continues. Links are not followed."""
    return Path(os.path.abspath(path)).parent.parent
