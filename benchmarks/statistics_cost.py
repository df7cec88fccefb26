"""Cost of NC1 against a straightforward two-pass implementation with a pseudo-inverse, in one run.

The opponent is NC1 as it is usually written: class means in a first pass over all features, deviations and their
covariance in a second, then the pseudo-inverse of the between-class covariance. In float64 it is as accurate as ours;
in float32, as it is usually run, it is not, which the last column shows on features whose class means spread 1000:1.
The library ``neural_collapse`` does the same with accumulators, in float32 unless told otherwise; it takes part where
it is installed (``pip install git+https://github.com/rhubarbwu/neural-collapse.git``). Each side runs in a process of
its own, taking turns; medians of the time, maxima of the memory above the features.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time

import quiet
import torch

from nclightning.metrics import NeuralCollapse

SIZES = [(10, 512, 50_000), (100, 2048, 20_000)]
SIDES = ("ours", "pinv64", "pinv32")
if importlib.util.find_spec("neural_collapse"):
    SIDES += ("library",)
BATCH = 1000


def features_of(K, d, N):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(N) % K
    means = torch.randn(K, d, generator=generator) * torch.logspace(0, 3, K)[:, None]
    features = torch.randn(N, d, generator=generator)
    for rows, classes in zip(features.split(BATCH), labels.split(BATCH), strict=True):
        rows.add_(means[classes])  # In parts, so that nothing large was ever freed before memory is measured.
    return features, labels


def ours(features, labels, K):
    metric = NeuralCollapse(K, features.shape[1])
    for h, y in zip(features.split(BATCH), labels.split(BATCH), strict=True):
        metric.update(h, y)
    return metric.compute()["nc1"]


def two_pass(features, labels, K, dtype):
    features = features.to(dtype)
    counts = torch.bincount(labels, minlength=K).to(dtype)
    means = torch.zeros(K, features.shape[1], dtype=dtype).index_add_(0, labels, features) / counts[:, None]
    deviations = features - means[labels]
    within = deviations.T @ deviations / len(features)
    centred = means - means.mean(dim=0)
    between = centred.T @ centred / K
    return torch.trace(within @ torch.linalg.pinv(between)) / K


def library(features, labels, K):
    """NC1 as the README of ``neural_collapse`` has it: one pass for means, one for the covariance."""
    from neural_collapse.accumulate import CovarAccumulator, MeanAccumulator  # noqa: PLC0415 - may be absent
    from neural_collapse.measure import covariance_ratio  # noqa: PLC0415

    batches = list(zip(features.split(BATCH), labels.split(BATCH), strict=True))
    of_means = MeanAccumulator(K, features.shape[1], "cpu")
    for h, y in batches:
        of_means.accumulate(h, y)
    means, center = of_means.compute()
    of_covariance = CovarAccumulator(K, features.shape[1], "cpu", M=means)
    for h, y in batches:
        of_covariance.accumulate(h, y, means)
    return covariance_ratio(of_covariance.compute(), means, center)


def measure(side, size):
    """Run one side once warm and print time, memory and value."""
    quiet.settle()
    features, labels = features_of(*size)
    run = {
        "ours": lambda: ours(features, labels, size[0]),
        "pinv64": lambda: two_pass(features, labels, size[0], torch.float64),
        "pinv32": lambda: two_pass(features, labels, size[0], torch.float32),
        "library": lambda: library(features, labels, size[0]),
    }[side]
    torch.randn(300, 300) @ torch.randn(300, 300)  # Threads and libraries are up before the clock starts.
    torch.linalg.svd(torch.randn(50, 50, dtype=torch.float64))
    memory = quiet.Memory()
    start = time.perf_counter()
    value = float(run())
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "memory": memory.growth / 2**20, "value": value}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        measure(arguments.side, arguments.size)
        return
    print(f"torch {torch.__version__}, one thread, batches of {BATCH}, float32 features\n")
    print("| K, d, N | side | seconds | times ours | memory MB | NC1 |\n|---|---|---|---|---|---|")
    for size in SIZES:
        runs = {side: [] for side in SIDES}
        for turn in range(arguments.rounds):
            for side in SIDES if turn % 2 else SIDES[::-1]:
                command = [sys.executable, __file__, "--side", side, "--size", *map(str, size)]
                runs[side].append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
        median = {side: statistics.median(run["seconds"] for run in runs[side]) for side in SIDES}
        for side in SIDES:
            memory = max(run["memory"] for run in runs[side])
            print(
                f"| {', '.join(map(str, size))} | {side} | {median[side]:.2f} | {median[side] / median['ours']:.1f} | "
                f"{memory:.0f} | {runs[side][0]['value']:.6g} |"
            )


if __name__ == "__main__":
    main()
