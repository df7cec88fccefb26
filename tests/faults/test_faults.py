"""A few faults of each kind; ``python -m tests.faults --count 1000`` lets many happen."""

import sys
from pathlib import Path

import pytest

from tests import forked
from tests.faults import __main__ as faults

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_runs_go_on_bit_for_bit_or_say_why_not(tmp_path):
    words = ["--count", str(len(faults.KINDS)), "--seed", "0", "--keep", str(tmp_path)]
    done = forked.run([sys.executable, "-m", "tests.faults", *words], cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(f"{len(faults.KINDS)} faults, 0 wrong\n")
