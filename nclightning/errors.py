"""Errors whose messages are written for the user, and helpers for such messages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

__all__ = ["UserError", "UserTypeError", "listed", "nearest", "say_the_same"]

_MAX_LISTED = 10


class UserError(ValueError):
    """An error of the user. The message names the argument as it was typed, its value, and the repair.

    The command line prints such an error as one line. Any other exception is a bug of the package or of code that it
    calls, and keeps its traceback.

    Example:
        >>> from nclightning import measure
        >>> from nclightning.errors import UserError
        >>> try:
        ...     measure(features=[[1.0], [2.0]], labels=[1, 2])
        ... except UserError as error:
        ...     print(error)
        labels must number the classes from 0 on, got 1..2: pass labels - 1, or weight= with a row for class 0, too.
    """


class UserTypeError(UserError, TypeError):
    """A :class:`UserError` about an argument of the wrong type."""


def say_the_same(one: BaseException | None, other: BaseException | None) -> bool:
    """Return whether two errors have the same message for the user, for example twice that the disk is full."""
    if isinstance(one, OSError) and isinstance(other, OSError):
        return one.errno == other.errno
    return str(one) == str(other)


def nearest(name: str, known: Iterable[str]) -> str:
    """Suggest the right spelling of a name.

    Args:
        name: The name as it was typed.
        known: All valid names.

    Returns:
        A question that begins with a space; empty if no valid name is similar.
    """
    close = get_close_matches(name, [each for each in known if each != name], n=1)
    return f" Did you mean {close[0]}?" if close else ""


def listed(names: Sequence[str]) -> str:
    """Join names for a message. Of many names, only the first ones are listed, with the number of the others."""
    more = len(names) - _MAX_LISTED
    return f"{', '.join(names[:_MAX_LISTED])} and {more} more" if more > 1 else ", ".join(names)
