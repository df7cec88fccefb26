"""The way around an evaluation pass that messages name: to measure training's own forwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["or_online", "without_online"]

_exists = ContextVar("online_exists", default=True)


@contextmanager
def without_online() -> Iterator[None]:
    """Let messages not name it, in a host that cannot do so."""
    token = _exists.set(False)
    try:
        yield
    finally:
        _exists.reset(token)


def or_online(words: str = ", or measure training's own forwards, by source='online' or Probe.online") -> str:
    """Return the end of a sentence that names it; an empty one where it does not exist."""
    return words if _exists.get() else ""
