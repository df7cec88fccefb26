"""Open every page of the built site in a headless browser and look for faults.

    python docs/build.py && python docs/check.py [FOLDER]

No page may report an error, lack a picture, show a formula as text, or be wider than a telephone's screen. The search
must find what it should, also where the site is opened as files. Dark mode must change the background but not that of
pictures, and every public name must have an entry. Chromium comes from the system (``apt-get install chromium``) or
from ``playwright install chromium``.
"""

import functools
import http.server
import shutil
import sys
import threading
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from PIL import Image
from playwright.sync_api import TimeoutError as LateError
from playwright.sync_api import sync_playwright
from sphinx.util.inventory import InventoryFile

FLAGS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
SEARCHES = {"minority collapse": "problems/unbalanced_ce", "NeuralCollapseMonitor": "reference/callbacks"}
RENDERED = "[...document.querySelectorAll('.math')].every(e => e.querySelector('mjx-container'))"
LOADED = "[...document.images].every(i => (i.loading = 'eager') && i.complete)"
BROKEN = "[...document.images].filter(i => !i.naturalWidth).map(i => i.src)"
EXCESS = "document.documentElement.scrollWidth - window.innerWidth"
BACKGROUND = "getComputedStyle(document.body).backgroundColor"
FOR_US = {"nclightning.objective": {"LossName", "Scalar", "dot", "square_norm", "wide"}}  # Shared by modules of ours.
WITHOUT_CONTENT = ("genindex.html", "py-modindex.html", "search.html")


@contextmanager
def served(site):
    """Serve a folder on this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@contextmanager
def opened():
    """Open a page in Chromium."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        yield browser.new_page(viewport=WIDE)
        browser.close()


def holds(page, expression):
    """Say whether an expression becomes true within ten seconds."""
    try:
        page.wait_for_function(expression, timeout=10_000)
    except LateError:
        return False
    return True


def faults_of_pages(page, root, names):
    """Yield what is wrong with each page."""
    messages = []
    page.on("console", lambda message: messages.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: messages.append(str(error)))
    for name in names:
        page.goto(f"{root}/{name}")
        if not holds(page, RENDERED):
            yield f"{name}: a formula is not rendered"
        if not holds(page, LOADED) or page.evaluate(BROKEN):
            yield f"{name}: pictures do not load: {page.evaluate(BROKEN)}"
        page.set_viewport_size(NARROW)
        if (excess := page.evaluate(EXCESS)) > 0:
            yield f"{name}: {excess} pixels wider than a telephone"
        page.set_viewport_size(WIDE)
        yield from (f"{name}: {message}" for message in messages)
        messages.clear()


def faults_of_functions(page, root, site):
    """Yield what search and dark mode do wrong."""
    for words, target in SEARCHES.items():
        found = f"[...document.querySelectorAll('#search-results a')].some(a => a.href.includes('{target}'))"
        for place in (root, site.as_uri()):
            page.goto(f"{place}/search.html?q={words.replace(' ', '+')}")
            if not holds(page, found):
                yield f"the search for {words!r} does not find {target} at {place}"
    page.goto(f"{root}/index.html")
    colors = {page.evaluate(f"document.body.dataset.theme = '{theme}', {BACKGROUND}") for theme in ("light", "dark")}
    if len(colors) == 1:
        yield "dark mode does not change the background"


def faults_of_pictures(site):
    """Yield the pictures without a background, whose dark lines cannot be seen in dark mode."""
    for path in sorted((site / "_images").glob("*.png")):
        with Image.open(path) as picture:
            opacity = picture.convert("RGBA").getchannel("A").getextrema()
        if opacity != (255, 255):
            yield f"{path.name}: parts of it are transparent"


def faults_of_reference(site):
    """Yield the public names that have no entry."""
    with (site / "objects.inv").open("rb") as file:
        entries = InventoryFile.load(file, "", lambda base, name: name)
    known = {name for kind, names in entries.items() if kind != "py:module" for name in names}
    for module in entries["py:module"]:
        loaded = import_module(module)
        for name in set(getattr(loaded, "__all__", ())) - FOR_US.get(module, set()):
            homes = {module, getattr(getattr(loaded, name), "__module__", module)}
            if not any(f"{home}.{name}" in known for home in (*homes, *entries["py:module"])):
                yield f"{module}.{name} has no entry in the reference"


def main(folder="site"):
    """Print all faults; return 1 if there are any."""
    site = Path(folder).resolve()
    names = [path.relative_to(site).as_posix() for path in sorted(site.rglob("*.html"))]
    names = [name for name in names if name not in WITHOUT_CONTENT]
    count = 0
    with served(site) as root, opened() as page:
        for fault in (
            *faults_of_pages(page, root, names),
            *faults_of_functions(page, root, site),
            *faults_of_pictures(site),
            *faults_of_reference(site),
        ):
            count += 1
            print(fault)
    print(f"{len(names)} pages, {count} faults")
    return min(count, 1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
