"""Runs that were stopped by callbacks of others: they end again when they are resumed, until their settings change."""

import time
from datetime import timedelta
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nclightning.callbacks import LastCheckpoint, NeuralCollapseMonitor, OptimalityMonitor
from nclightning.data import IndexDataModule
from nclightning.loggers import RunLogger
from nclightning.models import UFM
from tests.trainers import quiet_trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`", "ignore:.*does not have many workers", "ignore:You're resuming from"
)


class Plain(L.LightningModule):
    """Somebody's own module, whose loss stays where it is."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def training_step(self, batch, batch_idx):
        self.log("flat", torch.tensor(1.0))
        return nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class StopAt(L.Callback):
    """Somebody's own callback."""

    def __init__(self, step, note="a"):
        self._step, self.note, self.seen, self.things = step, note, 0, [nn.Linear(1, 1)]

    def on_train_batch_end(self, trainer, *_):
        self.seen += 1
        if trainer.global_step >= self._step:
            trainer.should_stop = True


def loader():
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(12, 3, generator=generator), torch.arange(12) % 2)
    return DataLoader(data, batch_size=4)


def fit_plain(folder, callbacks, ckpt_path=None, model=None, **options):
    torch.manual_seed(0)
    trainer = quiet_trainer(
        folder, callbacks=[*callbacks, LastCheckpoint(100)], enable_checkpointing=True, **{"max_steps": 60} | options
    )
    trainer.fit(model or Plain(), loader(), ckpt_path=ckpt_path)
    return trainer


def last(folder):
    return folder / "checkpoints" / "last.ckpt"


def patience(patience=3, **options):
    return EarlyStopping("flat", patience=patience, **options)


class Slow(L.Callback):
    """Lets time pass for a timer."""

    def on_train_batch_end(self, *_):
        time.sleep(0.01)


def timer(seconds=0.02):
    return Timer(timedelta(seconds=seconds))


# What stops, where, what is said of it, and a change that lets the run go on.
STOPS = {
    "patience": (lambda: [patience()], r"EarlyStopping\(monitor='flat'\) ended .*did not improve", lambda: [patience(5)]),
    "threshold": (
        lambda: [patience(stopping_threshold=2.0)],
        r"EarlyStopping.*Stopping threshold reached",
        lambda: [patience(9, stopping_threshold=0.5)],
    ),
    "none left": (lambda: [patience()], "EarlyStopping", lambda: []),
    "another metric": (lambda: [patience()], "EarlyStopping", lambda: [EarlyStopping("flat", mode="max", patience=9)]),
    "time": (lambda: [Slow(), timer()], "Timer ended .*0:00:00.02", lambda: [Slow(), timer(1e4)]),
    "somebody's": (lambda: [StopAt(7)], r"should_stop, set by StopAt or Plain, ended", lambda: [StopAt(20)]),
    "somebody's other setting": (lambda: [StopAt(7)], "StopAt or Plain", lambda: [StopAt(7, note="b")]),
    "somebody's, gone": (lambda: [StopAt(7)], "StopAt or Plain", lambda: []),
}


@pytest.mark.parametrize("name", STOPS)
def test_a_run_stopped_by_a_callback_ends_again_until_its_settings_change(name, tmp_path, capsys):
    make, sentence, change = STOPS[name]
    stopped = fit_plain(tmp_path, make()).global_step
    assert stopped < 60
    before = last(tmp_path).read_bytes()
    capsys.readouterr()
    again = fit_plain(tmp_path, make(), last(tmp_path))
    assert again.global_step == stopped
    assert last(tmp_path).read_bytes() == before
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "finished" in line]
    assert said.startswith("The run is finished. ")
    assert f" ended it at iteration {stopped}" in said
    import re

    assert re.search(sentence, said)
    longer = fit_plain(tmp_path, change(), last(tmp_path))
    assert longer.global_step > stopped
    assert f"had been stopped at iteration {stopped}. The settings" in capsys.readouterr().out
