"""Errors that are worded for the user."""

from __future__ import annotations

__all__ = ["UserError", "UserTypeError", "say_the_same"]


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
