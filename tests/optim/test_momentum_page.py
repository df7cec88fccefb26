"""What docs/optimizers/momentum.md shows, runs and prints what it says."""

import doctest
from pathlib import Path

import lightning

PAGE = Path(__file__).resolve().parents[2] / "docs" / "optimizers" / "momentum.md"


def test_blocks_run_and_print_what_the_page_says():
    failed, tried = doctest.testfile(str(PAGE), module_relative=False, globs={"lightning": lightning})
    assert failed == 0
    assert tried > 20
