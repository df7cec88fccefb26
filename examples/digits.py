"""What the recipes share: scikit-learn's digits (1797 images of 8x8 pixels), a network, its loss, a table."""

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import TensorDataset

Values = TypeVar("Values", bound=Mapping[str, float])
LABELS = {"nc1": "NC1, spread within classes", "nc2": "NC2, head to ETF", "nc3": "NC3, head to class means"}


def load() -> tuple[TensorDataset, TensorDataset]:
    """Return 1437 images to train on and 360 to test on, always the same."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
    train_x, test_x = (torch.tensor(x / 16, dtype=torch.float32).view(-1, 1, 8, 8) for x in parts[:2])
    return TensorDataset(train_x, torch.tensor(parts[2])), TensorDataset(test_x, torch.tensor(parts[3]))


class CNN(nn.Module):
    """Two convolutions, three layers, 64 features and the head ``fc``."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
            *(nn.Linear(512, 128), nn.BatchNorm1d(128), nn.ReLU()),
            *(nn.Linear(128, 128), nn.BatchNorm1d(128), nn.ReLU()),
            *(nn.Linear(128, 64), nn.BatchNorm1d(64)),
        )
        self.fc = nn.Linear(64, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return self.fc(self.body(images))


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean squared error on one-hot labels, under which digits collapse within some epochs."""
    return 5 * nn.functional.mse_loss(logits, nn.functional.one_hot(labels, logits.shape[1]).float())


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of all recipes; weight decay is what lets features collapse."""
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-3)


def cosine(optimizer: torch.optim.Optimizer, epochs: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Return a schedule that brings the step down to 0."""
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)


def options(description: str, epochs: int = 20) -> argparse.ArgumentParser:
    """Return the options of every recipe."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("."), help="what is written goes there")
    parser.add_argument("--picture", type=Path, help="draw NC1-NC3 of each epoch here")
    return parser


def make_trainer(args: argparse.Namespace, callbacks: list[L.Callback]) -> L.Trainer:
    """Return a Trainer on one CPU that writes metrics.csv and a checkpoint, and shows little."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    settings = {"accelerator": "cpu", "devices": 1, "logger": CSVLogger(args.folder), **quiet}
    return L.Trainer(max_epochs=args.epochs, callbacks=callbacks, log_every_n_steps=20, **settings)


def report(history: list[Values], picture: Path | None = None) -> list[Values]:
    """Print the values of the first epoch and of the last one, draw NC1-NC3 of all, and return them."""
    print(f"{'':14}{'epoch 1':>12}{f'epoch {len(history)}':>12}")
    for name in history[0]:
        print(f"{name:14}{history[0][name]:12.3g}{history[-1][name]:12.3g}")
    if picture:
        draw(history, picture)
    return history


def read_csv(folder: str | Path) -> list[dict[str, float]]:
    """Return what the monitor logged of the training set to a ``CSVLogger``, epoch by epoch."""
    with (Path(folder) / "metrics.csv").open() as file:
        rows = [{tag: value for tag, value in row.items() if "nc/" in tag and value} for row in csv.DictReader(file)]
    return [{tag.rpartition("/")[2]: float(value) for tag, value in row.items()} for row in rows if row]


def draw(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draw NC1-NC3 against the epoch; the dashes tell them apart in grey."""
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    for name, color, dashes in zip(LABELS, ("#0072B2", "#D55E00", "#009E73"), ("-", "--", ":"), strict=True):
        values = [each[name] for each in history]
        axes.semilogy(range(1, 1 + len(values)), values, color=color, ls=dashes, lw=1.8, label=LABELS[name])
    axes.set_xlabel("epoch")
    axes.set_ylabel("training set")
    axes.grid(True, which="major", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
