"""A lock by which only one process writes to a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nclightning.errors import UserError
from nclightning.files.operations import operation

__all__ = ["FolderLock"]


class FolderLock:
    """A lock on a folder for this process, by a file ``.lock`` in it.

    The operating system releases the lock when the process ends, also if it is killed.

    Args:
        folder: The folder, which must exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock: Any = None

    def acquire(self) -> None:
        """Acquire the lock. Further calls do nothing.

        Raises:
            ValueError: If another process has the lock.
            WriteError: If the file cannot be written.
        """
        if self._lock is not None:
            return
        path = self.folder / ".lock"
        lock = FileLock(path, thread_local=False)
        try:
            with operation("lock", path):
                try:
                    lock.acquire(timeout=0)
                except Timeout as error:  # A subclass of OSError, but not an error of the disk.
                    raise UserError(
                        f"another process is writing {self.folder}. Wait until it ends, or choose another folder."
                    ) from error
        except NotImplementedError:
            return  # The file system does not support locks.
        self._lock = lock

    def release(self) -> None:
        """Release the lock. Further calls do nothing."""
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "_lock": None}  # A child process writes under the lock of its parent.
