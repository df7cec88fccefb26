"""Runs the pages whose blocks print the figures in them, and writes what they print into the pages.

    python docs/pages.py                        # all such pages
    python docs/pages.py docs/numbers/nc1.md    # some

A page says that it is one by the comment ``<!-- printed by docs/pages.py -->``. Its Python blocks run in their order,
with one set of variables, in an empty folder; modules beside the page can be imported. What a block prints stands in
the block of text that follows it. ``tests/test_pages.py`` compares both. Of its shell blocks those lines run that begin
with ``python -m nclightning``, and what they print is not shown.

Pictures that a block saves in the folder go to ``images`` beside the page. A tutorial is a script in cells, as editors
know them: ``# %% [markdown]`` begins text, ``# %%`` begins code. Its page is made from it.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
_COMMAND = "python -m nclightning "
MARK = "<!-- printed by docs/pages.py -->"
_BLOCK = re.compile(r"```(?P<kind>python|bash)\n(?P<code>.*?)```\n(?:\n```text\n(?P<shown>.*?)```\n)?", re.DOTALL)


def pages() -> list[Path]:
    """Return the pages that say so."""
    return sorted(path for path in DOCS.rglob("*.md") if path.read_text().startswith(MARK))


def tutorials() -> list[Path]:
    """Return the scripts of which pages are made."""
    return sorted((DOCS / "tutorials").glob("*.py"))


def shown(page: Path) -> list[str]:
    """Return what stands below each block of code, empty where nothing does."""
    return [match["shown"] or "" for match in _BLOCK.finditer(page.read_text())]


def printed(page: Path, pictures: Path | None = None) -> list[str]:
    """Run the blocks of a page and return what each prints.

    Args:
        page: Its path.
        pictures: Folder for the pictures that its blocks save; None drops them.
    """
    scope: dict[str, Any] = {"__name__": page.stem}
    outputs = []
    with _elsewhere(page.parent):
        for number, match in enumerate(_BLOCK.finditer(page.read_text())):
            with contextlib.redirect_stdout(io.StringIO()) as output:
                if match["kind"] == "bash":
                    with contextlib.redirect_stdout(io.StringIO()):
                        _run_commands(match["code"])
                else:
                    exec(compile(match["code"], f"{page}, block {number}", "exec"), scope)
            outputs.append(output.getvalue())
        for path in Path().glob("*.png") if pictures else []:
            pictures.mkdir(exist_ok=True)
            shutil.copy(path, pictures)
    return outputs


def page_of(script: Path) -> str:
    """Return the page of a tutorial, without what its blocks print."""
    parts = [MARK]
    for cell in re.split(r"^# %%", script.read_text(), flags=re.MULTILINE)[1:]:
        kind, _, text = cell.partition("\n")
        if "[markdown]" in kind:
            parts.append(re.sub(r"^# ?", "", text, flags=re.MULTILINE).strip() + "\n")
        else:
            parts.append(f"```python\n{text.strip()}\n```\n")
    parts[0:2] = [f"{parts[0]}\n{parts[1]}"]
    return "\n".join(parts)


def without_outputs(page: Path) -> str:
    """Return a page without what its blocks print."""
    return _BLOCK.sub(lambda match: f"```{match['kind']}\n{match['code']}```\n", page.read_text())


def write(page: Path) -> None:
    """Put what the blocks print below them, and the pictures that they save beside the page."""
    if (script := page.with_suffix(".py")).exists() and "# %%" in script.read_text():
        page.write_text(page_of(script))
    outputs = iter(printed(page, pictures=page.parent / "images"))

    def replaced(match: re.Match[str]) -> str:
        output = next(outputs)
        return f"```{match['kind']}\n{match['code']}```\n" + (f"\n```text\n{output}```\n" if output else "")

    page.write_text(_BLOCK.sub(replaced, page.read_text()))


def _run_commands(lines: str) -> None:
    from nclightning.cli import main  # noqa: PLC0415  # Few pages need what it imports.

    for line in lines.splitlines():
        if line.startswith(_COMMAND):
            main(shlex.split(line.removeprefix(_COMMAND), comments=True))


@contextlib.contextmanager
def _elsewhere(modules: Path) -> Iterator[None]:
    """Work in an empty folder, with the modules of another one at hand; forget them afterwards."""
    before = os.getcwd()
    sys.path.insert(0, str(modules))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)
            sys.path.remove(str(modules))
            for path in modules.glob("*.py"):
                sys.modules.pop(path.stem, None)


if __name__ == "__main__":
    chosen = sorted({*pages(), *(script.with_suffix(".md") for script in tutorials())})
    for each in map(Path, sys.argv[1:]) if sys.argv[1:] else chosen:
        print(each)
        write(each.resolve())
