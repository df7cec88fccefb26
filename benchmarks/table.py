"""All benchmarks of speed and memory, with the environment they ran in.

    python benchmarks/table.py

Each part is a script of its own in this folder, which says what is compared with what, and runs in a process of its
own. Everything runs on one thread. About ten minutes.
"""

import contextlib
import platform
import subprocess
import sys
import time
from pathlib import Path

import lightning
import torch

PARTS = {
    "Training loop": "training_loop",
    "Line search": "line_search",
    "Large unconstrained feature models": "large_ufm",
    "Two processes": "distributed",
    "Monitor on a network": "monitor_cost",
    "Statistics": "statistics_cost",
}


def processor():
    """Name the processor, as far as the system tells."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main():
    """Print all tables."""
    print(
        f"{processor()}, {platform.system()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"lightning {lightning.__version__}, one thread, {time.strftime('%Y-%m-%d')}"
    )
    for title, part in PARTS.items():
        print(f"\n## {title} (`python benchmarks/{part}.py`)\n", flush=True)
        subprocess.run([sys.executable, Path(__file__).with_name(f"{part}.py")], check=True)


if __name__ == "__main__":
    main()
