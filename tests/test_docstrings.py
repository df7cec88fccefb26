"""What the docstring of a public name must say, by the kind of the name.

==================  ==============================================================================
function            a summary; ``Args`` with every parameter; ``Returns``; an example
measure             the same, and a formula with its source
class               a summary; ``Args`` with every parameter of the constructor; an example
dataclass           the same, where ``Attributes`` do as well as ``Args``
named tuple         a summary; ``Attributes`` with every field. Its example is that of the function that returns it
exception, enum,    a summary
protocol
constant, alias     nothing: Python keeps no docstring for them
==================  ==============================================================================

An example can be copied as it stands: it imports every name that it uses. ``--doctest-modules`` runs all of them.
"""

import ast
import builtins
import dataclasses
import doctest
import enum
import importlib
import inspect
import re
import sys
import textwrap
from typing import Any

import pytest

# The modules whose ``__all__`` is public.
PUBLIC = (
    "nclightning",
    "nclightning.callbacks",
    "nclightning.data",
    "nclightning.errors",
    "nclightning.figures",
    "nclightning.functional",
    "nclightning.metrics",
    "nclightning.models",
    "nclightning.objective",
    "nclightning.optim",
    "nclightning.pictures",
    "nclightning.problems",
    "nclightning.reproduction",
    "nclightning.theory",
)
# Functions of nclightning.functional that measure nothing.
PREPARE = {"class_statistics", "sample_statistics"}
# Measures for which words say all: a share of samples, or a count of directions.
WITHOUT_FORMULA = {"accuracy", "between_class_rank", "ncc_accuracy", "ncc_mismatch", "target_rank"}
# Measures that are this package's own, or textbook definitions.
WITHOUT_SOURCE = {
    *("accuracy", "balance_residual", "between_class_rank", "class_alignment", "dense_hessian", "dense_spectrum"),
    *("distance_to_collapse", "nearest_class_centre", "predict_row_sum", "target_rank"),
}
SOURCE = re.compile(r"\b(?:Paper|erratum E\d+|et al\.|\w+ \(\d{4}\)|arXiv|\(\d{4}\))")


# Names in the ``__all__`` of those modules that serve the package itself.
INTERNAL = {"errors.listed", "errors.nearest", "errors.say_the_same", "objective.dot", "objective.square_norm",
            "objective.wide"}  # fmt: skip


def public_names():
    for module in PUBLIC:
        for name in importlib.import_module(module).__all__:
            yield f"{module.removeprefix('nclightning').lstrip('.')}.{name}".lstrip(".")


def object_of(path):
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(f"nclightning.{module}".rstrip(".")), name)


def sections(docstring):
    """Return the text of each section of a Google-style docstring, the summary and description under ''."""
    parts = re.split(r"^(Args|Attributes|Returns|Yields|Raises|Example|Examples|Note):$", docstring, flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], map(textwrap.dedent, parts[2::2]), strict=True))}


def entries(section):
    """Return the names that a section describes."""
    return {name.strip("*") for name in re.findall(r"^(\*{0,2}\w+)(?: \(.*?\))?:", section, re.MULTILINE)}


def names_not_imported(example):
    """Return the names that an example uses without importing or defining them."""
    tree = ast.parse("".join(each.source for each in doctest.DocTestParser().get_examples(example)))
    bound = {alias.asname or alias.name.split(".")[0] for node in ast.walk(tree)
             if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names}  # fmt: skip
    bound |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    bound |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    bound |= {node.id for node in names if not isinstance(node.ctx, ast.Load)}
    return {node.id for node in names} - bound - vars(builtins).keys()


def parameters(thing):
    """Return the names of the arguments of a function or constructor."""
    if dataclasses.is_dataclass(thing):
        return {field.name for field in dataclasses.fields(thing) if field.init and not field.name.startswith("_")}
    if inspect.isclass(thing):
        own = [kind for kind in thing.__mro__ if "__init__" in vars(kind)]
        if own[0] is object or own[0].__module__.partition(".")[0] != "nclightning":
            return set()
        # A constructor that only hands its arguments on has those of the class that it hands them to.
        thing = inspect.unwrap(own[0].__init__)
    given = inspect.signature(thing).parameters.values()
    return {each.name for each in given if each.kind is not each.VAR_KEYWORD and each.name != "self"}


def is_measure(path, thing):
    return path.startswith("functional.") and inspect.isfunction(thing) and thing.__name__ not in PREPARE


def faults(path, thing):
    """Return what the docstring of a public name leaves out."""
    if thing is Any or not (inspect.isclass(thing) or inspect.isroutine(thing)):
        return []
    if inspect.isclass(thing) and "__doc__" not in vars(thing):
        return ["a docstring of its own"]
    docstring = inspect.getdoc(thing) or ""
    found = []
    parts = sections(docstring)
    summary = parts[""].strip().partition("\n\n")[0]
    if not summary.endswith((".", ":")) or "\n" in summary:
        found.append("a summary of one line")
    if inspect.isclass(thing) and issubclass(thing, BaseException | enum.Enum):
        return found
    if getattr(thing, "_is_protocol", False):
        return found
    described = entries(parts.get("Args", "")) | entries(parts.get("Attributes", ""))
    if hasattr(thing, "_fields"):
        return [*found, *(f"the field {name}" for name in sorted(set(thing._fields) - described))]
    found += [f"the argument {name}" for name in sorted(parameters(thing) - described)]
    if inspect.isroutine(thing) and inspect.signature(thing).return_annotation not in (None, "None") and not (
        {"Returns", "Yields"} & parts.keys()
    ):  # fmt: skip
        found.append("what it returns")
    example = parts.get("Example", parts.get("Examples", ""))
    if ">>>" not in example:
        found.append("an example")
    else:
        found += [f"an import of {name} in the example" for name in sorted(names_not_imported(example))]
    if is_measure(path, thing):
        if ":math:" not in docstring and ".. math::" not in docstring and thing.__name__ not in WITHOUT_FORMULA:
            found.append("a formula")
        if not SOURCE.search(docstring) and thing.__name__ not in WITHOUT_SOURCE:
            found.append("its source")
    return found


# Names whose docstrings are not complete yet. Take out what you complete: a complete one fails here.
INCOMPLETE: set[str] = set()


@pytest.mark.parametrize("path", sorted(set(public_names()) - INTERNAL))
def test_the_docstring_of_a_public_name_is_complete(path):
    found = faults(path, object_of(path))
    if path in INCOMPLETE:
        assert found, f"{path} is complete: take it out of INCOMPLETE"
    else:
        assert found == []


def test_names_that_are_incomplete_are_public():
    assert set(public_names()) >= INCOMPLETE | INTERNAL


def measured(features, scale=1.0):
    r"""Measure something.

    .. math:: x

    Somebody (2020).

    Args:
        features: Rows.
        scale: A factor.

    Returns:
        A number.

    Example:
        >>> import torch
        >>> from tests.test_docstrings import measured
        >>> measured(torch.zeros(()))
        1.0
    """
    return 1.0 + float(features) * scale


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("Measure something.", "Measure something\n    else.", "a summary of one line"),
        ("    .. math:: x\n", "", "a formula"),
        ("Somebody (2020).", "", "its source"),
        ("scale: A factor.", "", "the argument scale"),
        ("Returns:\n        A number.", "", "what it returns"),
        (">>> ", "", "an example"),
        ("        >>> import torch\n", "", "an import of torch in the example"),
    ],
)
def test_each_fault_of_a_docstring_is_seen(old, new, fault, monkeypatch):
    assert faults("functional.measured", measured) == []
    assert old in measured.__doc__
    monkeypatch.setattr(measured, "__doc__", measured.__doc__.replace(old, new))
    assert faults("functional.measured", measured) == [fault]


def test_this_module_is_what_the_example_imports():
    assert sys.modules["tests.test_docstrings"].measured is measured
