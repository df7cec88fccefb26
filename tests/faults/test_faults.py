"""A few faults of each kind; ``python -m tests.faults --count 1000`` lets many happen."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import __main__ as faults

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_runs_go_on_bit_for_bit_or_say_why_not(tmp_path):
    words = ["--count", str(len(faults.KINDS)), "--seed", "0", "--keep", str(tmp_path)]
    done = subprocess.run(  # In a process of its own: it forks.
        [sys.executable, "-m", "tests.faults", *words], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(f"{len(faults.KINDS)} faults, 0 wrong\n")
