"""Ctrl-C between units of work instead of within them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["DeferredInterrupt", "HeldInterrupts", "deferred_interrupt"]


class DeferredInterrupt:
    """Whether an interrupt waits."""

    def __init__(self) -> None:
        self.waiting = False


class HeldInterrupts:
    """Notes SIGINT instead of delivering it, from :meth:`hold` to :meth:`release`; a second one acts at once.

    For processes that have to stop together: each asks the others at a point that all of them reach. Outside of the
    main thread it does nothing.
    """

    def __init__(self) -> None:
        self.waiting = False
        self._previous: Any = None

    def hold(self) -> None:
        """Begin."""
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._note)

    def release(self) -> None:
        """Deliver what comes from here on."""
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def _note(self, number: int, frame: Any) -> None:
        previous = self._previous
        if self.waiting and callable(previous):
            self.release()
            previous(number, frame)
        self.waiting = True


@contextmanager
def deferred_interrupt() -> Iterator[DeferredInterrupt]:
    """Hold back the first SIGINT until the block ends; a second one acts at once.

    Counters and files that belong together are then changed together. Outside of the main thread, where Python
    delivers no signals, it does nothing.

    Yields:
        Whether an interrupt waits, for long blocks to end early.
    """
    state = DeferredInterrupt()
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield state
        return

    def handle(number: int, frame: Any) -> None:
        if state.waiting:
            previous(number, frame)
        state.waiting = True

    signal.signal(signal.SIGINT, handle)
    try:
        yield state
    finally:
        signal.signal(signal.SIGINT, previous)
    if state.waiting:
        previous(signal.SIGINT, None)
