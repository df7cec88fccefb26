"""A counter of nested measurements, by which hooks tell training's own forwards from those of a measurement."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["measurement", "measurements"]

_open = [0]


def measurements() -> int:
    """Return the number of running measurements, one inside the other."""
    return _open[0]


@contextmanager
def measurement() -> Iterator[None]:
    """Count the block as a measurement."""
    _open[0] += 1
    try:
        yield
    finally:
        _open[0] -= 1
