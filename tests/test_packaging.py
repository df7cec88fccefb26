"""What is published agrees with itself: bounds and their table, versions, the description on PyPI."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import nclightning

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest needs the other one.
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BOUNDS = [Requirement(each) for each in PROJECT["project"]["dependencies"]]
BOUNDS += [Requirement(each) for each in PROJECT["project"]["optional-dependencies"]["huggingface"]]
TABLE = {
    name.lower(): (Version(lowest), Version(newest))
    for name, lowest, newest in re.findall(
        r"^\| ([\w.-]+) \| ([\d.]+) \| ([\d.]+) \|$", (ROOT / "docs" / "compatibility.md").read_text(), re.MULTILINE
    )
}


def bound(requirement, operator):
    return next((Version(each.version) for each in requirement.specifier if each.operator == operator), None)


def test_the_table_has_a_row_for_each_dependency():
    assert TABLE.keys() == {"python", *(each.name.lower() for each in BOUNDS)}


@pytest.mark.parametrize("requirement", BOUNDS, ids=lambda each: each.name)
def test_bounds_are_the_versions_that_the_suite_ran_under(requirement):
    lowest, newest = TABLE[requirement.name.lower()]
    assert bound(requirement, ">=") == lowest
    assert newest in requirement.specifier
    assert (bound(requirement, "<") is None) == (requirement.name != "lightning")


def test_python_versions_are_those_between_lowest_and_newest():
    lowest, newest = TABLE["python"]
    assert PROJECT["project"]["requires-python"] == f">={lowest.major}.{lowest.minor}"
    said = [re.search(r":: 3\.(\d+)$", each) for each in PROJECT["project"]["classifiers"]]
    assert [int(each[1]) for each in said if each] == list(range(lowest.minor, newest.minor + 1))


def test_compat_was_seen_with_a_lightning_within_the_bounds():
    (lightning,) = [each for each in BOUNDS if each.name == "lightning"]
    seen = set(re.findall(r"lightning\s+(\d\.\d+)", (ROOT / "nclightning" / "compat" / "lightning.py").read_text()))
    assert {Version(each) in lightning.specifier for each in seen} == {True}


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == nclightning.__version__
    assert citation["license"] == PROJECT["project"]["license"]


def test_the_description_on_pypi_points_at_nothing_that_is_not_there():
    text = (ROOT / "README.md").read_text()
    assert re.search(r"\]\((?!https?:)", text)  # There is something to change.
    for each in PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(each["pattern"], each["replacement"], text)
    # Links to other sites, and within the page.
    assert re.findall(r"\]\((?!https?:|#)[^)]*\)", text) == []
    assert "<img" not in text


@pytest.mark.parametrize("name", ["CHANGELOG", "CONTRIBUTING", "README", "RELEASING", "SECURITY"])
def test_links_of_the_pages_at_the_root_lead_somewhere(name):
    text = (ROOT / f"{name}.md").read_text()
    anchors = {
        re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }
    for target in re.findall(r"\]\((?!https?:|<)([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        # A forge's own files are no part of the source distribution.
        assert not path or path.startswith(".github") or (ROOT / path).exists(), target
        assert path or anchor in anchors, target


@pytest.mark.parametrize("script", ["run", "suite"])
def test_scripts_parse(script):
    subprocess.run(["bash", "-n", ROOT / ".ci" / script], check=True)


def test_a_word_that_is_no_run_of_the_suite_is_refused():
    done = subprocess.run([ROOT / ".ci" / "suite", "oldest"], check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert ".ci/suite lowest" in done.stderr
