"""What can be done to files and folders; each operation announces itself to observers."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from nclightning.errors import UserError

__all__ = [
    "Operation",
    "WriteError",
    "append",
    "create",
    "delete",
    "delete_folder",
    "keep_as",
    "make_folder",
    "observers",
    "operation",
    "replaced",
    "sync",
]

_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF}  # Some network file systems cannot sync a folder.


class Operation(NamedTuple):
    """One operation on a file or folder.

    Attributes:
        name: Such as ``append`` or ``replace``.
        path: What it acts on.
        done: False when it is about to act, True when it has acted.
    """

    name: str
    path: Path
    done: bool


# Each is called before and after every operation. What one raises is raised as if by the disk: tests count the
# operations of a run with this, and fail or kill at each of them.
observers: list[Callable[[Operation], None]] = []


class WriteError(UserError, OSError):
    """The disk refuses: it is full, read-only, not ours, or the folder is gone.

    Args:
        number: ``errno``.
        reason: In words.
        path: File or folder.
    """

    def __init__(self, number: int | None, reason: str, path: str) -> None:
        OSError.__init__(self, number, reason, path)

    def __str__(self) -> str:
        return f"cannot write {self.filename}: {self.strerror}"


@contextmanager
def operation(name: str, path: Path) -> Iterator[None]:
    """Announce an operation before and after the block, and turn what the disk refuses into a :class:`WriteError`."""
    try:
        for observer in observers:
            observer(Operation(name, path, done=False))
        yield
        for observer in observers:
            observer(Operation(name, path, done=True))
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(error.errno, error.strerror or str(error), str(path)) from error


@contextmanager
def replaced(path: Path, partial_name: str | None = None) -> Iterator[Path]:
    """Write a file under another name, and let it take its place in one step once it is on the disk.

    Args:
        path: The file, which may exist.
        partial_name: The other name, where those who look for files like this one would take it for one.

    Yields:
        Where to write; with the same ending, in the same folder. Nothing is left of it after an error.

    Raises:
        WriteError: If the disk refuses; the file is as it was.
    """
    partial = path.with_name(partial_name or f".{path.stem}.partial{path.suffix}")
    try:
        with operation("write", partial):
            yield partial
        sync(partial)
        with operation("replace", path):
            partial.replace(path)
        sync(path.parent)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def append(path: Path, data: bytes) -> None:
    """Add bytes at the end of a file that exists: all of them, or none if the disk refuses.

    Raises:
        WriteError: If the disk refuses, or the file is gone.
    """
    with operation("append", path):
        _add(os.open(path, os.O_WRONLY | os.O_APPEND | getattr(os, "O_BINARY", 0)), data)


def create(path: Path, data: bytes) -> None:
    """Write a file that is not there yet.

    Raises:
        WriteError: If the disk refuses, or the file is there.
    """
    with operation("create", path):
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        _add(os.open(path, flags, 0o666), data)


def _add(descriptor: int, data: bytes) -> None:
    with os.fdopen(descriptor, "wb", buffering=0) as file:
        before = os.fstat(file.fileno()).st_size
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except BaseException:
            with suppress(OSError):
                os.ftruncate(file.fileno(), before)
            raise


def keep_as(path: Path, second: Path) -> None:
    """Let a file be found under a second name, too, in one step; whatever had that name is gone.

    The two share their content on file systems with hard links; elsewhere it is copied.

    Raises:
        WriteError: If the disk refuses.
    """
    partial = second.with_name(f".{second.stem}.partial{second.suffix}")
    with operation("keep", second):
        partial.unlink(missing_ok=True)
        try:
            os.link(path, partial)
        except OSError:
            shutil.copyfile(path, partial)
        partial.replace(second)
        partial.unlink(missing_ok=True)  # A rename between two names of one file does nothing.


def make_folder(path: Path, exist_ok: bool = True) -> None:
    """Make a folder, and those above it.

    Args:
        path: The folder.
        exist_ok: False fails with ``errno.EEXIST`` if it is there.

    Raises:
        WriteError: If the disk refuses.
    """
    if exist_ok and path.is_dir():
        return
    with operation("make folder", path):
        path.mkdir(parents=True, exist_ok=exist_ok)
    sync(path.parent)


def delete(path: Path) -> None:
    """Delete a file, if it is there.

    Raises:
        WriteError: If the disk refuses.
    """
    with operation("delete", path):
        path.unlink(missing_ok=True)


def delete_folder(path: Path) -> None:
    """Delete a folder and all that is in it.

    Raises:
        WriteError: If the disk refuses.
    """
    with operation("delete folder", path):
        shutil.rmtree(path)


def sync(path: Path) -> None:
    """Bring the content of a file, or the names in a folder, to the disk itself, where a power cut leaves them.

    Raises:
        WriteError: If the disk refuses.
    """
    with operation("sync", path):
        if os.name == "nt" and path.is_dir():
            return  # Windows has no such thing for folders.
        # Windows syncs what was opened for writing; a folder cannot be.
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in _NO_SYNC:
                raise
        finally:
            os.close(descriptor)
