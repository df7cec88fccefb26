"""What the examples share: scikit-learn's digits (1797 real images of 8x8 pixels), the fit, its table, its picture."""

import argparse
import csv
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import TensorDataset

NAMES = ("nc1", "nc2", "nc3")
LABELS = {"nc1": "NC1, spread within classes", "nc2": "NC2, head to ETF", "nc3": "NC3, head to class means"}


def load() -> tuple[TensorDataset, TensorDataset]:
    """Return 1437 images to train on and 360 to test on, always the same."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
    train_x, test_x = (torch.tensor(x / 16, dtype=torch.float32).view(-1, 1, 8, 8) for x in parts[:2])
    return TensorDataset(train_x, torch.tensor(parts[2])), TensorDataset(test_x, torch.tensor(parts[3]))


def options(description: str, epochs: int) -> argparse.ArgumentParser:
    """Return the options of every example."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("."), help="lightning_logs is made in it")
    parser.add_argument("--picture", type=Path, help="draw NC1-NC3 against the epoch here")
    return parser


def make_trainer(args: argparse.Namespace, callbacks: list[L.Callback], **others) -> L.Trainer:
    """Return a Trainer on one CPU that writes metrics.csv and little else."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    settings = {"accelerator": "cpu", "devices": 1, "logger": CSVLogger(args.folder), **quiet, **others}
    return L.Trainer(max_epochs=args.epochs, callbacks=callbacks, log_every_n_steps=20, **settings)


def read_csv(folder: str | Path) -> dict[str, list[float]]:
    """Return the epochs (1 is the first) and NC1-NC3 of the training set that a CSVLogger wrote."""
    with (Path(folder) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["nc/train/nc1"]]
    readings = {name: [float(row[f"nc/train/{name}"]) for row in rows] for name in NAMES}
    return {"epoch": [int(row["epoch"]) + 1 for row in rows], **readings}


def report(folder: str | Path, picture: Path | None = None) -> None:
    """Print first and last readings of a run, and draw all of them."""
    readings = read_csv(folder)
    first, last = readings["epoch"][0], readings["epoch"][-1]
    print(f"{'':4}{f'epoch {first}':>12}{f'epoch {last}':>12}{'factor':>10}")
    for name in NAMES:
        start, end = readings[name][0], readings[name][-1]
        print(f"{name.upper():4}{start:12.2e}{end:12.2e}{start / end:10.3g}")
    print(f"readings: {Path(folder) / 'metrics.csv'}")
    if picture:
        draw(readings, picture)


def draw(readings: dict[str, list[float]], path: Path) -> None:
    """Draw NC1-NC3 against the epoch; the dashes tell them apart in grey."""
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    for name, color, dashes in zip(NAMES, ("#0072B2", "#D55E00", "#009E73"), ("-", "--", ":"), strict=True):
        axes.semilogy(readings["epoch"], readings[name], color=color, ls=dashes, lw=1.8, label=LABELS[name])
    axes.set_xlabel("epoch")
    axes.set_ylabel("training set")
    axes.grid(True, which="major", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def accuracy(module: L.LightningModule, data: TensorDataset) -> float:
    """Return the share of images that a trained module gets right."""
    images, labels = data.tensors
    with torch.no_grad():
        return float((module.eval()(images).argmax(1) == labels).float().mean())
