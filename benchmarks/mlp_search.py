"""Which lambda, step and initialisation let the two-layer network converge linearly? Prints the table of docs/mlp.md.

    python benchmarks/mlp_search.py [--quick] [--skip ROWS]

Plain gradient descent with a constant step on the full batch, at the sizes of the paper's Figure 2, on one core. Gap
and NC1-NC3 are read every ten iterations. A run ends at its iterations, at a gap of 1e-24, or where it has failed.

What happened, from the first line that holds:

    diverged    the gap is not finite, or 1000 times the first
    dead        fewer than 5 % of the gates are open (pairs of a hidden unit and a sample that activates it)
    unstable    the gap has risen tenfold from any earlier reading
    slow        the gap fell by fewer than ten decades
    straight    the tails of gap and NC1 have R^2 of at least 0.99, and no half of a tail is 4/3 times as steep as the
                other
    curved      otherwise

The tail is that of `fit_rate`: the last 15 decades, at most, and no more than three quarters of the whole fall.
"""

import argparse
import re
import time
from dataclasses import dataclass, replace

import numpy as np
import torch

from nclightning.data import GaussianDataModule
from nclightning.figures import fit_rate
from nclightning.metrics import NeuralCollapse
from nclightning.models import TwoLayerMLP

EVERY, FLOOR = 10, 1e-24
SLOW, STRAIGHT, STEADY = 10.0, 0.99, 4 / 3
PAPER = {"num_classes": 10, "samples_per_class": 100, "feature_dim": 20, "input_dim": 1000, "hidden_dim": 256}
HEADER = (
    "| loss | lambda | step | init, first layer, head | activation | seed | iterations | gap | NC1 | NC2 | NC3 | gates "
    "| its/decade | gap: decades | R^2 | NC1: decades | R^2 | what happened |"
)
COLUMNS = ("iteration", "gap", "nc1", "nc2", "nc3", "gates")


@dataclass(frozen=True)
class Setting:
    """One row; the seed is that of initialisation and inputs."""

    loss: str
    lam: float
    step: float
    iterations: int
    init: str = "he"
    first: float = 0.1
    head: float = 1.0
    activation: str = "relu"
    seed: int = 0


CE = Setting("ce", 4e-4, 0.8, 1500)
MSE = Setting("mse", 6e-4, 0.2, 2500)
SETTINGS = [
    *(replace(CE, seed=seed) for seed in (0, 1, 2)),
    *(replace(CE, step=step, iterations=1000) for step in (0.3, 1.2)),
    *(replace(CE, lam=9e-4, step=step) for step in (0.8, 0.6)),
    replace(CE, lam=2e-4, step=1.0),
    *(replace(CE, lam=lam, iterations=1000) for lam in (2e-5, 5e-6)),
    *(replace(CE, first=1.0, step=step, iterations=1000) for step in (0.5, 0.05)),
    replace(CE, init="xavier", first=1.0, iterations=1000),
    replace(CE, init="xavier", iterations=1000),
    replace(CE, init="torch", first=1.0, iterations=1000),
    *(replace(CE, activation=name, iterations=1000) for name in ("leaky_relu", "gelu", "tanh")),
    *(replace(MSE, seed=seed) for seed in (0, 1)),
    *(replace(MSE, lam=8e-4, seed=seed) for seed in (0, 1)),
    *(replace(MSE, step=step, iterations=1000) for step in (0.35, 0.5)),
    replace(MSE, lam=9.8e-4, iterations=1000),
    replace(MSE, lam=4e-4, step=0.25, head=0.3),
    replace(MSE, lam=5e-6, iterations=1000),
    replace(MSE, lam=5e-4, first=1.0, step=0.1, iterations=1000),
    replace(MSE, first=1.0, step=0.02, iterations=1000),
    *(replace(MSE, lam=8e-4, head=0.3, seed=seed) for seed in (1, 0)),
]
QUICK = [replace(CE, iterations=300), replace(MSE, iterations=300), replace(MSE, first=1.0, iterations=300)]


def build(setting, sizes):
    """Return the initial network and the full batch."""
    torch.manual_seed(setting.seed)
    model = TwoLayerMLP(
        **sizes,
        loss=setting.loss,
        lambda_=setting.lam,
        activation=setting.activation,
        init=setting.init,
        first_layer_scale=setting.first,
        head_scale=setting.head,
    )
    data = GaussianDataModule(seed=setting.seed)
    data.adopt(model)
    return model, data.batch()


@torch.no_grad()
def read(model, batch):
    """Return gap, NC1-NC3 and the share of open gates."""
    (x, labels), weight = batch, model.head.weight
    first, activation, *rest = model.backbone
    hidden = features = activation(first(x))
    for layer in rest:
        features = layer(features)
    if not (torch.isfinite(features).all() and torch.isfinite(weight).all()):
        return [float("nan")] * 5
    problem = model.problem
    metric = NeuralCollapse(problem.num_classes, problem.feature_dim, head=model.head)
    metric.update(features, labels)
    measured = metric.compute()
    gap = problem.optimality_gap(weight, features, labels, model.head.bias, check_labels=False)
    gates = (hidden != 0).double().mean()
    return [float(v) for v in (gap, measured["nc1"], measured["nc2"], measured["nc3"], gates)]


def failure(readings):
    """Say how a run has failed; None as long as it has not."""
    gap, gates = readings[:, COLUMNS.index("gap")], readings[:, COLUMNS.index("gates")]
    if not np.isfinite(gap[-1]) or gap[-1] > 1e3 * gap[0]:
        return "diverged"
    return "dead" if gates[-1] < 0.05 else None


def run(setting, sizes=PAPER):
    """Descend; return model, batch and readings, one row of COLUMNS each."""
    model, batch = build(setting, sizes)
    optimizer = torch.optim.SGD(model.parameters(), lr=setting.step)
    rows = []
    for iteration in range(setting.iterations + 1):
        if iteration % EVERY == 0:
            rows.append([iteration, *read(model, batch)])
            if rows[-1][1] <= FLOOR or failure(np.array(rows)):
                break
        optimizer.zero_grad()
        model.evaluate_objective(batch).backward()
        optimizer.step()
    return model, batch, np.array(rows)


def steadiness(iterations, values, fit):
    """How much steeper one half of a tail is than the other, at least 1; infinite where one half does not fall."""
    inside = (iterations >= fit.first) & (iterations <= fit.last) & (values > 0)
    x, y = iterations[inside], np.log10(values[inside])
    middle = len(x) // 2
    slopes = sorted(-np.polyfit(x[part], y[part], 1)[0] for part in (slice(middle + 1), slice(middle, None)))
    return slopes[1] / slopes[0] if slopes[0] > 0 else float("inf")


def is_straight(iterations, values):
    fit = fit_rate(iterations, values)
    return fit is not None and fit.r_squared >= STRAIGHT and steadiness(iterations, values, fit) <= STEADY


def outcome(readings):
    """Say in a word what happened, by the rule at the top."""
    failed = failure(readings)
    if failed:
        return failed
    iterations, gap, nc1 = readings[:, 0], readings[:, 1], readings[:, 2]
    if (gap > 10 * np.minimum.accumulate(gap)).any():
        return "unstable"
    if np.log10(gap[0] / gap[-1]) < SLOW:
        return "slow"
    return "straight" if is_straight(iterations, gap) and is_straight(iterations, nc1) else "curved"


def tail(readings, name):
    """Iterations per decade, decades and R^2 of the straight tail of a column, as cells."""
    fit = fit_rate(readings[:, 0], readings[:, COLUMNS.index(name)])
    return (
        ["-"] * 3 if fit is None else [f"{fit.iterations_per_decade:.0f}", f"{fit.decades:.1f}", f"{fit.r_squared:.4f}"]
    )


def cells(setting):
    """Return the cells that name a setting."""
    s = setting
    return f"{s.loss} | {s.lam:g} | {s.step:g} | {s.init}, {s.first:g}, {s.head:g} | {s.activation} | {s.seed}"


def row(setting, readings):
    word = outcome(readings)
    measured = [str(int(readings[-1, 0])), *(f"{v:.1e}" for v in readings[-1, 1:5]), f"{readings[-1, 5]:.2f}"]
    if word in ("diverged", "dead", "unstable"):
        measured += ["-"] * 5
    else:
        measured += tail(readings, "gap") + tail(readings, "nc1")[1:]
    return f"| {cells(setting)} | {' | '.join(measured)} | {word} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three short runs, half a minute")
    parser.add_argument("--skip", type=int, default=0, help="rows to leave out, to go on after an interrupt")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    print(HEADER + "\n" + re.sub(r"[^|]+", "---", HEADER), flush=True)
    for setting in (QUICK if arguments.quick else SETTINGS)[arguments.skip :]:
        print(row(setting, run(setting)[2]), flush=True)
    print(f"\ntorch {torch.__version__}, one thread, {(time.perf_counter() - start) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
