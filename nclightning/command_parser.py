"""The parser of the commands that train nothing."""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from typing import NoReturn

from nclightning.compat.parsers import options_of
from nclightning.errors import UserError
from nclightning.wording import of_the_parser

__all__ = ["command_parser"]


class _Parser(ArgumentParser):
    """Says in one sentence what it cannot take."""

    def error(self, message: str) -> NoReturn:
        """Raise it."""
        raise UserError(of_the_parser(message, (), options_of(self)))


def command_parser(name: str, description: str, epilog: str | None = None) -> ArgumentParser:
    """Make the parser of a command.

    Args:
        name: Of the command.
        description: Its purpose.
        epilog: Examples.

    Returns:
        A parser whose mistakes are user errors.
    """
    return _Parser(
        f"python -m nclightning {name}",
        allow_abbrev=False,
        description=description,
        epilog=epilog,
        formatter_class=RawDescriptionHelpFormatter,
    )
