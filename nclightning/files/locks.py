"""One writer at a time in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nclightning.errors import UserError
from nclightning.files.operations import operation

__all__ = ["FolderLock"]


class FolderLock:
    """Keeps other processes out of a folder, by its file ``.lock``.

    The system frees the lock when the process ends, however it ends.

    Args:
        folder: It exists.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock: Any = None

    def acquire(self) -> None:
        """Take it; once more does nothing.

        Raises:
            ValueError: If another process has it.
            WriteError: If the disk refuses.
        """
        if self._lock is not None:
            return
        path = self.folder / ".lock"
        lock = FileLock(path, thread_local=False)
        try:
            with operation("lock", path):
                try:
                    lock.acquire(timeout=0)
                except Timeout as error:  # Which is an OSError, but none of the disk's.
                    raise UserError(
                        f"another process is writing {self.folder}. Wait until it ends, or choose another folder."
                    ) from error
        except NotImplementedError:
            return  # The file system knows no locks.
        self._lock = lock

    def release(self) -> None:
        """Let others in; once more does nothing."""
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "_lock": None}  # A process that this one spawns writes in its name.
