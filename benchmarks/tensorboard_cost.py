"""What TensorBoard's part takes of the processor in a fit from the command line. Prints a table.

    python benchmarks/tensorboard_cost.py

The whole fit of a shipped configuration, run several times in one process; the first does not count. Writing is the
time in the calls of TensorBoard's writer: pictures are encoded there, readings become events, files are appended.
Drawing the pictures is not part of it. The floor is no TensorBoard at all, which is the rest of the fit.
"""

import contextlib
import io
import os
import statistics
import tempfile
import time
from collections import Counter
from functools import wraps

import quiet

from nclightning.cli import main as command
from nclightning.files.events import EventWriter, RunWriter

CALLS = {
    "pictures": (RunWriter, ("add_image",)),
    "readings": (EventWriter, ("add_summary", "add_event")),
    "layout, summary and files": (RunWriter, ("add_custom_scalars", "add_hparams", "flush", "close")),
}
CONFIGS, RUNS = ("ufm_mse", "ufm_ce"), 6


def watch(spent):
    """Let calls of the writer add what they take to a counter; of nested calls the outer one counts."""
    depth = 0

    def timed(kind, method):
        @wraps(method)
        def call(*args, **options):
            nonlocal depth
            start, depth = time.process_time(), depth + 1
            try:
                return method(*args, **options)
            finally:
                depth -= 1
                if not depth:
                    spent[kind] += time.process_time() - start

        return call

    for kind, (owner, names) in CALLS.items():
        for name in names:
            setattr(owner, name, timed(kind, getattr(owner, name)))


def fit(config):
    """Run one fit in a new folder; return what it takes of the processor."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        os.chdir(folder)
        start = time.process_time()
        command(["fit", "--config", config, "--trainer.enable_progress_bar", "false"])
        return time.process_time() - start


def main():
    quiet.settle()
    spent = Counter()
    watch(spent)
    print(f"| configuration | fit | {' | '.join(CALLS)} | share of the fit |")
    print("|---" * (len(CALLS) + 3) + "|")
    for config in CONFIGS:
        found = []
        for _ in range(RUNS):
            spent.clear()
            found.append((fit(config), *(spent[kind] for kind in CALLS)))
        whole, *parts = (statistics.median(column) for column in zip(*found[1:], strict=True))
        cells = " | ".join(f"{1e3 * part:.0f} ms" for part in parts)
        print(f"| `{config}` | {whole:.2f} s | {cells} | {sum(parts) / whole:.1%} |", flush=True)


if __name__ == "__main__":
    main()
