"""Names of argparse and jsonargparse that their documentation does not promise."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterable
from typing import Any

__all__ = ["groups_of", "options_of"]


def options_of(parser: ArgumentParser) -> list[str]:
    """List the options of a parser as they are typed.

    Non-public: ``ArgumentParser._actions`` (Python 3.10-3.13). Without it a misspelt option would be refused without
    the one that was meant.

    Args:
        parser: Of argparse.
    """
    return [option for action in parser._actions for option in action.option_strings]


def groups_of(parser: Any) -> Iterable[str]:
    """Return the names of the groups of options that a configuration may have as sections.

    Non-public: ``ArgumentParser.groups`` (jsonargparse 4.53). Without it a section that holds a number would be refused
    without its name.

    Args:
        parser: Of jsonargparse.
    """
    names: Iterable[str] = parser.groups
    return names
