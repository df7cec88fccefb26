"""A training that leaves checkpoints and what the monitor logged."""

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nclightning.callbacks import NeuralCollapseMonitor
from tests.trainers import quiet_trainer

WORDS = ["--model", "tests.series.training:Net", "--data", "tests.series.training:Data"]
MEASURES = ["nc1", "nc2", "nc3", "ncc_accuracy"]


class Net(L.LightningModule):
    def __init__(self, width: int, lr: float = 0.05):
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(nn.Linear(5, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.1))
        self.fc = nn.Linear(width, 3)

    def forward(self, x):
        return self.fc(self.body(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


class Wide(Net):
    def __init__(self, width: int = 9):  # What LightningCLI links to it is not in the configuration.
        super().__init__(width)


class Partial(Net):
    strict_loading = False  # Its checkpoints hold what was trained.


class NeedsMore(Net):
    def __init__(self, width, depth):
        super().__init__(width)


def samples(count, seed):
    drawn, labels = torch.Generator().manual_seed(seed), torch.arange(count) % 3
    means = torch.randn(3, 5, generator=torch.Generator().manual_seed(9))
    return TensorDataset(means[labels] + torch.randn(count, 5, generator=drawn), labels)


def loaders():
    return {
        "train": DataLoader(samples(70, 0), 16, shuffle=True, drop_last=True),
        "val": DataLoader(samples(30, 1), 16),
    }


def three():
    return (*loaders().values(), loaders()["val"])


def misnamed():
    return {"train": loaders()["train"], "validation": loaders()["val"]}


class Data(L.LightningDataModule):
    def train_dataloader(self):
        return loaders()["train"]

    def val_dataloader(self):
        return loaders()["val"]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        return (x + torch.randn_like(x) if self.trainer.training else x), y  # Augments in training only.


def train(folder, epochs):
    """Leave ``checkpoints/*.ckpt`` and ``metrics.csv`` in a folder; names do not say the step."""
    torch.manual_seed(0)
    saving = ModelCheckpoint(
        folder / "checkpoints", "{epoch}", save_top_k=-1, save_last=True, save_on_train_epoch_end=True
    )
    logger = CSVLogger(folder, "", "")
    monitor = NeuralCollapseMonitor(measures=MEASURES)
    options = {"enable_checkpointing": True, "max_epochs": epochs, "num_sanity_val_steps": 0}
    trainer = quiet_trainer(folder, callbacks=[monitor, saving], logger=logger, **options)
    trainer.fit(Net(6), Data())
