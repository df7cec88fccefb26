"""The end of a command after an error: one line for an error of the user, a traceback for a bug."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from nclightning.interrupts import status_of
from nclightning.wording import message_for_user

__all__ = ["user_errors_handled"]

_BUG = (
    "This is a bug in nclightning or in code that it calls, not an error of yours. "
    "Please report it with the command and all lines above."
)


@contextmanager
def user_errors_handled() -> Iterator[None]:
    """End the process with one line and status 1 after an error of the user in the block.

    If a signal ended the block, the exit status is the one that shells expect. Any other exception is a bug, and keeps
    its traceback.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        status = status_of(stop)
        if status is None or os.environ.get("LOCAL_RANK", "0") != "0":
            raise
        sys.exit(status)
    except Exception as error:
        sentence = message_for_user(error)
        if sentence is None:
            _ask_for_report(error)
            raise
        sys.exit(f"error: {sentence}")


def _ask_for_report(error: Exception) -> None:
    """Print a request to report the bug below its traceback."""
    if hasattr(error, "add_note"):
        error.add_note(_BUG)
        return
    print_traceback = sys.excepthook  # Python 3.10 has no notes.

    def print_both(kind: type[BaseException], value: BaseException, traceback: TracebackType | None) -> None:
        print_traceback(kind, value, traceback)
        if value is error:
            print(_BUG, file=sys.stderr)

    sys.excepthook = print_both
