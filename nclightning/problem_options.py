"""Construction of a problem from the options of the command ``theory``."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pydoc import ErrorDuringImport, locate
from typing import Any

import yaml

from nclightning import problems
from nclightning.arguments import resolve_lambdas
from nclightning.configurations import find_configuration, model_arguments, parse_yaml, yaml_problem
from nclightning.errors import UserError, nearest
from nclightning.problems import Problem
from nclightning.theory import UFMProblem

__all__ = ["problem_names", "problem_of", "split_options"]

_MAX_SIZE = 10**15  # Products of sizes must not overflow.
_SIZES = ("num_classes", "samples_per_class", "feature_dim")
_PREFIX = "--problem."


def problem_names() -> list[str]:
    """List the functions of :mod:`nclightning.problems` that return a problem."""
    makers = {name: getattr(problems, name) for name in problems.__all__}
    return [
        name
        for name, each in makers.items()
        if inspect.isfunction(each) and inspect.signature(each).return_annotation in ("Problem", Problem)
    ]


def split_options(words: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Split ``--problem.ARGUMENT VALUE`` off a command line.

    Args:
        words: The command line.

    Returns:
        The other words, and the values by argument, read as YAML.

    Raises:
        ValueError: If a value is missing, or is not YAML.
    """
    others, values, rest = list[str](), dict[str, Any](), iter(words)
    for word in rest:
        option, equals, value = word.partition("=")
        if not option.startswith(_PREFIX):
            others.append(word)
            continue
        text = value if equals else next(rest, "")
        if not text or text.startswith("--"):
            raise UserError(f"{option} needs a value.")
        try:
            read = parse_yaml(text)
            # 100,10,1 is a list, too, because some shells interpret brackets.
            is_list = isinstance(read, str) and "," in read
            values[option.removeprefix(_PREFIX)] = parse_yaml(f"[{text}]") if is_list else read
        except yaml.YAMLError as error:
            raise UserError(f"{option}: {yaml_problem(error)}.") from error
        except ValueError as error:
            raise UserError(f"{option}: {error}") from error
    return others, values


def problem_of(given: Mapping[str, Any], arguments: Mapping[str, Any]) -> UFMProblem | Problem:
    """Construct the problem from options, which override those of a configuration.

    Args:
        given: Options of ``theory`` by name; None for options that are not given.
        arguments: Arguments of the problem, from :func:`split_options`.

    Returns:
        The named problem; without a name, one of the paper's two problems.

    Raises:
        ValueError: If an option is missing, has the wrong type, or is out of range.
    """
    options: dict[str, Any] = {}
    if given["config"] is not None:
        options = model_arguments(find_configuration(given["config"]))
        if options.get("penalty", "features") != "features":
            raise UserError(
                f"--config {given['config']}: penalty={options['penalty']!r} has no closed form, only 'features' has."
            )
    named = options.get("problem") if given["problem"] is None else given["problem"]
    if named is not None:
        return _any_problem(named, given, arguments)
    if arguments:
        raise UserError(
            f"{_PREFIX}{next(iter(arguments))} needs --problem NAME, or a --config whose model has a problem."
        )
    if given["lambda_"] is not None:  # It overrides both penalties of a configuration, as in a fit.
        options = options | {"lambda_w": None, "lambda_h": None}
    options = options | {name: value for name, value in given.items() if value is not None}
    for name in ("loss", *_SIZES):
        if options.get(name) is None:
            raise UserError(f"{name} is missing: give --{name}, or a --config that has it.")
    single, lambda_w, lambda_h = (_number(name, options.get(name)) for name in ("lambda_", "lambda_w", "lambda_h"))
    sizes = [options[name] for name in _SIZES]
    for name, size in zip(_SIZES, sizes, strict=True):
        if isinstance(size, bool) or not isinstance(size, int) or not 0 < size < _MAX_SIZE:
            raise UserError(f"{name} must be an integer between 1 and {_MAX_SIZE:.0e}, got {size!r}.")
    K, n, d = sizes
    return UFMProblem(options["loss"], K, n, d, *resolve_lambdas(lambda_w, lambda_h, single, n))


def _number(name: str, value: Any) -> float | None:
    """Convert a value of a configuration to a number. YAML reads 1e-4 as text."""
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{name.rstrip('_')} must be a number, got {value!r}.") from None
    if math.isfinite(number) and number != 0 and not 1e-100 < abs(number) < 1e100:
        raise UserError(f"{name.rstrip('_')} must be between 1e-100 and 1e100, got {value!r}.")
    return number


def _any_problem(named: Any, given: Mapping[str, Any], arguments: Mapping[str, Any]) -> Problem:
    """Construct the problem of a name or a description, with the other options as its arguments."""
    for option, reason in (
        ("loss", "the problem has its loss."),
        ("lambda_", "it is for balanced classes. Give --lambda_w and --lambda_h."),
    ):
        if given[option] is not None:
            raise UserError(f"--{option.rstrip('_')} does not go with a problem: {reason}")
    if isinstance(named, str):
        named = {"class_path": named}
    if not isinstance(named, Mapping):
        raise UserError(f"problem must be a name, or a mapping with class_path and init_args, got {named!r}.")
    if "class_path" not in named:
        raise UserError(f"problem: class_path is missing, got {', '.join(map(str, named))}.")
    path = _path_of(named["class_path"], "problem" if given["problem"] is None else "--problem")
    values = dict(named.get("init_args") or {})
    names = (*_SIZES, "lambda_w", "lambda_h")
    values |= dict(arguments) | {name: given[name] for name in names if given[name] is not None}
    values = _in_numbers(values)
    _check_names(path, values)
    try:
        return Problem.from_description({"class_path": path, "init_args": values})
    except UserError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:  # For example a value that torch cannot convert to a tensor.
        if "memory" in str(error):
            raise
        raise UserError(f"problem: {path.rpartition('.')[2]} cannot be constructed: {error}.") from error


def _path_of(name: Any, option: str) -> str:
    """Return the import path of a problem by its name."""
    if isinstance(name, str) and "." in name:
        return name
    if name not in problem_names():
        known = problem_names()
        raise UserError(f"{option} {name}: no such problem.{nearest(str(name), known)} There are {', '.join(known)}.")
    return f"nclightning.problems.{name}"


def _check_names(path: str, values: Mapping[str, Any]) -> None:
    """Raise if an argument is misspelt or missing. The message names its option."""
    try:
        parameters = inspect.signature(locate(path)).parameters  # type: ignore[arg-type]
    except (ErrorDuringImport, TypeError, ValueError):  # Its construction raises the error.
        return
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return
    short = path.rpartition(".")[2]
    for name in values:
        if name not in parameters:
            raise UserError(
                f"{_PREFIX}{name}: {short} has no argument {name!r}.{nearest(name, parameters)} It has "
                f"{', '.join(parameters)}."
            )
    missing = [name for name, each in parameters.items() if each.default is each.empty and name not in values]
    if missing:
        raise UserError(f"{missing[0]} is missing: give {_PREFIX}{missing[0]}.")


def _in_numbers(value: Any) -> Any:
    """Convert text to numbers where possible. YAML reads 1e-4 as text."""
    if isinstance(value, Mapping):
        return {name: _in_numbers(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_in_numbers(each) for each in value]
    if isinstance(value, str):
        with suppress(ValueError):
            return int(value)
        with suppress(ValueError):
            return float(value)
    return value
