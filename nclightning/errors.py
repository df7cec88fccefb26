"""Errors that are worded for the user."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

__all__ = ["UserError", "UserTypeError", "listed", "nearest", "say_the_same"]

_MOST_LISTED = 10


class UserError(ValueError):
    """What came cannot be used: names the argument as it was typed, what came, and the repair.

    The command line prints such an error as one line. Any other exception is a fault of the package or of code that it
    calls, and keeps its traceback.
    """


class UserTypeError(UserError, TypeError):
    """A :class:`UserError` about an object of the wrong kind."""


def say_the_same(one: BaseException | None, other: BaseException | None) -> bool:
    """Whether two errors tell the user the same, such as twice that the disk is full."""
    if isinstance(one, OSError) and isinstance(other, OSError):
        return one.errno == other.errno
    return str(one) == str(other)


def nearest(name: str, known: Iterable[str]) -> str:
    """Ask about a misspelt name.

    Args:
        name: As it was typed.
        known: What it may be.

    Returns:
        A question after a space; empty if nothing is near.
    """
    close = get_close_matches(name, [each for each in known if each != name], n=1)
    return f" Did you mean {close[0]}?" if close else ""


def listed(names: Sequence[str]) -> str:
    """Join names for a message, which of many has the first ones and their number."""
    more = len(names) - _MOST_LISTED
    return f"{', '.join(names[:_MOST_LISTED])} and {more} more" if more > 1 else ", ".join(names)
