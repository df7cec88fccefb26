"""Conversion of problems to plain values, for configurations and checkpoints, and back."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pydoc import ErrorDuringImport, locate
from typing import TYPE_CHECKING, Any, get_type_hints

import numpy as np
from torch import Tensor

from nclightning.errors import UserError
from nclightning.problems.loss import Loss

if TYPE_CHECKING:
    from nclightning.problems.problem import Problem

__all__ = ["ARGUMENTS", "describe", "from_description"]

# Arguments of a Problem, which are also its attributes.
ARGUMENTS = ("loss", "targets", "counts", "feature_dim", "lambda_w", "lambda_h", "bias", "tolerance")


def describe(problem: Problem) -> dict[str, Any]:
    """Describe a problem by mappings, lists, numbers and strings.

    Args:
        problem: The problem. Its loss must have an attribute for each argument of its constructor, of the same name.

    Returns:
        ``class_path`` and ``init_args`` of :class:`nclightning.problems.Problem`, as in a configuration.

    Raises:
        ValueError: If the loss lacks such an attribute.
    """
    loss = {"class_path": _path_of(type(problem.loss)), "init_args": _arguments_of(problem.loss)}
    special = {"loss": loss, "targets": "hard" if problem.has_hard_labels else _plain(problem.targets)}
    others = {name: _plain(getattr(problem, name)) for name in ARGUMENTS if name not in special}
    return {"class_path": "nclightning.problems.Problem", "init_args": special | others}


def from_description(kind: type[Problem], description: Mapping[str, Any]) -> Problem:
    """Make a problem from the result of :func:`describe`, or from a configuration.

    A description may come from somebody else's checkpoint. A function is called only if its return annotation says that
    it makes a problem. The module that ``class_path`` names is imported in any case.

    Args:
        kind: :class:`nclightning.problems.Problem`.
        description: ``class_path`` and ``init_args``. The path names :class:`nclightning.problems.Problem`, or a
            function whose return annotation is that class.

    Returns:
        The problem.

    Raises:
        ValueError: If the description is not that of a problem.
    """
    if "class_path" not in description:
        raise UserError(f"problem: class_path is missing, got {', '.join(description)}.")
    arguments = dict(description.get("init_args") or {})
    loss = arguments.get("loss")
    if isinstance(loss, Mapping) and "class_path" in loss:
        arguments["loss"] = _made(loss["class_path"], loss.get("init_args") or {}, "problem.loss", Loss)
    made = _made(description["class_path"], arguments, "problem", kind, functions=True)
    if not isinstance(made, kind):
        raise UserError(f"problem: {description['class_path']} made a {type(made).__name__} instead of a Problem.")
    return made


def _made(path: str, arguments: Mapping[str, Any], name: str, kind: type, functions: bool = False) -> Any:
    """Import a class or function by its path, and call it with arguments."""
    try:
        maker: Any = locate(path)
    except ErrorDuringImport as error:
        raise UserError(f"{name}: {path} cannot be imported ({error.value}).") from error
    made = maker if isinstance(maker, type) else _declared(maker) if functions else None
    if not (isinstance(made, type) and issubclass(made, kind)):
        expected = f"a subclass of {kind.__name__}"
        if functions:
            expected = f"a function that makes a {kind.__name__} and says so, `def make(...) -> {kind.__name__}`"
        local = " where it can be imported: define it at the top level of a module, or give problem= anew"
        raise UserError(f"{name}: {path} is not {expected}{local if '<locals>' in path else ''}.")
    try:
        return maker(**arguments)
    except TypeError as error:
        raise UserError(f"{name}: {path}: {error}.") from error


def _declared(function: Any) -> Any:
    """Return the annotation of what a function returns; None if it has none."""
    try:
        return get_type_hints(function).get("return")
    except (TypeError, NameError):  # Not a function, or its annotation uses a name that is imported for types only.
        return None


def _path_of(cls: type) -> str:
    """Return the import path of a class."""
    module = "nclightning.problems" if cls.__module__.startswith("nclightning.problems.") else cls.__module__
    return f"{module}.{cls.__qualname__}"


def _arguments_of(loss: Loss) -> dict[str, Any]:
    """Return the arguments with which a loss was made, from its attributes."""
    names = [name for name in inspect.signature(type(loss)).parameters if name not in ("args", "kwargs")]
    missing = [name for name in names if not hasattr(loss, name)]
    if missing:
        raise UserError(
            f"{type(loss).__name__} keeps no attribute {missing[0]!r} with the argument of that name, so that a "
            "checkpoint cannot hold it: set it in __init__, or make the loss a dataclass."
        )
    others = [name for name in vars(loss) if name not in names and not name.startswith("_")]
    if others:
        raise UserError(
            f"{type(loss).__name__} has the attribute {others[0]!r} beside the arguments of its constructor, so that a "
            "checkpoint cannot hold it: make it an argument, or begin its name with an underscore if it follows from "
            "the others."
        )
    return {name: _plain(getattr(loss, name)) for name in names}


def _plain(value: Any) -> Any:
    """Convert tensors and NumPy values to Python numbers: a checkpoint that is loaded safely cannot contain them."""
    return value.tolist() if isinstance(value, Tensor | np.ndarray | np.generic) else value
