"""One meaning for each word, in names: ``docs/glossary.md`` is the same list in words.

Looked at are the names that the package defines (files, functions, classes, arguments, variables, attributes), word
by word: ``_make_room`` has the words *make* and *room*.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "nclightning"

# Words that no name has, and what to say instead.
BANNED = {
    "apart": "distinct, separate, separation or distance, as it is meant",
    "bend": "curvature",
    "bends": "curvatures",
    "carried": "reused, kept or stored, as it is meant",
    "centres": "class_means",
    "room": "buffer or memory",
    "tap": "hook",
    "taps": "hooks",
    "told": "known, reported or determined, as it is meant",
}

# Words with one meaning, and the names that have it.
ONE_MEANING = {
    "centre": (
        "the mean of the class means, or the verb; the nearest class centre is the literature's name of a classifier",
        "centre centre_means nearest_centre nearest_class_centre NearestClassCentre",
    ),
    "line": (
        "of text or in a figure; a line search is a method's name",
        "line line_search one_line last_line fit_line LineSearchOptimizer LineObjective",
    ),
    "reading": ("a row of logged values", "reading"),
    "readings": (
        "rows of logged values, readings.csv",
        "readings Readings ReadingsTable read_readings least_readings search_readings",
    ),
    "sweep": ("one evaluation pass over a data set", "sweep"),
    "sweeps": ("evaluation passes over a data set", "sweeps"),
}

# Names that are still to be renamed. Take out what you rename.
REMAINING: set[str] = set()


def defined_names(tree):
    """Yield the names that a module defines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def words(name):
    """Split a name of either style into lower-case words."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


def misused(source, stem=""):
    """Return the names that have a banned word, or a word in another than its one meaning."""
    names = {*defined_names(ast.parse(source)), stem}
    found = {name for name in names if words(name) & BANNED.keys()}
    for word, (_, allowed) in ONE_MEANING.items():
        found |= {
            name for name in names if word in words(name) and name.strip("_").lower() not in allowed.lower().split()
        }
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_each_word_in_a_name_has_its_one_meaning(path):
    where = path.relative_to(PACKAGE).with_suffix("").as_posix()
    assert {f"{where}:{name}" for name in misused(path.read_text(), path.stem)} - REMAINING == set()


def test_names_that_remain_exist():
    found = {f"{path.relative_to(PACKAGE).with_suffix('').as_posix()}:{name}"
             for path in FILES for name in misused(path.read_text(), path.stem)}  # fmt: skip
    assert found >= REMAINING


@pytest.mark.parametrize(
    "source",
    [
        "def make_room(): pass",
        "class HookTap: pass",
        "def f(apart): pass",
        "bend = 1",
        "self._carried = 1",
        "class ClosureLine: pass",
        "def reading_of(): pass",
        "for told in (): pass",
    ],
)
def test_each_way_to_misuse_a_word_is_seen(source):
    assert misused(source)


@pytest.mark.parametrize(
    "source", ["def line_search(): pass", "for line in text: pass", "tapes = 1", "roomy = 1", "readings = []"]
)
def test_other_words_are_let_be(source):
    assert not misused(source)


def test_the_glossary_has_each_word():
    page = (ROOT / "docs" / "glossary.md").read_text()
    missing = [word for word in (*BANNED, *ONE_MEANING) if not re.search(rf"\b{word}\b", page)]
    assert missing == []
