"""Undocumented names of argparse and jsonargparse."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterable
from typing import Any

__all__ = ["groups_of", "options_of"]


def options_of(parser: ArgumentParser) -> list[str]:
    """Return the options of a parser as they are typed.

    Non-public: ``ArgumentParser._actions`` (Python 3.10-3.13). Without it the error for a misspelt option could not
    suggest the right one.

    Args:
        parser: A parser of argparse.
    """
    return [option for action in parser._actions for option in action.option_strings]


def groups_of(parser: Any) -> Iterable[str]:
    """Return the names of the groups of options, which may be sections of a configuration.

    Non-public: ``ArgumentParser.groups`` (jsonargparse 4.53). Without it the error for a section that is a number would
    not name the section.

    Args:
        parser: A parser of jsonargparse.
    """
    names: Iterable[str] = parser.groups
    return names
