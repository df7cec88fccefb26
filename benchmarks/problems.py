"""Optima of long-tailed cross-entropy: what they take, and what they are certified to. Prints a table.

    python benchmarks/problems.py [--small]

Counts fall geometrically from the first to the last class; the penalties are given by the factor of their strength over
that at which a class as small as the last would vanish from the squared error. K = 1000 takes minutes.
"""

import argparse
import time

import torch

from nclightning.problems import unbalanced_ce

# Classes, samples of the first and the last class, factor, bias.
SMALL = [
    (100, 500, 5, 0.01, "free"),
    (100, 500, 5, 0.1, "none"),
    (100, 500, 5, 1.0, "none"),
    (100, 500, 5, 3.0, "none"),
]
LARGE = [
    (300, 1280, 5, 0.1, "free"),
    (300, 1280, 5, 1.0, "none"),
    (1000, 1280, 5, 0.1, "none"),
    (1000, 1280, 5, 0.1, "free"),
    (1000, 1280, 5, 1.0, "none"),
]


def solve(num_classes, most, least, factor, bias):
    counts = [round(most * (least / most) ** (k / (num_classes - 1))) for k in range(num_classes)]
    penalty = factor * least**0.5 / sum(counts)
    problem = unbalanced_ce(counts, num_classes, penalty, penalty, bias)
    start = time.process_time()
    optimum = problem.optimum
    return optimum, time.process_time() - start


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="leave out K = 300 and K = 1000")
    torch.set_num_threads(1)
    print("| K | counts | strength | bias | rank | F* | certified gap | CPU seconds, one thread |")
    print("|---|---|---|---|---|---|---|---|")
    for case in SMALL if parser.parse_args(arguments).small else SMALL + LARGE:
        num_classes, most, least, factor, bias = case
        optimum, seconds = solve(*case)
        found = f"{optimum.rank} | {optimum.value:.9f} | {optimum.duality_gap:.1e} | {seconds:.1f} |"
        print(f"| {num_classes} | {most}..{least} | {factor} | {bias} | {found}", flush=True)


if __name__ == "__main__":
    main()
