"""How a command ends that cannot go on: a sentence for mistakes of the user, a traceback for faults of the package."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from nclightning.interrupts import status_of
from nclightning.wording import of_the_user

__all__ = ["mistakes_worded"]

_BUG = (
    "This is no mistake of yours but a fault of nclightning or of code that it calls. "
    "Please report it with the command and all lines above."
)


@contextmanager
def mistakes_worded() -> Iterator[None]:
    """End the process with one line and status 1 at a mistake of the user in the block.

    What a signal stopped ends with the status that shells expect. Anything else is a fault, and keeps its traceback.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        status = status_of(stop)
        if status is None or os.environ.get("LOCAL_RANK", "0") != "0":
            raise
        sys.exit(status)
    except Exception as error:
        sentence = of_the_user(error)
        if sentence is None:
            _ask_for_report(error)
            raise
        sys.exit(f"error: {sentence}")


def _ask_for_report(error: Exception) -> None:
    """Have the request to report a fault stand below its traceback."""
    if hasattr(error, "add_note"):
        error.add_note(_BUG)
        return
    print_traceback = sys.excepthook  # Python 3.10 has no notes.

    def print_both(kind: type[BaseException], value: BaseException, traceback: TracebackType | None) -> None:
        print_traceback(kind, value, traceback)
        if value is error:
            print(_BUG, file=sys.stderr)

    sys.excepthook = print_both
