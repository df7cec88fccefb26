"""Whether a forward is training's own or one of a measurement, for the hooks that wait for one of the two."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["measurement", "measurements"]

_open = [0]


def measurements() -> int:
    """Return how many measurements are going on, one inside the other. A hook made in one of them is not for others."""
    return _open[0]


@contextmanager
def measurement() -> Iterator[None]:
    """Count what runs inside as a measurement."""
    _open[0] += 1
    try:
        yield
    finally:
        _open[0] -= 1
