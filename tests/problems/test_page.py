"""docs/problems.md says what the code does."""

import doctest
import importlib.util
from pathlib import Path

from nclightning import problems

DOCS = Path(__file__).resolve().parents[2] / "docs"


def load():
    spec = importlib.util.spec_from_file_location("problems_page", DOCS / "problems.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_of_this_code():
    page = load()
    table = page.PAGE.read_text().partition(page.BEGIN)[2].partition(page.END)[0]
    assert table == page.table(), "run: python docs/problems.py"


def test_every_member_is_in_the_table():
    listed = {name for name, _, _ in load().MEMBERS}
    members = {
        n for n in problems.__all__ if getattr(problems, n).__module__.startswith("nclightning.problems.members")
    }
    assert members - {"regression_gram"} == listed


def test_what_the_page_shows():
    result = doctest.testfile(str(DOCS / "problems.md"), module_relative=False)
    assert result.attempted > 5
    assert not result.failed


def test_the_example_is_short_enough_to_copy():
    assert len((DOCS.parent / "examples" / "problems" / "squared_hinge.py").read_text().splitlines()) < 60
