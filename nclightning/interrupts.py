"""Ctrl-C between units of work instead of within them."""

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

# With which a process ends that a signal asked to, by the convention of shells.
SIGINT_STATUS = 128 + signal.SIGINT
SIGTERM_STATUS = 128 + signal.SIGTERM
_LAUNCHER = "NCLIGHTNING_LAUNCHER"
_POLL_SECONDS = 0.5


class DeferredInterrupt:
    """Whether an interrupt waits."""

    def __init__(self) -> None:
        self.waiting = False


class _NotedSignal:
    """Notes a signal instead of acting on it, from :meth:`hold` to :meth:`release`.

    For processes that have to stop together: each asks the others at a point that all of them reach. Outside of the
    main thread it does nothing.
    """

    _number: signal.Signals

    def __init__(self) -> None:
        self.waiting = False
        self._previous: Any = None

    def hold(self) -> None:
        """Begin."""
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(self._number, self._note)

    def release(self) -> None:
        """Let others handle what comes from here on."""
        if self._previous is not None:
            signal.signal(self._number, self._previous)
            self._previous = None

    def _note(self, number: int, frame: Any) -> None:
        self.waiting = True


class HeldInterrupts(_NotedSignal):
    """Notes SIGINT; a second one acts at once."""

    _number = signal.SIGINT

    def _note(self, number: int, frame: Any) -> None:
        previous = self._previous
        if self.waiting and callable(previous):
            self.release()
            previous(number, frame)
        super()._note(number, frame)


class NotedTermination(_NotedSignal):
    """Notes SIGTERM.

    Lightning's handler talks to the other processes from within the signal, which can meet them in the middle of
    talking about something else, and then all wait.
    """

    _number = signal.SIGTERM


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


class Terminated(SystemExit):
    """SIGTERM, as an exception of the main thread."""

    def __init__(self) -> None:
        super().__init__(SIGTERM_STATUS)


def status_of(stop: BaseException) -> int | None:
    """Return the exit status of a process that a signal asked to stop; None if it was something else that did.

    Args:
        stop: What ends the process. Lightning turns SIGINT into an exit with 1, and SIGTERM into one with success.
    """
    if isinstance(stop, KeyboardInterrupt) or isinstance(stop.__context__, KeyboardInterrupt):
        return SIGINT_STATUS
    return SIGTERM_STATUS if type(stop).__name__ == "SIGTERMException" else None


@contextmanager
def terminable() -> Iterator[None]:
    """Raise :class:`Terminated` in the block at the first SIGTERM, and let later ones wait for the end of the block.

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
    """Let the processes that are launched in the block end with this one, if they call :func:`follow_launcher`."""
    os.environ[_LAUNCHER] = str(os.getpid())
    try:
        yield
    finally:
        os.environ.pop(_LAUNCHER, None)


def follow_launcher() -> None:
    """In a process that was launched in :func:`ends_with_launcher`: end as soon as its launcher has.

    Ranks that wait for a first one that is gone would wait for as long as the process group allows, half an hour.
    """
    launcher = os.environ.get(_LAUNCHER)
    if launcher is None or os.name == "nt":  # Windows does not give children of the dead to another parent.
        return

    def watch() -> None:
        while os.getppid() == int(launcher):
            time.sleep(_POLL_SECONDS)
        print("error: the process that launched this one is gone.", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="launcher-watch").start()
