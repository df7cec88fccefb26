"""Command line: ``python -m nclightning COMMAND ...``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from nclightning.commands import COMMANDS, TRAINING, run_training
from nclightning.errors import UserError, nearest
from nclightning.mistakes import user_errors_handled

__all__ = ["main"]


def main(args: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: The words after the program's name; None for those of the process.
    """
    words = sys.argv[1:] if args is None else args
    with user_errors_handled():
        if words and words[0] in COMMANDS:
            COMMANDS[words[0]](words[1:])
        elif not {*words} & {*TRAINING, "-h", "--help"}:
            raise UserError(_no_command(words))
        else:
            run_training(args)


def _no_command(words: Sequence[str]) -> str:
    """Return the error message for a missing or unknown command."""
    names = [*TRAINING, *COMMANDS]
    if not words or words[0].startswith("-"):
        return f"the first word must be a command: {', '.join(names)}."
    return f"there is no command {words[0]!r}, only {', '.join(names)}.{nearest(words[0], names)}"
