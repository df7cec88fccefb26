"""A module that knows nothing of the monitors, its data, and fits of it."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nclightning.functional import class_statistics, etf_deviation, self_duality, within_class_variability
from tests.trainers import quiet_trainer

K, N = 3, 50


class Net(L.LightningModule):
    """Batch norm, dropout, and an auxiliary head that is registered last."""

    def __init__(self, labels_under=None, frozen=False):
        super().__init__()
        self.rate = 0.0 if frozen else 0.01
        self.body = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5))
        self.last = nn.Linear(8, K)
        self.auxiliary = nn.Linear(8, K)
        self.labels_under = labels_under

    def forward(self, x):
        h = self.body(x)
        self.auxiliary(h)
        return self.last(h)

    def step(self, batch):
        x, y = (batch["x"], batch[self.labels_under]) if self.labels_under else batch
        return nn.functional.cross_entropy(self(x), y)

    def training_step(self, batch, batch_idx):
        return self.step(batch)

    def validation_step(self, batch, batch_idx):
        self.step(batch)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.rate)


def loader(samples, **options):
    return DataLoader(TensorDataset(*samples), **({"batch_size": 8, "shuffle": True, "drop_last": True} | options))


def fit(folder, callbacks, data, model=None, **options):
    torch.manual_seed(0)
    model = Net() if model is None else model
    trainer = quiet_trainer(folder, **({"max_epochs": 3, "callbacks": callbacks} | options))
    trainer.fit(model, *([data] if not isinstance(data, tuple) else data))
    return model, trainer


def measure(model, samples):
    model.eval()
    with torch.no_grad():
        stats = class_statistics(model.body(samples[0]), samples[1], K)
    weight = model.last.weight.detach().double()
    return {
        "nc1": float(within_class_variability(stats)),
        "nc2": float(etf_deviation(weight)),
        "nc3": float(self_duality(stats, weight)),
    }


def hooks_of(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def read(trainer, stage="train"):
    return {name: float(trainer.callback_metrics[f"nc/{stage}/{name}"]) for name in ("nc1", "nc2", "nc3")}


def metrics(trainer, prefix="nc/"):
    return {k.removeprefix(prefix): float(v) for k, v in trainer.callback_metrics.items() if k.startswith(prefix)}


def features_of(model, x):
    model.eval()
    with torch.no_grad():
        return model.body(x)


class Pair(Net):
    """Takes batches of two loaders."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch["a"], batch_idx) + super().training_step(batch["b"], batch_idx)


class TwoOptimizers(Net):
    """Trains its halves with an optimizer each."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.step(batch))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.01) for part in (self.body, self.last)]
