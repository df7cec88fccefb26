"""Configuration of the documentation site: Sphinx, with pages in MyST Markdown."""

import os
import re
from pathlib import Path

from nclightning import __version__

DOCS, ROOT = Path(__file__).parent, Path(__file__).parents[1]

project = "nclightning"
author = "the nclightning developers"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx-mathjax-offline",  # The site needs no network.
    "sphinxcontrib.programoutput",
]
exclude_patterns = ["**/.*"]

html_theme = "furo"
html_title = "nclightning"
html_favicon = "images/logo.svg"
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False

# A forge shows these forms of Markdown, too.
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 4

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
napoleon_use_ivar = True
napoleon_use_rtype = False

# A role in a docstring must lead to a name of the reference. Annotations may name classes of others and of our own that
# are not public.
nitpicky = True
nitpick_ignore_regex = [("py:class", ".*")]


# Pages where a forge looks for them, and their names in docs/root/, which is written at each build.
PAGES_OF_THE_ROOT = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "RELEASING.md": "releasing.md",
    "SECURITY.md": "security.md",
    "examples/README.md": "recipes.md",
}


def copy_pages_of_the_root(app):
    """Write the pages of the root into the folder of the site, with links that lead from there to the same places."""
    target = DOCS / "root"
    target.mkdir(exist_ok=True)
    for name, page in PAGES_OF_THE_ROOT.items():
        source = ROOT / name

        def link(match, source=source):
            path, anchor = match["path"], match["anchor"] or ""
            goal = (source.parent / path).resolve().relative_to(ROOT)
            known = PAGES_OF_THE_ROOT.get(goal.as_posix())
            return f"]({known or os.path.relpath(ROOT / goal, target)}{anchor})"

        text = re.sub(r"\]\((?!https?:)(?P<path>[^)#]+)(?P<anchor>#[^)]*)?\)", link, source.read_text())
        if page == "recipes.md":
            scripts = sorted(path.name for path in source.parent.glob("*.py"))
            text += "".join(f"\n## {name}\n\n```{{literalinclude}} ../../examples/{name}\n```\n" for name in scripts)
        (target / page).write_text(text)


def link_to_pages_of_the_root(app, docname, source):
    """Let links of other pages to pages of the root lead to their copies."""
    up = "../" * docname.count("/")
    for name, page in PAGES_OF_THE_ROOT.items():
        source[0] = source[0].replace(f"]({up}../{name}", f"]({up}root/{page}")


def tables(app, what, name, obj, options, lines):
    """Turn the Markdown tables of a docstring, which read well in code, into those of reStructuredText."""
    made = []
    for line in lines:
        text = line.strip()
        if not text.startswith("|"):
            made.append(line)
            continue
        cells, indent = [cell.strip() for cell in text.strip("|").split(" | ")], line[: len(line) - len(line.lstrip())]
        if set(text) <= set("|-"):
            continue
        if not made or not made[-1].strip() or not made[-1].lstrip().startswith(("* -", "-")):
            made += ["", f"{indent}.. list-table::", f"{indent}   :header-rows: 1", ""]
        made += [f"{indent}   {'* -' if i == 0 else '  -'} {cell}" for i, cell in enumerate(cells)]
    lines[:] = made


def leave_out_object(app, name, obj, options, bases):
    """Show the bases that say something."""
    bases[:] = [base for base in bases if base is not object]


def setup(app):
    """Connect what is done at a build."""
    app.connect("builder-inited", copy_pages_of_the_root)
    app.connect("source-read", link_to_pages_of_the_root)
    app.connect("autodoc-process-bases", leave_out_object)
    app.connect("autodoc-process-docstring", tables, priority=400)  # Before napoleon.
