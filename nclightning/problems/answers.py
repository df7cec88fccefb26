"""Answers that do not exist."""

from __future__ import annotations

from nclightning.errors import UserError

__all__ = ["NoAnswer"]


class NoAnswer(UserError):
    """A question that has no answer for this problem, or none that is known; the message says why.

    Attributes:
        question: Name of what was asked for, as :meth:`nclightning.problems.Problem.answers` lists it.
        reason: Why there is no answer, one sentence.
    """

    def __init__(self, question: str, reason: str) -> None:
        super().__init__(f"{question}: {reason}")
        self.question, self.reason = question, reason

    def __reduce__(self) -> tuple[type[NoAnswer], tuple[str, str]]:
        """Pickle with both arguments, which the message alone does not give back."""
        return type(self), (self.question, self.reason)
