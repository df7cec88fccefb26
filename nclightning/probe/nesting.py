"""Counts nested measurements, so that hooks can distinguish forward passes of training from those of a measurement."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["measurement", "measurements"]

_running = [0]


def measurements() -> int:
    """Return the number of measurements that are running, each inside the one before; 0 outside of measurements."""
    return _running[0]


@contextmanager
def measurement() -> Iterator[None]:
    """Mark the block as part of a measurement."""
    _running[0] += 1
    try:
        yield
    finally:
        _running[0] -= 1
