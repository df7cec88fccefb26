"""Cost of NeuralCollapseMonitor on the example CNN, each figure a ratio of medians in one run.

    python benchmarks/monitor_cost.py

Online: a training step with the monitor against one without, taking turns step by step on two equal models; with the
monitor counts all that the steps leave to be done later, the reading at the end of the epoch included. Sweep: a
reading of the training set against a bare pass over the same loader, which moves each batch to the device and
runs the model in eval mode, taking turns.
"""

import statistics
import sys
import time
from pathlib import Path

import lightning as L
import quiet
import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from cnn import CNN
from digits import load

from nclightning.callbacks import NeuralCollapseMonitor
from nclightning.callbacks.host import LightningHost
from nclightning.probe.sets import DataSet

ROUNDS, STEPS, RUNS = 60, 512, 15


class Bench(L.Callback):
    """Runs once a trainer is set up, then ends the fit."""

    def __init__(self, monitor: NeuralCollapseMonitor) -> None:
        self.monitor, self.sweep, self.bare = monitor, [], []

    def on_train_epoch_end(self, trainer, pl_module):
        loader = DataLoader(trainer.train_dataloader.dataset, batch_size=64)
        for turn in range(ROUNDS):
            for times, run in ((self.sweep, self.read), (self.bare, self.look))[:: 1 if turn % 2 else -1]:
                start = time.perf_counter()
                run(trainer, pl_module, loader)
                times.append(time.perf_counter() - start)

    def read(self, trainer, pl_module, loader):
        sets = self.monitor.at_epochs()._sets
        sets.read(LightningHost(pl_module), {"train": DataSet(loader)}, {}, (), True)

    @staticmethod
    def look(trainer, pl_module, loader):
        pl_module.eval()
        with torch.no_grad():
            for batch in loader:
                pl_module(trainer.strategy.batch_to_device(batch)[0])
        pl_module.train()


def online(train):
    """Compare the same steps with the monitor's hooks and without."""
    torch.manual_seed(0)
    loader = DataLoader(train, batch_size=64, shuffle=True, drop_last=True)
    sides = {}
    for name in ("bare", "online"):
        model, monitor = CNN(1), NeuralCollapseMonitor(source="online")
        trainer = quiet.trainer(max_epochs=1, callbacks=[monitor])
        trainer.strategy.connect(model)
        model.trainer = trainer
        sides[name] = model, monitor, trainer, model.configure_optimizers()["optimizer"], []
    batches = [batch for _ in range(-(-STEPS // len(loader))) for batch in loader][:STEPS]
    model, monitor, trainer, *_ = sides["online"]
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
    # A sum, not a median: the updates come once in many steps.
    return sum(sides["online"][-1]) / sum(sides["bare"][-1])


def main():
    quiet.settle()
    train, _ = load()
    bench = Bench(NeuralCollapseMonitor())
    quiet.trainer(max_epochs=1, callbacks=[bench]).fit(CNN(1), DataLoader(train, batch_size=64))
    sweep = statistics.median(bench.sweep) / statistics.median(bench.bare)
    ratios = sorted(online(train) for _ in range(RUNS))
    print(f"torch {torch.__version__}, one thread, 1437 images, batches of 64, K = 10, d = 64\n")
    print("| source | against | times | runs |\n|---|---|---|---|")
    print(f"| sweep | bare pass in eval mode | {sweep:.3f} | median of {ROUNDS} |")
    spread = f"{ratios[0]:.3f} to {ratios[-1]:.3f} in {RUNS}"
    print(f"| online | bare training step | {statistics.median(ratios):.3f} | {spread} |")


if __name__ == "__main__":
    main()
