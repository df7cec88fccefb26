"""How long imports and commands take from an empty process to its end, beside the libraries that they need.

    python benchmarks/startup.py
    python benchmarks/startup.py --against ../other_checkout --runs 7
    python benchmarks/startup.py --cpu --only fit

Medians in seconds of wall time, of processes that take turns, after one that fills the cache of the disk. The floor of
a row is the time of the imports in its column: what nclightning adds is the rest. Commands import without garbage
collection, and can end before their floor. ``--against`` measures another checkout, too, run by run in turn with this
one. ``--cpu`` takes the time of the processor instead, which other processes disturb less; ``--reproduce`` measures
``reproduce --quick`` alone, with all runs that it starts, in minutes.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
ARRAYS = "import nclightning; nclightning.measure(features=[[2., 0], [1., 0], [-2., 0]], labels=[0, 0, 1])"
FIT = ("-m", "nclightning", "fit", "--config", "ufm_mse", "--trainer.enable_progress_bar", "false")
FLOORS = {
    "torch": ("-c", "import torch"),
    "torch, matplotlib": ("-c", "import torch, matplotlib.figure"),
    "torchmetrics": ("-c", "import torchmetrics"),
    "torch, lightning": ("-c", "import torch, lightning"),
}
ROWS = {
    "import nclightning.functional": (("-c", "import nclightning.functional"), "torch"),
    "import nclightning.theory": (("-c", "import nclightning.theory"), "torch"),
    "import nclightning.problems": (("-c", "import nclightning.problems"), "torch"),
    "import nclightning.optim": (("-c", "import nclightning.optim"), "torch"),
    "from nclightning.metrics import NeuralCollapse": (
        ("-c", "from nclightning.metrics import NeuralCollapse"),
        "torchmetrics",
    ),
    "nclightning.measure of arrays": (("-c", ARRAYS), "torch"),
    "theory --config ufm_mse": (("-m", "nclightning", "theory", "--config", "ufm_mse"), "torch"),
    "theory --picture": (
        ("-m", "nclightning", "theory", "--config", "ufm_mse", "--picture", "spectrum.png"),
        "torch, matplotlib",
    ),
    "plot RUN": (("-m", "nclightning", "plot", "run"), "torch, matplotlib"),
    "measure features.npz": (("-m", "nclightning", "measure", "features.npz"), "torch, matplotlib"),
    "a misspelt command": (("-m", "nclightning", "theroy"), ""),
    "--help": (("-m", "nclightning", "--help"), "torch, lightning"),
    "fit of ten iterations": ((*FIT, "--trainer.max_steps", "10"), "torch, lightning"),
    "fit --config ufm_mse": (FIT, "torch, lightning"),
}
REPRODUCE = {
    "reproduce --quick": (
        ("-m", "nclightning", "reproduce", "--quick", "--jobs", "1", "--out", "reproduced"),
        "torch, lightning",
    ),
}


def now(cpu):
    """Read the clock, or the processor's time of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime if cpu else time.perf_counter()


def seconds(words, root, folder, cpu=False):
    """Run Python with some words, and take the time until it ends."""
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # Installed packages are compiled.
    start = now(cpu)
    ended = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, check=False)
    took = now(cpu) - start
    if ended.returncode != (1 if "theroy" in words else 0):
        sys.exit(f"{' '.join(words)}: {ended.stderr.decode()}")
    return took


def prepare(folder):
    """Make what commands read."""
    import numpy as np  # noqa: PLC0415

    labels = np.arange(400) % 4
    features = np.eye(4)[labels].repeat(2, axis=1) + 0.1 * np.random.default_rng(0).standard_normal((400, 8))
    np.savez(folder / "features.npz", features=features, labels=labels)
    seconds((*FIT, "--trainer.max_steps", "200"), HERE, folder)
    (folder / "lightning_logs" / "version_0").rename(folder / "run")


def measure(cases, roots, runs, cpu):
    """Return medians by case and checkout."""
    times = {(name, root): [] for name in cases for root in roots}
    for turn in range(runs + 1):
        for name, words in cases.items():
            for root in roots if turn % 2 else roots[::-1]:
                with tempfile.TemporaryDirectory() as folder:
                    for each in ("features.npz", "run"):
                        (Path(folder) / each).symlink_to(Path.cwd() / each)
                    took = seconds(words, root, folder, cpu)
                if turn:
                    times[name, root].append(took)
    return {key: statistics.median(each) for key, each in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", default="", help="rows whose names hold this")
    parser.add_argument("--cpu", action="store_true", help="time of the processor instead of the clock's")
    parser.add_argument("--reproduce", action="store_true", help="reproduce --quick alone")
    given = parser.parse_args()
    roots = [HERE] if given.against is None else [given.against.resolve(), HERE]
    rows = {name: row for name, row in (REPRODUCE if given.reproduce else ROWS).items() if given.only in name}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        prepare(Path(folder))
        wanted = {floor for _, floor in rows.values()}
        bare = measure({name: words for name, words in FLOORS.items() if name in wanted}, [HERE], given.runs, given.cpu)
        found = measure({name: words for name, (words, _) in rows.items()}, roots, given.runs, given.cpu)
        os.chdir(HERE)
    print(f"| command | {'before | ' if given.against else ''}now | floor | imports of the floor |")
    print("|---|" + "---|" * (2 + len(roots)))
    for name, (_, floor) in rows.items():
        cells = [f"{found[name, root]:.2f}" for root in roots]
        least = f"{bare[floor, HERE]:.2f}" if floor else "-"
        print(f"| `{name}` | {' | '.join(cells)} | {least} | {floor or '-'} |")


if __name__ == "__main__":
    main()
