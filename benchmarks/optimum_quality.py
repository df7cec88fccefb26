"""Does ``fit`` reach the optimum for every penalty, seed and initial scale? Prints the table of the README.

    python benchmarks/optimum_quality.py

Each row is the worst over seeds 0-4 and initial scales 0.1 and 1 of what the last reading of ``readings.csv`` says.
"""

import contextlib
import io
import multiprocessing
import os
import tempfile
from pathlib import Path

CASES = [("ce", 5e-3), ("ce", 5e-4), ("ce", 5e-5), ("mse", 5e-3), ("mse", 5e-4)]
SEEDS, SCALES = range(5), (0.1, 1.0)
TAGS = ("optimality/distance", "optimality/gap", "nc/train/nc1", "nc/train/nc2", "nc/train/nc3")


def run(job):
    """Fit one setting in a folder of its own; return its iterations, fit of the gap, and last values."""
    loss, lam, seed, scale = job
    import torch  # noqa: PLC0415 - after the fork, one thread each

    torch.set_num_threads(1)
    from nclightning.cli import main  # noqa: PLC0415
    from nclightning.figures import read_readings, summarize  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as folder, _chdir(folder):
        words = ["fit", "--config", f"ufm_{loss}", "--lambda", str(lam), "--seed_everything", str(seed)]
        words += ["--model.init_args.init_scale", str(scale), "--trainer.enable_progress_bar", "false"]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            main(words)
        summary = summarize(read_readings(Path("lightning_logs/version_0")))
    return (loss, lam), summary.iteration, summary.fits["optimality/gap"].r_squared, [summary.last[t] for t in TAGS]


@contextlib.contextmanager
def _chdir(folder):
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def main():
    """Run all settings, two at a time, and print the table."""
    jobs = [(loss, lam, seed, scale) for loss, lam in CASES for seed in SEEDS for scale in SCALES]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        results = pool.map(run, jobs, chunksize=1)
    print("| loss | lambda | iterations | R^2 of the gap | distance | gap | NC1 | NC2 | NC3 |")
    print("|---|---|---|---|---|---|---|---|---|")
    for case in CASES:
        rows = [r for r in results if r[0] == case]
        iterations = sorted(r[1] for r in rows)
        worst = " | ".join(f"{max(r[3][i] for r in rows):.1e}" for i in range(len(TAGS)))
        least = min(r[2] for r in rows)
        print(f"| {case[0]} | {case[1]:g} | {iterations[0]}-{iterations[-1]} | {least:.4f} | {worst} |")


if __name__ == "__main__":
    main()
