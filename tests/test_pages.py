"""Pages whose figures their own blocks print: docs/pages.py runs them, and here they are compared."""

import importlib.util
import re
from pathlib import Path

import pytest

from nclightning import pictures
from nclightning.metrics import MEASURES
from nclightning.quantities import DECISION_NAMES, QUANTITIES

DOCS = Path(__file__).resolve().parents[1] / "docs"
SLOW = {"tutorials/digits.md", "tutorials/depth.md"}
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGES = load(DOCS / "pages.py")


def unit_of_last_digit(number):
    mantissa, _, exponent = number.partition("e")
    return 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))


def assert_same_figures(printed, shown):
    """The same text; numbers within two units of the last digit shown: another machine may round otherwise."""
    words = [" ".join(NUMBER.sub("#", text).split()) for text in (printed, shown)]
    assert words[0] == words[1]
    for now, then in zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True):
        assert abs(float(now) - float(then)) <= 2 * unit_of_last_digit(then), (now, then)


def case(page):
    name = str(page.relative_to(DOCS))
    return pytest.param(page, id=name, marks=[pytest.mark.slow] * (name in SLOW))


@pytest.fixture
def _nothing_stays():
    """What pages register is forgotten."""
    registries = MEASURES, QUANTITIES, pictures._registered
    before = [dict(each) for each in registries]
    yield
    for each, entries in zip(registries, before, strict=True):
        each.clear()
        each.update(entries)


@pytest.mark.usefixtures("_nothing_stays")
@pytest.mark.parametrize("page", [case(page) for page in PAGES.pages()])
def test_blocks_print_what_the_page_shows(page):
    for printed, shown in zip(PAGES.printed(page), PAGES.shown(page), strict=True):
        assert_same_figures(printed, shown)


def test_figures_that_differ_are_seen():
    assert_same_figures("a 1.24 b 3e-05\n", "a  1.23 b 2e-05\n")
    for printed in ("a 1.26 b 2e-05", "a 1.23 b 5e-05", "c 1.23 b 2e-05", "a 1.23 b"):
        with pytest.raises(AssertionError):
            assert_same_figures(printed, "a 1.23 b 2e-05")


def test_writing_a_page_that_is_right_changes_nothing(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("A\n\n```python\nprint(1 + 1)\n```\n\nB\n\n```python\nx = 1\n```\n\nC\n")
    PAGES.write(page)
    text = page.read_text()
    assert text == "A\n\n```python\nprint(1 + 1)\n```\n\n```text\n2\n```\n\nB\n\n```python\nx = 1\n```\n\nC\n"
    PAGES.write(page)
    assert page.read_text() == text


def test_pictures_that_blocks_save_go_beside_the_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nopen('a.png', 'w').close()\n```\n")
    assert PAGES.printed(page) == [""]
    assert not (tmp_path / "images").exists()
    PAGES.write(page)
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["a.png"]


def test_every_measure_has_its_place_on_a_page():
    pages = [page for page in (DOCS / "numbers").glob("*.md") if page.stem != "index"]
    lines = [line for page in pages for line in page.read_text().splitlines()]
    places = [line for line in lines if line.startswith("#")] + [line.split("|")[1] for line in lines if "|" in line]
    of_pages = {name for place in places for name in re.findall(r"`(\w+)`", place)}
    assert {*MEASURES, *DECISION_NAMES, "nc5", "gap", "distance", "certified_gap", "nrc1", "nrc2", "nrc3"} <= of_pages
    questions = (DOCS / "numbers" / "index.md").read_text().partition("## When to trust")[0]
    assert {*MEASURES, *DECISION_NAMES} <= set(re.findall(r"`(\w+)`", questions))


def test_pictures_of_the_numbers_are_drawn_and_shown(monkeypatch):
    monkeypatch.syspath_prepend(DOCS / "numbers")
    drawn = {name.removesuffix("_picture") for name in load(DOCS / "numbers" / "pictures.py").PICTURES}
    pages = (page.read_text() for page in (DOCS / "numbers").glob("*.md"))
    shown = {name for text in pages for name in re.findall(r"!\[[^\]]+\]\(images/(\w+)\.png\)", text)}
    assert drawn == shown == {path.stem for path in (DOCS / "numbers" / "images").glob("*.png")}


@pytest.mark.parametrize("script", PAGES.tutorials(), ids=lambda script: script.stem)
def test_pages_of_tutorials_are_those_of_their_scripts(script):
    page = script.with_suffix(".md")
    assert PAGES.without_outputs(page) == PAGES.page_of(script), "run: python docs/pages.py"
    saved = set(re.findall(r'savefig\("([\w.]+)"', script.read_text()))
    shown = set(re.findall(r"!\[[^\]]+\]\(images/([\w.]+)\)", page.read_text()))
    assert saved == shown
    assert all((page.parent / "images" / name).exists() for name in saved)
    assert f"]({page.name})" in (page.parent / "index.md").read_text()


def test_links_lead_somewhere():
    for folder in ("numbers", "extend", "tutorials"):
        for page in [*(DOCS / folder).glob("*.md"), DOCS / "start.md"]:
            for target in re.findall(r"\]\(([\w./-]+)\)", page.read_text()):
                assert (page.parent / target).exists(), (page, target)
