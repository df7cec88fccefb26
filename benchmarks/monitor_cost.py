"""Cost of the monitors on networks, each figure a ratio of medians in one run.

    python benchmarks/monitor_cost.py

Online: a training step with the monitor against one without, taking turns step by step on two equal models; with the
monitor counts all that the steps leave to be done later, the reading at the end of the epoch included, but not the
first step, before which the head is found: what that takes once in a fit is a row of its own. Sweep: a measurement of
the training set against a bare pass over the same data, which moves each batch to the device and runs the model in eval
mode, taking turns; by NeuralCollapseMonitor alone, and by it and OptimalityMonitor, which share the pass. Handing the
values to Lightning's loggers is not counted. The example CNN is small: its step takes 3 milliseconds, so that each
30 microseconds of the monitor are one percent. On the network for images of 32 x 32 a step takes 20 times as long.

Memory that a step frees stays with the process on all sides: see ``quiet.keep_memory``.
"""

import statistics
import sys
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import lightning as L
import quiet
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import digits

from nclightning.callbacks import NeuralCollapseMonitor, OptimalityMonitor
from nclightning.callbacks.host import LightningHost
from nclightning.probe.sets import DataSet

ROUNDS, STEPS, RUNS = 60, 512, 15
LARGE_ROUNDS, LARGE_STEPS, LARGE_RUNS, LARGE_SAMPLES = 10, 128, 3, 1280
WHAT = "online | bare training step", "online, once in a fit | difference to the first bare step"


class CNN(digits.CNN, L.LightningModule):
    """The network of the examples."""

    def training_step(self, batch, batch_idx):
        return digits.loss(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return digits.sgd(self)


class Large(CNN):
    """A network for images of 32 x 32 in colour, with 512 features."""

    def __init__(self) -> None:
        super().__init__()
        widths = [3, 32, 64, 128]
        self.body = nn.Sequential(
            *(self._block(*pair) for pair in pairwise(widths)),
            *(nn.Flatten(), nn.Linear(128 * 16, 512), nn.ReLU()),
        )
        self.fc = nn.Linear(512, 10)

    @staticmethod
    def _block(width, out):
        convolutions = nn.Conv2d(width, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(2)
        return nn.Sequential(*convolutions)


class Bench(L.Callback):
    """Runs once a trainer is set up, then ends the fit."""

    def __init__(self, monitors, rounds) -> None:
        self.collapse, self.optimality = (monitor.at_epochs() for monitor in monitors)
        self.rounds, self.times = rounds, {"one": [], "both": [], "bare": []}

    def on_train_epoch_end(self, trainer, pl_module):
        for turn in range(self.rounds):
            runs = [("one", self.one), ("both", self.both), ("bare", self.bare)]
            for name, run in runs[:: 1 if turn % 2 else -1]:
                start = time.perf_counter()
                run(trainer, pl_module)
                self.times[name].append(time.perf_counter() - start)

    def one(self, trainer, pl_module):
        loader = DataLoader(trainer.train_dataloader.dataset, batch_size=64)
        self.collapse._sets.read(LightningHost(pl_module), {"train": DataSet(loader)}, {}, (), True)

    def both(self, trainer, pl_module):
        host, data = LightningHost(pl_module), DataSet(trainer.train_dataloader)
        self.collapse._sets.read(host, {"train": data}, {}, (), True, partial(self.collapse.gather_shared, trainer))
        self.optimality.gather_shared(trainer, host, data, self.optimality.gatherer).read()

    @staticmethod
    def bare(trainer, pl_module):
        pl_module.eval()
        with torch.no_grad():
            for batch in DataLoader(trainer.train_dataloader.dataset, batch_size=64):
                pl_module(trainer.strategy.batch_to_device(batch)[0])
        pl_module.train()


def sweeps(model, data, rounds):
    """Return the cost of a sweep by one monitor and by two, over that of a bare pass."""
    monitors = NeuralCollapseMonitor(), OptimalityMonitor(loss="ce")
    bench = Bench(monitors, rounds)
    quiet.trainer(max_epochs=1, callbacks=[*monitors, bench]).fit(model, DataLoader(data, batch_size=64))
    medians = {name: statistics.median(times) for name, times in bench.times.items()}
    return medians["one"] / medians["bare"], medians["both"] / medians["bare"]


def balanced(data):
    """Take as many samples of each class, as OptimalityMonitor needs them, in an order without one."""
    labels = torch.tensor([int(label) for _, label in data])
    count = int(torch.bincount(labels).min())
    kept = torch.cat([(labels == label).nonzero()[:count, 0] for label in range(10)])
    return Subset(data, kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(0))].tolist())


def images():
    """Make images of noise."""
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(LARGE_SAMPLES, 3, 32, 32, generator=generator), torch.arange(LARGE_SAMPLES) % 10)


def online(kind, train, steps):
    """Compare the same steps with the monitor's hooks and without; and the first one, in milliseconds."""
    torch.manual_seed(0)
    loader = DataLoader(train, batch_size=64, shuffle=True, drop_last=True)
    sides = {}
    for name in ("bare", "online"):
        model, monitor = kind(), NeuralCollapseMonitor(source="online")
        trainer = quiet.trainer(max_epochs=1, callbacks=[monitor])
        trainer.strategy.connect(model)
        model.trainer = trainer
        sides[name] = model, monitor, trainer, model.configure_optimizers(), []
    batches = [batch for _ in range(-(-steps // len(loader))) for batch in loader][:steps]
    model, monitor, trainer, *_ = sides["online"]
    monitor.setup(trainer, model, "fit")
    monitor.on_train_epoch_start(trainer, model)
    for index, batch in enumerate(batches):
        for name in ("bare", "online") if index % 2 else ("online", "bare"):
            model, monitor, trainer, optimizer, times = sides[name]
            start = time.perf_counter()
            if name == "online":
                monitor.on_train_batch_start(trainer, model, batch, index)
            optimizer.zero_grad()
            model.training_step(batch, index).backward()
            optimizer.step()
            if name == "online":
                monitor.on_train_batch_end(trainer, model, None, batch, index)
            times.append(time.perf_counter() - start)
    start = time.perf_counter()
    model, monitor, *_ = sides["online"]
    monitor.at_epochs()._online.read(model)
    sides["online"][-1].append(time.perf_counter() - start)
    bare, online = (sides[name][-1] for name in ("bare", "online"))
    # A sum, not a median: the updates come once in many steps. The first batch of a fit is examined besides.
    return sum(online[1:]) / sum(bare[1:]), 1e3 * (online[0] - bare[0])


def main():
    quiet.keep_memory()
    quiet.settle()
    train, _ = digits.load()
    small = balanced(train)
    print(f"torch {torch.__version__}, one thread, batches of 64, K = 10\n")
    print("| network, images | source | against | times | runs |\n|---|---|---|---|---|")
    cases = (
        (f"CNN on digits, {len(small)}", CNN, small, train, ROUNDS, STEPS, RUNS),
        (f"CNN on 3 x 32 x 32, {LARGE_SAMPLES}", Large, images(), images(), LARGE_ROUNDS, LARGE_STEPS, LARGE_RUNS),
    )
    for name, kind, swept, trained, rounds, steps, runs in cases:
        for what, ratio in zip(("sweep", "sweep, both monitors"), sweeps(kind(), swept, rounds), strict=True):
            print(f"| {name} | {what} | bare pass in eval mode | {ratio:.3f} | median of {rounds} |", flush=True)
        per_run = zip(*(online(kind, trained, steps) for _ in range(runs)), strict=True)
        for each, unit, what in zip(per_run, ("", " ms"), WHAT, strict=True):
            spread = f"{min(each):.3f} to {max(each):.3f} in {runs} of {steps} steps"
            print(f"| {name} | {what} | {statistics.median(each):.3f}{unit} | {spread} |", flush=True)


if __name__ == "__main__":
    main()
