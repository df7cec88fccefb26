"""Writing files so that a crash or a full disk leaves what was there before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replaced"]


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Write a file under another name, and let it take its place in one step.

    Args:
        path: The file, which may exist.

    Yields:
        Where to write; with the same ending, in the same folder. Nothing is left of it after an error.
    """
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
