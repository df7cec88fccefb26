"""Runs of a module that knows nothing of OptimizerLaws, with many optimizers."""

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.trainers import quiet_trainer

K, D = 4, 6


class Net(L.LightningModule):
    """Batch norm and dropout in float64, on unbalanced samples in batches of a random order."""

    def __init__(self, optimizer, loss=F.cross_entropy, head=None, penalty=0.0, dropout=0.3, schedule=False):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, D), nn.BatchNorm1d(D), nn.Tanh(), nn.Dropout(dropout))
        self.last = nn.Linear(D, K) if head is None else head
        self.make, self.loss, self.penalty, self.schedule = optimizer, loss, penalty, schedule
        self.double()

    def forward(self, x):
        return self.last(self.body(x))

    def training_step(self, batch, batch_idx):
        return self.loss(self(batch[0]), batch[1]) + self.penalty / 2 * self.last.weight.square().sum()

    def configure_optimizers(self):
        optimizer = self.make(self)
        if not self.schedule:
            return optimizer
        rate = (lambda i: 0.95**i) if self.schedule is True else (lambda i: 1 - i / self.schedule)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def data(**options):
    generator = torch.Generator().manual_seed(0)
    y = torch.multinomial(torch.tensor([0.6, 0.2, 0.1, 0.1]), 50, replacement=True, generator=generator)
    x = torch.randn(50, 3, generator=generator).double() + y[:, None]
    return DataLoader(TensorDataset(x, y), **({"batch_size": 8, "shuffle": True} | options))


class Record(L.Callback):
    """Keeps the values that callbacks see after each batch."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, *_):
        self.rows.append({tag: float(v) for tag, v in trainer.callback_metrics.items() if tag.startswith("laws/")})


def fit(folder, laws, model, loader=None, seed=0, ckpt_path=None, **options):
    torch.manual_seed(seed)
    record = Record()
    callbacks = [*([laws] if laws is not None else []), record, *options.pop("callbacks", [])]
    trainer = quiet_trainer(folder, **({"max_epochs": 4, "callbacks": callbacks} | options))
    trainer.fit(model, data() if loader is None else loader, ckpt_path=ckpt_path)
    return record.rows, trainer


def made(*args, seed=0, **options):
    torch.manual_seed(seed)
    return Net(*args, **options)


def sgd(**options):
    return lambda model: torch.optim.SGD(model.parameters(), **({"lr": 0.1} | options))


def with_groups(model):
    """Decay on weights alone, as is usual, and a step of its own for the head."""
    decayed = [p for p in model.body.parameters() if p.ndim > 1]
    others = [p for p in (*model.body.parameters(), model.last.bias) if p.ndim < 2]
    groups = [{"params": others}, {"params": decayed, "weight_decay": 0.1}]
    groups.append({"params": [model.last.weight], "weight_decay": 0.2, "lr": 0.3})
    return torch.optim.SGD(groups, lr=0.1, momentum=0.5)


LINEAR = {
    "plain": sgd(),
    "decay": sgd(weight_decay=0.1),
    "momentum": sgd(momentum=0.9, weight_decay=0.1),
    "dampened": sgd(momentum=0.9, dampening=0.5, weight_decay=0.1),
    "nesterov": sgd(momentum=0.9, nesterov=True, weight_decay=0.1),
    "nesterov, one tensor at a time": sgd(momentum=0.9, nesterov=True, foreach=False),
    "fused": sgd(momentum=0.9, weight_decay=0.1, fused=True),
    "groups": with_groups,
    "step in a tensor": sgd(lr=torch.tensor(0.1, dtype=torch.float64), weight_decay=0.1, foreach=False),
}


def norm_of_sum(weight):
    return float(weight.detach().sum(0).norm())


def hooks_of(trainer):
    return sum(len(o._optimizer_step_pre_hooks) + len(o._optimizer_step_post_hooks) for o in trainer.optimizers)


def loss_of(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def said(caplog):
    return [record.getMessage() for record in caplog.records if "no exact law" in record.getMessage()]


def adaptive(kind):
    return lambda model: kind(model.parameters(), lr=0.05, weight_decay=0.2)


def repeated(count):
    """All samples in each batch, which is faster than as many epochs."""
    return DataLoader(data().dataset, batch_sampler=[list(range(50))] * count)
