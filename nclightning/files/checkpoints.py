"""Writing of checkpoints, and verification of their checksums before they are read."""

from __future__ import annotations

import errno
import zipfile
from pathlib import Path
from typing import Any

import torch

from nclightning.errors import UserError
from nclightning.files.operations import WriteError, replaced

__all__ = ["check_checkpoint", "is_sound", "save_checkpoint"]

_FOLDER = 0x10  # Attribute of a folder in an archive. Torch returns uninitialised memory for a part that has it.


def save_checkpoint(content: Any, path: Path) -> None:
    """Write a checkpoint to the disk, and replace an earlier file in one step.

    Args:
        content: The object to save with ``torch.save``.
        path: The file.

    Raises:
        WriteError: If it cannot be written. An earlier file is then unchanged.
    """
    with replaced(path) as partial:
        try:
            torch.save(content, partial)
        except RuntimeError as error:
            # Torch raises a plain RuntimeError if the disk is full.
            if "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
                raise
            raise WriteError(errno.EIO, "the disk is full, or the file cannot be written", str(path)) from error


# Identity of the last file that was checked with ``hand_over``.
_handed_over: set[tuple[int, ...]] = set()


def _identity(path: Path) -> tuple[int, ...] | None:
    """Return what identifies a file and its version: inode, size and times; None if it does not exist."""
    try:
        seen = path.stat()
    except OSError:
        return None
    return seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns


def check_checkpoint(path: Path, name: str | None = None, hand_over: bool = False) -> None:
    """Raise unless each part of a checkpoint has the checksum with which it was written.

    ``torch.load`` does not verify checksums, and would load weights with a flipped bit silently.

    Args:
        path: A file that ``torch.save`` wrote.
        name: The path as the user typed it.
        hand_over: Whether the next check can be skipped if the file is still the same.

    Raises:
        ValueError: If it is damaged, or is not a checkpoint. The message names a good checkpoint beside it.
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
        repair = f"The checkpoint saved before it, {previous}, is good."
    raise UserError(f"{name or path}: not a readable checkpoint ({damage}). {repair}")


def is_sound(path: Path) -> bool:
    """Return whether each part of a checkpoint has the checksum with which it was written."""
    return _damage(path) is None


def _damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint; None if nothing is."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
            parts = archive.infolist()
    except OSError as error:
        return error.strerror or str(error)
    except Exception:  # A damaged header can raise anything.
        return "it is damaged, cut off, or not a checkpoint"
    if broken is not None:
        return f"its part {broken.partition('/')[2] or broken} is damaged"
    if any(part.external_attr & _FOLDER for part in parts):
        return "a part is marked as a folder"
    if not any(part.filename.endswith("/data.pkl") for part in parts):
        return "torch.save did not write it"
    return None
