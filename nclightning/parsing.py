"""The parser of ``fit``, ``validate`` and ``test``, with the paper's lambda, checked YAML, and errors in one line."""

from __future__ import annotations

import inspect
import sys
from argparse import ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Collection, Sequence
from itertools import islice
from pydoc import locate
from typing import Any, NoReturn

import yaml
from jsonargparse import ActionConfigFile, DefaultHelpFormatter, get_loader, set_loader  # type: ignore[attr-defined]
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_only

from nclightning.arguments import name_lambda
from nclightning.compat.parsers import groups_of
from nclightning.configurations import check_yaml, find_configuration, read_configuration, shipped_configs
from nclightning.errors import UserError
from nclightning.models import RegularizedClassifier
from nclightning.wording import option_of, sentence_for_parser_error

__all__ = ["ConfigFile", "HelpFormatter", "ParserMessage", "RunParser", "in_order", "takes_lambda"]

# Arguments of each model that accepts lambda.
_ARGUMENTS_WITH_LAMBDA = {"lambda_w", "lambda_h", "lambda_", "samples_per_class"}


def _load(text: str) -> Any:
    """Load YAML text as jsonargparse does, after a check."""
    check_yaml(text)
    return get_loader("yaml")(text)


# A mode of jsonargparse that checks all YAML text, in files and on the command line.
_MODE = "checked_yaml"
set_loader(_MODE, _load, (yaml.YAMLError,))


def takes_lambda(model: Any, arguments: Collection[str]) -> bool:
    """Return whether a model accepts the paper's lambda, which sets both of its penalties.

    Args:
        model: A class, or its import path.
        arguments: Names of its arguments.

    Returns:
        True for the models of this package, and for subclasses with the same arguments.
    """
    model = locate(model) if isinstance(model, str) else model
    return (
        inspect.isclass(model) and issubclass(model, RegularizedClassifier) and set(arguments) >= _ARGUMENTS_WITH_LAMBDA
    )


def in_order(words: Sequence[str]) -> list[str]:
    """Move configurations before other options, which then override them, and replace ``--lambda`` by its full name.

    Args:
        words: The command line.

    Returns:
        The words for the parser.
    """
    command, first, others = list(words[:1]), list[str](), list[str]()
    rest = iter(words[1:])
    for word in rest:
        name, equals, value = word.partition("=")
        if name in ("-c", "--config"):
            first += [word] if equals else [word, *islice(rest, 1)]
        elif name == "--lambda":
            others += [f"--model.init_args.lambda={value if equals else next(rest, '')}"]
            if others[-1].endswith("="):
                raise UserError("--lambda needs a value, such as --lambda 5e-3.")
        else:
            others.append(word)
    return [*command, *first, *others]


class ParserMessage(Exception):
    """An error message of the parser, possibly of several lines."""

    source = ""  # The option that named the configuration with the error.

    def sentence(self, words: Sequence[str], options: Sequence[str]) -> UserError:
        """Convert the message to an error in one sentence.

        Args:
            words: The command line.
            options: All options, as they are written on the command line.

        Returns:
            The error to raise.
        """
        cause = self.__cause__
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            return UserError(sentence_for_parser_error(str(self), words, options, self.source))
        place = self.source or option_of(str(self), words)
        return UserError(f"{place}: {cause}" if place else str(cause))


class RunParser(LightningArgumentParser):
    """A parser that accepts ``lambda`` as an argument of this package's models, and raises :class:`ParserMessage`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.parser_mode = _MODE
        self._takes_lambda = False

    def add_class_arguments(self, theclass: Any, *args: Any, **kwargs: Any) -> list[str]:
        """Add the arguments of a class, and record whether it accepts ``lambda``."""
        added: list[str] = super().add_class_arguments(theclass, *args, **kwargs)
        self._takes_lambda = takes_lambda(theclass, added)
        return added

    def parse_object(self, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Parse the arguments of a class. If it accepts ``lambda``, rename this to ``lambda_`` first."""
        if self._takes_lambda:
            name_lambda(obj)
        return super().parse_object(obj, *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the message. The caller, which has the whole command line, converts it to a sentence."""
        if not self.exit_on_error:  # This is the parser of a class. The outer parser has more information.
            super().error(message, ex)
        raise ParserMessage(message) from ex


class HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """A help formatter that keeps the line breaks of the examples."""


class ConfigFile(ActionConfigFile):
    """``--config``: a file, or the name of a shipped configuration."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Resolve the name, check the file, and pass its path to jsonargparse. Paths in the file are relative to it."""
        path = find_configuration(values)
        content = read_configuration(path)
        for name in groups_of(parser):
            if not isinstance(content.get(name, {}), dict | str):
                found = type(content[name]).__name__
                raise UserError(f"--config {values}: {name}: expected a mapping of options, got {found}.")
        if path in shipped_configs().values():
            rank_zero_only(print)(f"Using the shipped configuration {path}", file=sys.stderr)
        try:
            super().__call__(parser, cfg, str(path), option_string)  # type: ignore[no-untyped-call]
        except (ParserMessage, TypeError, ValueError, KeyError, ArgumentError) as error:
            message = error if isinstance(error, ParserMessage) else ParserMessage(str(error))
            message.source = f"--config {values}"
            raise message from error.__cause__ if message is error else error
