"""Time and memory of large unconstrained feature models. Prints two tables.

    python benchmarks/large_ufm.py

Time: an iteration of the line search, rejected trials included, against the three matrix products that value and
gradient need at least (features by head, residual by features, residual by head), written into buffers that exist, in
turns. The first iterations from a unit normal start, and iterations near the optimum, where slopes decide.

Memory: what a process grows by at most in a fit with both monitors, logger and checkpoints, over the size of the
features, in a process of its own per row. Slopes decide throughout, as they do near the optimum: they need memory too.
"""

import functools
import statistics
import subprocess
import sys
import tempfile
import time

import quiet
import torch

from nclightning.callbacks import LastCheckpoint, NeuralCollapseMonitor, OptimalityMonitor
from nclightning.data import IndexDataModule
from nclightning.loggers import RunLogger
from nclightning.models import UFM
from nclightning.optim import ArmijoGD

SIZES = {"num_classes": 100, "feature_dim": 512}
LAMBDA, ROUNDS, ITERATIONS, SAMPLES = 1e-5, 7, 8, (25, 100, 400)
NEAR = {"float64": 1e-9, "float32": 1e-5}  # Distance of each entry from that of an optimum.


def model_of(loss, dtype, samples_per_class, near_optimum=False, noise=None):
    """Draw a model; its penalties leave it collapsing at every number of samples."""
    torch.manual_seed(0)
    # q = sqrt(n lambda_w lambda_h) is the same for all n.
    penalties = {"lambda_w": 100 * LAMBDA, "lambda_h": 100 * LAMBDA / samples_per_class}
    optimizer = functools.partial(ArmijoGD, noise=noise)
    model = UFM(**SIZES, samples_per_class=samples_per_class, loss=loss, dtype=dtype, optimizer=optimizer, **penalties)
    if near_optimum:
        optimum = model.problem.random_optimum(torch.Generator().manual_seed(0))
        here, there = (model.features, *model.head.parameters()), (optimum.features, optimum.weight, optimum.bias)
        with torch.no_grad():
            for p, x in zip(here, there, strict=False):
                p.mul_(NEAR[dtype]).add_(x)
    return model


def median_time(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(loss, dtype, samples_per_class=100, near_optimum=False):
    """Return seconds per iteration, the ratio to the products, and trials per iteration."""
    model = model_of(loss, dtype, samples_per_class, near_optimum)
    index = torch.arange(model.num_samples)
    labels = index // samples_per_class
    params = list(model.parameters())
    optimizer, line = ArmijoGD(params), model.make_closure((index, labels), params)
    features, weight = model.features.detach().clone(), model.head.weight.detach().clone()
    logits, product, gradient = features @ weight.T, torch.empty_like(weight), torch.empty_like(features)

    def iterate():
        with optimizer.alone():  # As in a fit.
            for _ in range(ITERATIONS):
                optimizer.step(line)

    def multiply():
        for _ in range(ITERATIONS):
            torch.mm(features, weight.T, out=logits)
            torch.mm(logits.T, features, out=product)
            torch.mm(logits, weight, out=gradient)

    iterate()
    multiply()
    before, times = optimizer.total_evaluations, {iterate: [], multiply: []}
    for turn in range(ROUNDS):
        for function in (iterate, multiply)[:: 1 if turn % 2 else -1]:
            times[function].append(median_time(function))
    ours, bare = (statistics.median(times[function]) for function in (iterate, multiply))
    return ours / ITERATIONS, ours / bare, (optimizer.total_evaluations - before) / (ROUNDS * ITERATIONS)


def fit(dtype, loss, samples_per_class, max_steps):
    model = model_of(loss, dtype, samples_per_class, noise=0.99)
    with tempfile.TemporaryDirectory() as folder:
        quiet.trainer(
            max_steps=max_steps,
            max_epochs=-1,
            logger=RunLogger(folder),
            callbacks=[OptimalityMonitor(10), NeuralCollapseMonitor(10), LastCheckpoint(10)],
            enable_checkpointing=True,
        ).fit(model, IndexDataModule())
    return model.features.numel() * model.features.element_size()


def measure_memory(dtype, loss, samples_per_class):
    """Print peak growth and size of the features, in bytes."""
    fit(dtype, loss, 2, 20)  # What libraries load and keep.
    memory = quiet.Memory()
    size = fit(dtype, loss, samples_per_class, 30)
    print(memory.growth, size)


def memory(dtype, loss, samples_per_class):
    """Return peak growth over the size of the features, and that size."""
    words = [sys.executable, __file__, "memory", dtype, loss, str(samples_per_class)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    peak, size = map(int, done.stdout.split()[-2:])
    return peak / size, size


def main():
    """Print both tables, or with arguments the memory of one fit."""
    if len(sys.argv) > 2:
        quiet.settle()
        measure_memory(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        quiet.show(lines())


def lines():
    """Yield the lines of both tables."""
    yield "| K = 100, d = 512 | n | dtype | iteration | times three products | trials an iteration |"
    yield "|---|---|---|---|---|---|"
    for loss in ("mse", "ce"):
        for dtype in ("float64", "float32"):
            for n in SAMPLES if dtype == "float64" else (100,):
                seconds, ratio, trials = compare(loss, dtype, n)
                yield f"| {loss} | {n} | {dtype} | {1e3 * seconds:.0f} ms | {ratio:.2f} | {trials:.2f} |"
        for dtype in NEAR:
            seconds, ratio, trials = compare(loss, dtype, near_optimum=True)
            yield f"| {loss}, near the optimum | 100 | {dtype} | {1e3 * seconds:.0f} ms | {ratio:.2f} | {trials:.2f} |"
    yield ""
    yield "| K = 100, d = 512 | n | dtype | features | peak of a fit, times the features |"
    yield "|---|---|---|---|---|"
    for dtype in ("float64", "float32"):
        for n in (100, 400):
            ratio, size = memory(dtype, "mse", n)
            yield f"| mse | {n} | {dtype} | {size / 2**20:.0f} MiB | {ratio:.2f} |"


if __name__ == "__main__":
    main()
