"""A report in a browser: no message in its console, curves on its charts, and switches that work."""

import shutil

import numpy as np
import pytest

from nclightning.report import write_report
from tests.recorded import NC, geometric, record

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
GAP = "optimality/gap"
FLAGS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def tab(browser):
    """A tab whose console stays silent."""
    tab, messages = browser.new_page(), []
    tab.on("console", lambda message: messages.append(message.text))
    tab.on("pageerror", lambda error: messages.append(str(error)))
    yield tab
    tab.close()
    assert messages == []


def opened(tab, page, width=1280, scheme="light"):
    tab.set_viewport_size({"width": width, "height": 900})
    tab.emulate_media(color_scheme=scheme)
    tab.goto(page.as_uri())
    tab.wait_for_function("document.body.dataset.drawn !== undefined", timeout=60_000)


def lines(tab):
    """Number of curves that are seen, by chart."""
    return tab.evaluate(
        "[...document.querySelectorAll('.chart')].map((c) => c.querySelectorAll('.scatterlayer .trace').length)"
    )


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for number in range(3):
        curves = {tag: geometric(100, 10, start=10.0**number) for tag in (GAP, *NC)}
        record(folder / f"run <b>{number}", curves, loss="mse", lambda_w=1e-2, lambda_h=1e-3)
    runs = sorted(folder.iterdir())
    return write_report(runs[0], folder / "one.html"), write_report(runs, folder / "three.html")


def test_one_run_is_drawn(tab, pages):
    opened(tab, pages[0])
    assert lines(tab) == [1, 3]
    types = tab.evaluate("[...document.querySelectorAll('.chart')].map((chart) => chart._fullLayout.yaxis.type)")
    assert types == ["log", "log"]


def test_a_run_is_hidden_and_shown_on_all_charts(tab, pages):
    opened(tab, pages[1])
    assert lines(tab) == [3, 3, 3, 3]
    boxes = tab.locator("input[data-run]").all()
    boxes[1].click()
    assert lines(tab) == [2, 2, 2, 2]
    boxes[1].click()
    assert lines(tab) == [3, 3, 3, 3]
    everything, nothing = tab.locator("button[data-all]").all()
    nothing.click()
    assert lines(tab) == [0, 0, 0, 0]
    everything.click()
    assert lines(tab) == [3, 3, 3, 3]


def test_names_are_shown_as_they_are(tab, pages):
    opened(tab, pages[1])
    labels = [label.strip() for label in tab.locator(".toggles label").all_inner_texts()]
    assert labels == [f"run <b>{number}" for number in range(3)]
    assert tab.evaluate("document.getElementById('chart-0').data[0].name") == "run &lt;b&gt;0"


@pytest.mark.parametrize("width", [1280, 500])
def test_the_page_is_no_wider_than_the_screen(tab, pages, width):
    opened(tab, pages[1], width)
    inside, outside = tab.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert inside <= outside


def test_dark_mode_has_dark_paper_and_light_ink(tab, pages):
    paper, *ink = brightness(tab, pages[0], "light")
    assert paper > 200
    assert max(ink) < 100
    paper, *ink = brightness(tab, pages[0], "dark")
    assert paper < 60
    assert min(ink) > 150


def brightness(tab, page, scheme):
    """Of the paper, of text, and of the numbers at an axis: 0 is black, 255 is white."""
    opened(tab, page, scheme=scheme)
    colors = tab.evaluate(
        """() => {
            const style = getComputedStyle(document.body), tick = document.querySelector('.xtick text');
            return [style.backgroundColor, style.color, getComputedStyle(tick).fill];
        }"""
    )
    return [np.mean([int(part) for part in color.strip("rgba()").split(",")[:3]]) for color in colors]
