"""What the pages of the API reference call public.

``docs/check.py`` asks the built site whether each of these names has an entry.
"""

import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import nclightning
from nclightning.commands import COMMANDS, TRAINING

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "docs" / "reference"
INDEX = (REFERENCE / "index.md").read_text()
PUBLIC = {
    module: page.stem
    for page in REFERENCE.glob("*.md")
    for module in re.findall(r"^\.\. automodule:: (\S+)$", page.read_text(), re.MULTILINE)
}
# Packages that export names to other packages of ours.
INTERNAL = {f"nclightning.{name}" for name in ("commands", "compat", "files", "integrations", "probe.sweep", "series")}
FOR_USERS = [
    ROOT / "README.md",
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if path.parent.name not in ("reference", "root")),
    *sorted((ROOT / "docs" / "tutorials").glob("*.py")),
    *sorted((ROOT / "examples").glob("*.py")),
    *sorted((ROOT / "configs").glob("*.yaml")),
]


def names_used(text):
    """Return the pairs of module and name that a text imports from the package, or names as a class path."""
    used = set()
    for module, names in re.findall(r"\bfrom (nclightning[\w.]*) import (\([^)]*\)|[^\n#]*)", text):
        for name in re.findall(r"(\w+)(?: as \w+)?(?:,|$)", " ".join(names.strip("()").split())):
            used.add((module, name))
    used |= {tuple(path.rsplit(".", 1)) for path in re.findall(r"\bclass_path: (nclightning\.[\w.]+\w)", text)}
    return used


def is_public(module, name):
    return f"{module}.{name}" in PUBLIC or (module in PUBLIC and name in importlib.import_module(module).__all__)


def test_each_public_module_stands_in_the_table_and_in_the_menu():
    table = dict(re.findall(r"^\| \[(nclightning[\w.]*)\]\((\w+)\.md\)", INDEX, re.MULTILINE))
    menu = INDEX.partition("```{toctree}")[2].partition("\n\n")[2].split("```")[0].split()
    assert table == PUBLIC
    assert sorted(menu) == sorted(PUBLIC.values())


def test_every_package_that_exports_names_is_public_or_known_as_internal():
    modules = pkgutil.walk_packages(nclightning.__path__, "nclightning.")
    packages = {module.name for module in modules if module.ispkg} | {"nclightning"}
    exporting = {name for name in packages if hasattr(importlib.import_module(name), "__all__")}
    assert not INTERNAL & set(PUBLIC)
    assert exporting - set(PUBLIC) <= INTERNAL <= packages


@pytest.mark.parametrize("path", FOR_USERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_users_read_takes_public_names_only(path):
    assert {use for use in names_used(path.read_text()) if not is_public(*use)} == set()


def test_each_way_to_use_a_name_is_seen():
    text = """
    >>> from nclightning.optim import ArmijoGD, ArmijoLBFGS  # a remark
    from nclightning import functional as F, measure
    from nclightning.probe.results import (
        Reading,
        Other as Another,
    )
    optimizer: {class_path: nclightning.optim.HeavyBall, init_args: {}}
    """
    assert names_used(text) == {
        ("nclightning.optim", "ArmijoGD"),
        ("nclightning.optim", "ArmijoLBFGS"),
        ("nclightning", "functional"),
        ("nclightning", "measure"),
        ("nclightning.probe.results", "Reading"),
        ("nclightning.probe.results", "Other"),
        ("nclightning.optim", "HeavyBall"),
    }
    assert is_public("nclightning", "functional")
    assert is_public("nclightning.optim", "ArmijoGD")
    assert not is_public("nclightning.probe.results", "Reading")
    assert not is_public("nclightning.optim", "Backtracking")


def test_the_page_on_the_command_line_shows_every_command():
    page = (REFERENCE / "commands.md").read_text()
    shown = re.findall(r"program-output\} python -m nclightning (\w+) --help", page)
    assert sorted(shown) == sorted({*COMMANDS, *TRAINING})
