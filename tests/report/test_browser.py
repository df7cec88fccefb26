"""A report in a browser: no message in its console, curves on its charts, and switches that work."""

import shutil

import numpy as np
import pytest

from nclightning.report import write_report
from tests.recorded import NC, geometric, record

webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
pytestmark = pytest.mark.skipif(None in (CHROMIUM, DRIVER), reason="needs chromium and chromedriver")
GAP = "optimality/gap"
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def opened(browser, page, width=1280, scheme="light"):
    browser.set_window_size(width, 900)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(page.as_uri())
    wait = pytest.importorskip("selenium.webdriver.support.wait").WebDriverWait(browser, 60)
    wait.until(lambda b: b.execute_script("return document.body.dataset.drawn !== undefined"))
    assert browser.get_log("browser") == []


def lines(browser):
    """Number of curves that are seen, by chart."""
    return browser.execute_script(
        "return [...document.querySelectorAll('.chart')].map((c) => c.querySelectorAll('.scatterlayer .trace').length)"
    )


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for number in range(3):
        curves = {tag: geometric(100, 10, start=10.0**number) for tag in (GAP, *NC)}
        record(folder / f"run <b>{number}", curves, loss="mse", lambda_w=1e-2, lambda_h=1e-3)
    runs = sorted(folder.iterdir())
    return write_report(runs[0], folder / "one.html"), write_report(runs, folder / "three.html")


def test_one_run_is_drawn(browser, pages):
    opened(browser, pages[0])
    assert lines(browser) == [1, 3]
    types = browser.execute_script(
        "return [...document.querySelectorAll('.chart')].map((chart) => chart._fullLayout.yaxis.type)"
    )
    assert types == ["log", "log"]


def test_a_run_is_hidden_and_shown_on_all_charts(browser, pages):
    opened(browser, pages[1])
    assert lines(browser) == [3, 3, 3, 3]
    boxes = browser.find_elements("css selector", "input[data-run]")
    boxes[1].click()
    assert lines(browser) == [2, 2, 2, 2]
    boxes[1].click()
    assert lines(browser) == [3, 3, 3, 3]
    everything, nothing = browser.find_elements("css selector", "button[data-all]")
    nothing.click()
    assert lines(browser) == [0, 0, 0, 0]
    everything.click()
    assert lines(browser) == [3, 3, 3, 3]
    assert browser.get_log("browser") == []


def test_names_are_shown_as_they_are(browser, pages):
    opened(browser, pages[1])
    labels = [label.text for label in browser.find_elements("css selector", ".toggles label")]
    assert labels == [f"run <b>{number}" for number in range(3)]
    assert browser.execute_script("return document.getElementById('chart-0').data[0].name") == "run &lt;b&gt;0"


@pytest.mark.parametrize("width", [1280, 500])
def test_the_page_is_no_wider_than_the_screen(browser, pages, width):
    opened(browser, pages[1], width)
    inside, outside = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert inside <= outside


def test_dark_mode_has_dark_paper_and_light_ink(browser, pages):
    paper, *ink = brightness(browser, pages[0], "light")
    assert paper > 200
    assert max(ink) < 100
    paper, *ink = brightness(browser, pages[0], "dark")
    assert paper < 60
    assert min(ink) > 150


def brightness(browser, page, scheme):
    """Of the paper, of text, and of the numbers at an axis: 0 is black, 255 is white."""
    opened(browser, page, scheme=scheme)
    colors = browser.execute_script(
        "const style = getComputedStyle(document.body), tick = document.querySelector('.xtick text');"
        "return [style.backgroundColor, style.color, getComputedStyle(tick).fill]"
    )
    return [np.mean([int(part) for part in color.strip("rgba()").split(",")[:3]]) for color in colors]
