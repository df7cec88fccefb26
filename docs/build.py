"""Build the documentation site into a folder, warnings as errors.

    pip install ".[docs]" && python docs/build.py [FOLDER]

The default folder is ``site``. The site needs no network: open ``site/index.html``.
"""

import sys
from pathlib import Path

from sphinx.cmd.build import build_main

DOCS = Path(__file__).resolve().parent


def main(target: str = "site") -> int:
    """Build the pages, and return the exit code."""
    # -E: pages kept from an earlier build would lack what could not be imported then.
    return build_main(["-q", "-E", "-W", "--keep-going", "-b", "html", str(DOCS), target])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
