"""Each form of head, output and batch is measured right, or refused with the argument that repairs it."""

import warnings

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from nclightning.callbacks import NeuralCollapseMonitor
from tests.forms import CASES
from tests.trainers import quiet_trainer


class Wrapped(L.LightningModule):
    """A network in a LightningModule that knows nothing of the monitor."""

    def __init__(self, form, rate):
        super().__init__()
        self.net, self.rate = form.model, rate
        self.anchor = nn.Parameter(torch.zeros(()))  # Something to train where the rest stands still.
        self._step = form.step or (lambda model, batch: nn.functional.cross_entropy(first(model(batch[0])), batch[1]))

    def forward(self, *args, **kwargs):
        return self.net(*args, **kwargs)

    def training_step(self, batch, batch_idx):
        self.trainer.steps = batch_idx + 1
        return self._step(self, batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.rate)


def first(output):
    """The first tensor of as many columns as labels need, whatever it means."""
    values = [output]
    while values:
        value = values.pop(0)
        if isinstance(value, torch.Tensor):
            return value.flatten(1) if value.ndim != 4 or value.shape[2] == 1 else value
        values += list(
            value.values()
            if isinstance(value, dict)
            else value
            if isinstance(value, tuple | list)
            else vars(value).values()
        )
    raise AssertionError


def oracle(features, weight, labels):
    """NC1, NC2 and NC3 by the book."""
    h, w, y = (t.detach().double().numpy() if t.is_floating_point() else t.numpy() for t in (features, weight, labels))
    present = np.unique(y)
    means = np.stack([h[y == k].mean(0) for k in present])
    centred, noise = means - means.mean(0), h - means[np.searchsorted(present, y)]
    between = centred.T @ centred / len(present)
    within = noise.T @ noise / len(y)
    nc1 = np.trace(within @ np.linalg.pinv(between, rcond=1e-9)) / len(present)
    etf = (np.eye(len(w)) - 1 / len(w)) / np.sqrt(len(w) - 1)
    gram = w @ w.T
    read = {"nc1": nc1, "nc2": np.linalg.norm(gram / np.linalg.norm(gram) - etf)}
    if len(present) == len(w):
        product = w @ centred.T
        read["nc3"] = np.linalg.norm(product / np.linalg.norm(product) - etf)
    return read


def fit(form, folder, callbacks=()):
    model = Wrapped(form, 0.1)
    trainer = quiet_trainer(folder, max_epochs=1, callbacks=list(callbacks))
    trainer.steps = 0
    loader = DataLoader([form.batch, *form.later], batch_size=None, collate_fn=lambda batch: batch)
    try:
        trainer.fit(model, loader)
    finally:
        assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 0
        form.steps = trainer.steps
    return model, {k.removeprefix("nc/train/"): float(v) for k, v in trainer.callback_metrics.items()}


def made(name):
    torch.manual_seed(0)
    return CASES[name]()


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*in eval mode at the start of training")
@pytest.mark.parametrize("name", CASES)
def test_right_or_refused(name, tmp_path):
    form = made(name)
    monitor = NeuralCollapseMonitor(**{"stages": ("train",)} | form.options)
    if form.refused:
        with pytest.raises((ValueError, TypeError), match=f"(?s){form.refused}"):
            fit(form, tmp_path, [monitor])
        assert form.steps == form.late
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, read = fit(form, tmp_path, [monitor])
    said = [str(w.message) for w in caught if issubclass(w.category, UserWarning) and "head" in str(w.message)]
    assert [form.warns in each for each in said] == [True] * bool(form.warns)
    model.net.eval()
    with torch.no_grad():
        expected = oracle(*form.pair(model.net, form.batch))
    exact = not any(p.dtype == torch.bfloat16 for p in model.parameters())
    assert {k: read[k] for k in expected} == pytest.approx(expected, rel=1e-4 if exact else 5e-2, abs=1e-6)
    bare = fit(made(name), tmp_path)[0].state_dict()
    assert all(torch.equal(value, bare[key]) for key, value in model.state_dict().items())
