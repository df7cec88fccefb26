"""Handling of SIGINT and SIGTERM: interrupts are deferred to the end of a unit of work."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = [
    "SIGINT_STATUS",
    "SIGTERM_STATUS",
    "DeferredInterrupt",
    "HeldInterrupts",
    "NotedTermination",
    "Terminated",
    "deferred_interrupt",
    "ends_with_launcher",
    "follow_launcher",
    "status_of",
    "terminable",
]

# Exit statuses of processes that a signal ended, by the convention of shells.
SIGINT_STATUS = 128 + signal.SIGINT
SIGTERM_STATUS = 128 + signal.SIGTERM
_LAUNCHER = "NCLIGHTNING_LAUNCHER"
_POLL_SECONDS = 0.5


class DeferredInterrupt:
    """The state of :func:`deferred_interrupt`.

    Attributes:
        waiting: Whether an interrupt was received.
    """

    def __init__(self) -> None:
        self.waiting = False


class _NotedSignal:
    """Records a signal instead of acting on it, between :meth:`hold` and :meth:`release`.

    Processes that must stop together use it: they exchange what they have recorded at a point that all of them reach.
    Outside of the main thread it does nothing.

    Attributes:
        waiting: Whether the signal was received.
    """

    _number: signal.Signals

    def __init__(self) -> None:
        self.waiting = False
        self._previous: Any = None

    def hold(self) -> None:
        """Start to record the signal."""
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(self._number, self._note)

    def release(self) -> None:
        """Restore the earlier handler."""
        if self._previous is not None:
            signal.signal(self._number, self._previous)
            self._previous = None

    def _note(self, number: int, frame: Any) -> None:
        self.waiting = True


class HeldInterrupts(_NotedSignal):
    """Records SIGINT. A second one is handled at once."""

    _number = signal.SIGINT

    def _note(self, number: int, frame: Any) -> None:
        previous = self._previous
        if self.waiting and callable(previous):
            self.release()
            previous(number, frame)
        super()._note(number, frame)


class NotedTermination(_NotedSignal):
    """Records SIGTERM.

    Lightning's own handler communicates with the other processes at once. If these are in another collective, all
    processes wait for ever.
    """

    _number = signal.SIGTERM


@contextmanager
def deferred_interrupt() -> Iterator[DeferredInterrupt]:
    """Defer the first SIGINT to the end of the block. A second one is handled at once.

    An interrupt then cannot separate changes of counters and files that belong together. Outside of the main thread,
    where Python delivers no signals, it does nothing.

    Yields:
        The state, by which a long block can end early.
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


class Terminated(SystemExit):
    """The exception in the main thread after SIGTERM."""

    def __init__(self) -> None:
        super().__init__(SIGTERM_STATUS)


def status_of(stop: BaseException) -> int | None:
    """Return the exit status of a process that a signal ended; None if it ended for another reason.

    Args:
        stop: The exception that ends the process. Lightning would exit with status 1 after SIGINT, and with 0 after
            SIGTERM.
    """
    if isinstance(stop, KeyboardInterrupt) or isinstance(stop.__context__, KeyboardInterrupt):
        return SIGINT_STATUS
    return SIGTERM_STATUS if type(stop).__name__ == "SIGTERMException" else None


@contextmanager
def terminable() -> Iterator[None]:
    """Raise :class:`Terminated` in the block at the first SIGTERM, and ignore later ones until the end of the block.

    Outside of the main thread, where Python delivers no signals, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    previous = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def ends_with_launcher() -> Iterator[None]:
    """Let processes that are started in the block end with this one. They must call :func:`follow_launcher`."""
    os.environ[_LAUNCHER] = str(os.getpid())
    try:
        yield
    finally:
        os.environ.pop(_LAUNCHER, None)


def follow_launcher() -> None:
    """End this process as soon as the one that started it in :func:`ends_with_launcher` has ended.

    Without it the other ranks would wait for the first one until the timeout of the process group, half an hour.
    """
    launcher = os.environ.get(_LAUNCHER)
    if launcher is None or os.name == "nt":  # On Windows the parent's id does not change when it ends.
        return

    def watch() -> None:
        while os.getppid() == int(launcher):
            time.sleep(_POLL_SECONDS)
        print("error: the process that launched this one is gone.", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="launcher-watch").start()
