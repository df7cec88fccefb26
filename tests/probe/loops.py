"""A network, its data and its steps, for loops in which a Probe measures."""

import random

import lightning as L
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

K, D, N = 4, 6, 26


X, Y = torch.randn(N, 5, generator=torch.Generator().manual_seed(0)), torch.arange(N) % K


EXACT = {"rel": 1e-12, "abs": 1e-12}


class Net(nn.Module):
    """It remembers running statistics, and draws dropout."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(5, D), nn.BatchNorm1d(D), nn.Tanh(), nn.Dropout(0.2))
        self.out = nn.Linear(D, K)

    def forward(self, x):
        return self.out(self.body(x))


def loader(rows=slice(None), dtype=torch.float64, **options):
    return DataLoader(TensorDataset(X[rows].to(dtype), Y[rows]), **{"batch_size": 8, "shuffle": True} | options)


def made():
    torch.manual_seed(0)
    return Net().double()


def step(model, optimizer, x, y):
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def states(model):
    parts = [*model.modules()]
    hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in parts]
    rng = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
    grads = [None if p.grad is None else p.grad.tolist() for p in model.parameters()]
    tensors = {name: value.tolist() for name, value in model.state_dict().items()}
    return [part.training for part in parts], hooks, rng, grads, tensors


class Wrapped(L.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
