"""Errors that are worded for the user."""

from __future__ import annotations

__all__ = ["UserError", "UserTypeError"]


class UserError(ValueError):
    """What came cannot be used: names the argument as it was typed, what came, and the repair.

    The command line prints such an error as one line. Any other exception is a fault of the package or of code that it
    calls, and keeps its traceback.
    """


class UserTypeError(UserError, TypeError):
    """A :class:`UserError` about an object of the wrong kind."""
