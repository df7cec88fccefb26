"""The error for questions about a problem that have no answer."""

from __future__ import annotations

from nclightning.errors import UserError

__all__ = ["NoAnswer"]


class NoAnswer(UserError):
    """A question about a problem has no answer, or no known one. The message says why.

    Attributes:
        question: The question, by its name in :meth:`nclightning.problems.Problem.answers`.
        reason: Why there is no answer, in one sentence.
    """

    def __init__(self, question: str, reason: str) -> None:
        super().__init__(f"{question}: {reason}")
        self.question, self.reason = question, reason

    def __reduce__(self) -> tuple[type[NoAnswer], tuple[str, str]]:
        """Pickle both arguments, which cannot be recovered from the message."""
        return type(self), (self.question, self.reason)
