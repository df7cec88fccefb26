"""Configuration of the documentation site: Sphinx, with pages in MyST Markdown."""

from nclightning import __version__

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
exclude_patterns = ["site", "**/.*"]

html_theme = "furo"
html_title = "nclightning"
html_favicon = "images/logo.svg"
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


def setup(app):
    """Connect what docstrings need, before napoleon reads them."""
    app.connect("autodoc-process-docstring", tables, priority=400)
