"""Checkpoints whose every byte is checked before one of them is used."""

from __future__ import annotations

import errno
import zipfile
from pathlib import Path
from typing import Any

import torch

from nclightning.errors import UserError
from nclightning.files.operations import WriteError, replaced

__all__ = ["check_checkpoint", "is_sound", "save_checkpoint"]

_FOLDER = 0x10  # Of a part that is marked so the reader of torch returns memory that it did not fill.


def save_checkpoint(content: Any, path: Path) -> None:
    """Write a checkpoint straight to the disk, in one step.

    Args:
        content: What ``torch.save`` takes.
        path: The file.

    Raises:
        WriteError: If the disk refuses; the file is as it was.
    """
    with replaced(path) as partial:
        try:
            torch.save(content, partial)
        except RuntimeError as error:
            # The writer of torch has no error of its own for a disk that is full.
            if "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
                raise
            raise WriteError(errno.EIO, "the disk is full, or does not take the file", str(path)) from error


# Of the last file that was checked and not used yet.
_handed_over: set[tuple[int, ...]] = set()


def _identity(path: Path) -> tuple[int, ...] | None:
    try:
        seen = path.stat()
    except OSError:
        return None
    return seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns


def check_checkpoint(path: Path, name: str | None = None, hand_over: bool = False) -> None:
    """Raise unless each part of a checkpoint has the checksum that it was written with.

    ``torch.load`` checks none: weights with a flipped bit load without a word.

    Args:
        path: File that ``torch.save`` wrote.
        name: How the user named it.
        hand_over: Whether the next check is to take the word of this one, if the file is still the same by then.

    Raises:
        ValueError: If it is damaged or no checkpoint. A good one beside it is named.
    """
    seen = _identity(path)
    known = seen is not None and seen in _handed_over
    _handed_over.clear()
    damage = None if known else _damage(path)
    if damage is None:
        if hand_over and seen is not None:
            _handed_over.add(seen)
        return
    previous = path.with_name("previous.ckpt")
    repair = "Take another checkpoint."
    if path.name != previous.name and previous.is_file() and is_sound(previous):
        repair = f"The one saved before it, {previous}, is good."
    raise UserError(f"{name or path}: not a readable checkpoint ({damage}). {repair}")


def is_sound(path: Path) -> bool:
    """Say whether each part of a checkpoint has the checksum that it was written with."""
    return _damage(path) is None


def _damage(path: Path) -> str | None:
    """Say what is wrong with a checkpoint; None if nothing is."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
            parts = archive.infolist()
    except OSError as error:
        return error.strerror or str(error)
    except Exception:  # What a damaged header leads to is as manifold as the damages.
        return "it is damaged, cut off, or something else"
    if broken is not None:
        return f"its part {broken.partition('/')[2] or broken} is damaged"
    if any(part.external_attr & _FOLDER for part in parts):
        return "a part is marked as a folder"
    if not any(part.filename.endswith("/data.pkl") for part in parts):
        return "torch.save did not write it"
    return None
