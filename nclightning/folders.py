"""Where a run lives: one answer for checkpoints, the saved configuration, resumes and the closing report."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L

from nclightning.errors import UserError
from nclightning.loggers import RunLogger

__all__ = ["checkpoint_of", "find_run_logger", "folder_of_checkpoint", "run_folder"]


def find_run_logger(trainer: L.Trainer) -> RunLogger | None:
    """Return the first :class:`RunLogger` of a trainer, whichever loggers come before it."""
    return next((logger for logger in trainer.loggers if isinstance(logger, RunLogger)), None)


def run_folder(trainer: L.Trainer) -> Path | None:
    """Find the folder of a trainer's run, as this process sees it.

    That of a :class:`RunLogger`, else of the first logger that has a folder, else ``default_root_dir``.

    Args:
        trainer: Of any kind.

    Returns:
        The folder, which may not be there yet; None for ``fast_dev_run``, which leaves nothing.

    Raises:
        ValueError: If it is no local folder.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    own = find_run_logger(trainer)
    places = [own.log_dir] if own is not None else [place for place in map(_place, trainer.loggers) if place]
    place = str(places[0] if places else trainer.default_root_dir)
    if "://" in place:
        raise UserError(
            f"the run folder {place} is a URL, and last.ckpt is kept in local folders only: give a local save_dir or "
            "default_root_dir, or use Lightning's ModelCheckpoint instead of LastCheckpoint."
        )
    return Path(place)


def _place(logger: Any) -> str | None:
    """Folder of one run of a logger, by the rule of Lightning's ``ModelCheckpoint``; None if it has none."""
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
    """Return the folder in which a run goes on from a checkpoint: where the given path lies, links not followed."""
    return Path(os.path.abspath(path)).parent.parent
