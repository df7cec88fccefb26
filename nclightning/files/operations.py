"""Operations on files and folders. Each one is announced to observers, by which tests let it fail."""

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
        name: Name of the operation, such as ``append`` or ``replace``.
        path: The file or folder.
        done: False before the operation, True after it.
    """

    name: str
    path: Path
    done: bool


# Functions that are called before and after every operation. An OSError that they raise counts as an error of the disk.
# Tests count the operations of a run with them, and let each one fail or kill the process.
observers: list[Callable[[Operation], None]] = []


class WriteError(UserError, OSError):
    """A file cannot be written: the disk is full or read-only, permissions are missing, or the folder is gone.

    Args:
        number: The ``errno``.
        reason: The reason in words.
        path: The file or folder.
    """

    def __init__(self, number: int | None, reason: str, path: str) -> None:
        OSError.__init__(self, number, reason, path)

    def __str__(self) -> str:
        return f"cannot write {self.filename}: {self.strerror}"


@contextmanager
def operation(name: str, path: Path) -> Iterator[None]:
    """Announce an operation before and after the block, and convert an ``OSError`` to a :class:`WriteError`."""
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
    """Write a file under a temporary name, and rename it in one step once it is on the disk.

    Args:
        path: The file, which may exist.
        partial_name: The temporary name; None for one with the same ending. Needed if readers would find that one.

    Yields:
        The temporary path in the same folder. The file is deleted after an error.

    Raises:
        WriteError: If it cannot be written. An existing file is then unchanged.
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
    """Append bytes to an existing file: all of them, or none after an error.

    Raises:
        WriteError: If they cannot be written, or the file does not exist.
    """
    with operation("append", path):
        _add(os.open(path, os.O_WRONLY | os.O_APPEND | getattr(os, "O_BINARY", 0)), data)


def create(path: Path, data: bytes) -> None:
    """Write a new file.

    Raises:
        WriteError: If it cannot be written, or exists.
    """
    with operation("create", path):
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        _add(os.open(path, flags, 0o666), data)


def _add(descriptor: int, data: bytes) -> None:
    """Write all bytes to an open file, or restore its length after an error."""
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
    """Give a file a second name in one step, and replace an existing file of that name.

    The content is shared on file systems with hard links, and copied on others.

    Raises:
        WriteError: If it cannot be written.
    """
    partial = second.with_name(f".{second.stem}.partial{second.suffix}")
    with operation("keep", second):
        partial.unlink(missing_ok=True)
        try:
            os.link(path, partial)
        except OSError:
            shutil.copyfile(path, partial)
        partial.replace(second)
        partial.unlink(missing_ok=True)  # Renaming to another name of the same file leaves both names.


def make_folder(path: Path, exist_ok: bool = True) -> None:
    """Create a folder and its parents.

    Args:
        path: The folder.
        exist_ok: Whether the folder may exist. If not, an existing one raises ``errno.EEXIST``.

    Raises:
        WriteError: If it cannot be created.
    """
    if exist_ok and path.is_dir():
        return
    with operation("make folder", path):
        path.mkdir(parents=True, exist_ok=exist_ok)
    sync(path.parent)


def delete(path: Path) -> None:
    """Delete a file if it exists.

    Raises:
        WriteError: If it cannot be deleted.
    """
    with operation("delete", path):
        path.unlink(missing_ok=True)


def delete_folder(path: Path) -> None:
    """Delete a folder with its content.

    Raises:
        WriteError: If it cannot be deleted.
    """
    with operation("delete folder", path):
        shutil.rmtree(path)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, from the system's cache to the disk, so that they survive a power cut.

    Raises:
        WriteError: If the disk reports an error.
    """
    with operation("sync", path):
        if os.name == "nt" and path.is_dir():
            return  # Windows cannot flush folders.
        # Windows flushes only files that are opened for writing. Folders cannot be opened for writing.
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in _NO_SYNC:
                raise
        finally:
            os.close(descriptor)
