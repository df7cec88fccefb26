"""Import of classes and functions that the user names, and construction of objects from them."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from nclightning.errors import UserError, nearest
from nclightning.parsing import ParserMessage, RunParser
from nclightning.wording import one_line

__all__ = ["call_with", "construct", "import_named"]


def import_named(option: str, path: str) -> Any:
    """Import a class or function by name. The working directory is searched, too.

    Args:
        option: The option that named it, for messages.
        path: ``module:Class``, or ``module.Class``.

    Raises:
        ValueError: If it does not exist, or its module cannot be imported.
    """
    module_name, _, name = path.partition(":") if ":" in path else path.rpartition(".")
    if not module_name or not name:
        raise UserError(f"{option} {path}: expected module:Class, such as my_project.models:Net.")
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name + ".").startswith(error.name + "."):
            raise UserError(
                f"{option} {path}: there is no Python module {error.name!r}, here or installed. Start the command in "
                "the folder of your project, or set PYTHONPATH."
            ) from error
        raise UserError(f"{option} {path}: {module_name} cannot be imported: {one_line(error)}") from error
    except Exception as error:
        raise UserError(
            f"{option} {path}: {module_name} cannot be imported: {type(error).__name__}: {one_line(error)}"
        ) from error
    for each in name.split("."):
        if not hasattr(found, each):
            raise UserError(f"{option} {path}: there is no {each!r} in {module_name}.{nearest(each, dir(found))}")
        found = getattr(found, each)
    return found


def construct(kind: Any, arguments: Mapping[str, Any], where: str) -> Any:
    """Construct an object from the arguments of a configuration, as LightningCLI does.

    Args:
        kind: The class.
        arguments: Arguments by name. Objects among them have the form of ``class_path`` and ``init_args``.
        where: Name of the configuration, for messages.

    Raises:
        ValueError: If an argument is missing, unknown or has the wrong type.
    """
    if not inspect.isclass(kind):
        return call_with(kind, arguments, where)
    parser = RunParser()
    parser.add_class_arguments(kind, "object", fail_untyped=False)
    try:
        return parser.instantiate_classes(parser.parse_object({"object": dict(arguments)})).object
    except ParserMessage as message:
        message.source = where
        raise _without_group(message.sentence((), ())) from message


def _without_group(error: UserError) -> UserError:
    return UserError(re.sub(r"\b(?:object|init_args)\.", "", str(error)))


def call_with(kind: Callable[..., Any], arguments: Mapping[str, Any], where: str) -> Any:
    """Call a class or function with the arguments that it has; others are ignored.

    Raises:
        ValueError: If a required argument is missing.
    """
    parameters = inspect.signature(kind).parameters
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    given = {name: value for name, value in arguments.items() if takes_any or name in parameters}
    missing = [
        name
        for name, each in parameters.items()
        if each.default is each.empty and each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL) and name not in given
    ]
    if missing:
        raise UserError(
            f"{where}: {getattr(kind, '__name__', kind)} needs {', '.join(missing)}: give a --config with its "
            "init_args."
        )
    return kind(**given)
