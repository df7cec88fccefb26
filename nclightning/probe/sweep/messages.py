"""The advice in messages to measure from training's own forwards instead of an evaluation pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["online_hint", "without_online_hint"]

_exists = ContextVar("online_exists", default=True)


@contextmanager
def without_online_hint() -> Iterator[None]:
    """Leave the advice out within the block, for a host that cannot measure training's own forwards."""
    token = _exists.set(False)
    try:
        yield
    finally:
        _exists.reset(token)


def online_hint(words: str = ", or measure training's own forwards, by source='online' or Probe.online") -> str:
    """Return the advice as the end of a sentence; empty if the host cannot follow it."""
    return words if _exists.get() else ""
