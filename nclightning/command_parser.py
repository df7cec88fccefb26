"""The parser of commands other than ``fit``, ``validate`` and ``test``."""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from typing import NoReturn

from nclightning.compat.parsers import options_of
from nclightning.errors import UserError
from nclightning.wording import sentence_for_parser_error

__all__ = ["command_parser"]


class _Parser(ArgumentParser):
    """A parser that raises a :class:`UserError` instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        """Raise the error in one sentence."""
        raise UserError(sentence_for_parser_error(message, (), options_of(self)))


def command_parser(name: str, description: str, epilog: str | None = None) -> ArgumentParser:
    """Construct the parser of a command.

    Args:
        name: Name of the command.
        description: Its purpose.
        epilog: Examples.

    Returns:
        A parser that raises a :class:`UserError` for wrong options.
    """
    return _Parser(
        f"python -m nclightning {name}",
        allow_abbrev=False,
        description=description,
        epilog=epilog,
        formatter_class=RawDescriptionHelpFormatter,
    )
