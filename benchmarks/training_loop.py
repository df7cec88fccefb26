"""Cost of a fit against bare PyTorch loops that take the same iterations and readings. Prints a table.

    python benchmarks/training_loop.py

The problem of ``ufm_mse.yaml`` and ``ufm_ce.yaml``, 100 x 20 features in float64, a reading every 10 iterations of F,
gap, distance, gradient norm, their ratio and NC1-NC3. The bare loop takes our optimizer and our formulas, has its
gradient from autograd and keeps readings in a list. All sides take turns in one process, in an order that is turned
round each time; figures are medians of ratios within a turn.
"""

import io
import math
import statistics
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from functools import partial

import quiet
import torch
from torch.utils.tensorboard import SummaryWriter

from nclightning.callbacks import (
    IterationProgressBar,
    LastCheckpoint,
    NeuralCollapseMonitor,
    OptimalityMonitor,
    TensorBoardDashboard,
)
from nclightning.data import IndexDataModule
from nclightning.functional import class_statistics, etf_deviation, self_duality, within_class_variability
from nclightning.loggers import RunLogger
from nclightning.models import UFM
from nclightning.optim import ArmijoGD

ITERATIONS, CADENCE, TURNS = 3000, 10, 7
PATIENCE = {"mse": 1, "ce": 2}  # As in the shipped configurations.


def model_of(loss):
    torch.manual_seed(0)
    return UFM(10, 10, 20, loss, lambda_=5e-3, optimizer=partial(ArmijoGD, patience=PATIENCE[loss]))


@torch.no_grad()
def read(model, problem, labels, optimizer):
    """Take the readings of the monitors, by the functions that anybody has."""
    weight, bias, features = model.head.weight, model.head.bias, model.features
    stats = class_statistics(features, labels, 10)
    point = (weight, features, labels, bias)
    distance = problem.distance(*point, check_labels=False)
    outcome = optimizer.outcome
    return {
        "loss": outcome.objective,
        "optimality/gap": problem.optimality_gap(*point, check_labels=False).item(),
        "optimality/distance": distance.item(),
        "optimality/grad_norm": outcome.grad_norm,
        "optimality/error_bound_ratio": distance.item() / outcome.grad_norm,
        "nc/train/nc1": within_class_variability(stats).item(),
        "nc/train/nc2": etf_deviation(weight).item(),
        "nc/train/nc3": self_duality(stats, weight).item(),
    }


def bare(loss, folder, closed_form=False, tensorboard=False):
    """Iterate without Lightning; return the objective at the end."""
    model = model_of(loss)
    index = torch.arange(100)
    labels, problem, params = index // 10, model.problem, list(model.parameters())
    optimizer, rows = ArmijoGD(params, patience=PATIENCE[loss]), []
    writer = SummaryWriter(folder) if tensorboard else None

    def closure():
        optimizer.zero_grad()
        value = model.evaluate_objective((index, labels))
        value.backward()
        return value.detach()

    step = model.make_closure((index, labels), params) if closed_form else closure
    for iteration in range(1, ITERATIONS + 1):
        optimizer.step(step)
        if iteration % CADENCE == 0:
            rows.append(read(model, problem, labels, optimizer))
            if writer is not None:
                for tag, value in rows[-1].items():
                    writer.add_scalar(tag, value, iteration)
                    if math.isfinite(value) and value > 0:
                        writer.add_scalar(f"log10/{tag}", math.log10(value), iteration)
    if writer is not None:
        writer.close()
    assert optimizer.outcome.accepted
    return rows[-1]["loss"]


def fit(loss, folder, extras=False):
    """Do the same by a trainer."""
    callbacks = [OptimalityMonitor(CADENCE), NeuralCollapseMonitor(CADENCE), LastCheckpoint(500)]
    extras_ = [TensorBoardDashboard(), IterationProgressBar()] if extras else []
    model = model_of(loss)
    trainer = quiet.trainer(
        max_steps=ITERATIONS,
        max_epochs=-1,
        log_every_n_steps=1,
        logger=RunLogger(folder),
        callbacks=[*callbacks, *extras_],
        enable_checkpointing=True,
        enable_progress_bar=extras,
    )
    trainer.fit(model, IndexDataModule())
    assert trainer.global_step == ITERATIONS
    return model.optimizers(use_pl_optimizer=False).outcome.objective


SIDES = {
    "bare loop, autograd": bare,
    "bare loop, autograd, `SummaryWriter.add_scalar`": partial(bare, tensorboard=True),
    "bare loop, our closed form": partial(bare, closed_form=True),
    "fit: monitors, TensorBoard and CSV, checkpoints": fit,
    "fit: the same, pictures and progress bar": partial(fit, extras=True),
}


def compare(loss, turns=TURNS):
    """Return seconds of the first side and the ratios of all sides to it, medians."""
    times = {name: [] for name in SIDES}
    ends = {}
    for turn in range(turns + 1):  # The first warms up.
        for name in list(SIDES)[:: 1 if turn % 2 else -1]:
            with (
                tempfile.TemporaryDirectory() as folder,
                redirect_stdout(io.StringIO()),
                redirect_stderr(io.StringIO()),
            ):
                start = time.perf_counter()
                ends[name] = SIDES[name](loss, folder)
                times[name].append(time.perf_counter() - start)
    first, *_ = SIDES
    assert max(ends.values()) - min(ends.values()) < 1e-12, "the sides went different ways"
    ratios = {
        name: statistics.median(a / b for a, b in zip(times[name][1:], times[first][1:], strict=True)) for name in SIDES
    }
    return statistics.median(times[first][1:]), ratios


def lines():
    """Yield the lines of the table."""
    yield f"| {ITERATIONS} iterations, a reading every {CADENCE} | MSE | CE |"
    yield "|---|---|---|"
    (mse, mse_ratios), (ce, ce_ratios) = compare("mse"), compare("ce")
    for name in SIDES:
        if name == next(iter(SIDES)):
            yield f"| {name} | 1 ({mse:.2f} s) | 1 ({ce:.2f} s) |"
        else:
            yield f"| {name} | {mse_ratios[name]:.2f} | {ce_ratios[name]:.2f} |"


def main():
    """Print the table."""
    quiet.show(lines())


if __name__ == "__main__":
    main()
