"""Monitors in trainers of ``pytorch_lightning``, whose classes know nothing of those of ``lightning.pytorch``."""

import importlib

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nclightning.callbacks import (
    IterationProgressBar,
    LastCheckpoint,
    NeuralCollapseMonitor,
    OptimalityMonitor,
    TensorBoardDashboard,
)
from nclightning.errors import UserError
from nclightning.figures import read_readings
from nclightning.loggers import RunLogger
from tests.trainers import quiet_trainer

pl = pytest.importorskip("pytorch_lightning")
LABELS = torch.arange(60) % 3
INPUTS = torch.randn(60, 8, generator=torch.Generator().manual_seed(0)) + nn.functional.one_hot(LABELS, 8)


def make(package, seed=1):
    """A classifier that logs in its forward, as some do, with a part that is a LightningModule of the other package."""
    torch.manual_seed(seed)
    other = pl if package is L else L

    class Part(other.LightningModule):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 6))

        def forward(self, x):
            return self.layers(x)

    class Net(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.body, self.head = Part(), nn.Linear(6, 3)

        def forward(self, x):
            self.log("in_forward", x.mean(), on_epoch=True, on_step=False, batch_size=len(x), sync_dist=True)
            return self.head(self.body(x))

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            self(batch[0])

        test_step = validation_step

        def on_before_batch_transfer(self, batch, dataloader_idx):
            return [batch[0] + (0.1 if self.trainer.training else 0), batch[1]]

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    return Net()


def whole():
    return DataLoader(TensorDataset(INPUTS, LABELS), batch_size=60)


def loader():
    return DataLoader(TensorDataset(INPUTS, LABELS), batch_size=20, shuffle=True)


def trainer_of(package, folder, *callbacks, **options):
    chosen = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 3,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "limit_val_batches": 1,
        "default_root_dir": folder,
    }
    return package.Trainer(callbacks=list(callbacks), **(chosen | options))


class Seen:
    """Collects what is logged in a fit, a validation and a test."""

    def __init__(self):
        self.values = []

    def add(self, trainer):
        self.values.append({tag: float(value) for tag, value in trainer.callback_metrics.items()})


def run(package, folder, *callbacks, **options):
    """Fit, validate and test; return the weights, and the values after each."""
    module, seen = make(package), Seen()
    trainer = trainer_of(package, folder, *callbacks, **options)
    trainer.fit(module, loader(), whole())
    seen.add(trainer)
    trainer.validate(module, whole(), verbose=False)
    seen.add(trainer)
    trainer.test(module, whole(), verbose=False)
    seen.add(trainer)
    return [p.detach() for p in module.parameters()], seen.values


MONITORS = {
    "sweep": lambda: [NeuralCollapseMonitor(measures=("all",), every_n_steps=2)],
    "online": lambda: [NeuralCollapseMonitor(source="online")],
    "several": lambda: [NeuralCollapseMonitor(stages=("train",)), NeuralCollapseMonitor(stages=("val", "test"))],
    "optimality": lambda: [OptimalityMonitor(loss="ce", lambda_w=1e-3, lambda_h=1e-3)],
    "datasets": lambda: [NeuralCollapseMonitor(datasets={"more": loader()}, ood=(), stages=("train",))],
    "head by name": lambda: [NeuralCollapseMonitor(head="head", layers=("body.layers.0",))],
}


@pytest.mark.parametrize("kind", MONITORS)
def test_values_are_those_of_the_same_run_in_lightning(kind, tmp_path):
    weights, values = run(pl, tmp_path, *MONITORS[kind]())
    expected_weights, expected = run(L, tmp_path, *MONITORS[kind]())
    assert values == expected
    assert any(tag.startswith(("nc/", "optimality/")) for tag in values[0])
    assert all(map(torch.equal, weights, expected_weights))


@pytest.mark.parametrize("kind", MONITORS)
def test_the_user_s_own_run_and_logs_stay_as_they_are(kind, tmp_path):
    plain_weights, plain = run(pl, tmp_path)
    weights, values = run(pl, tmp_path, *MONITORS[kind]())
    assert all(map(torch.equal, weights, plain_weights))
    assert [{tag: each[tag] for tag in own} for own, each in zip(plain, values, strict=True)] == plain


def test_a_resumed_run_logs_what_an_uninterrupted_one_does(tmp_path):
    def fit(folder, epochs, path=None):
        callbacks = [
            LastCheckpoint(1),
            NeuralCollapseMonitor(every_n_steps=1),
            OptimalityMonitor(loss="ce", lambda_w=1e-3, lambda_h=1e-3),
        ]
        trainer = trainer_of(pl, folder, *callbacks, max_epochs=epochs)
        module = make(pl, seed=1 if path is None else 2)
        torch.manual_seed(7 if path is None else 8)
        data = DataLoader(TensorDataset(INPUTS, LABELS), batch_size=20)
        trainer.fit(module, data, whole(), ckpt_path=path, weights_only=False)
        return trainer

    straight = fit(tmp_path / "whole", 4)
    fit(tmp_path / "parts", 2)
    again = fit(tmp_path / "parts", 4, tmp_path / "parts/checkpoints/last.ckpt")
    assert again.global_step == straight.global_step == 12
    assert {k: float(v) for k, v in again.callback_metrics.items()} == {
        k: float(v) for k, v in straight.callback_metrics.items()
    }
    one, other = (
        torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=False) for name in ("whole", "parts")
    )
    assert repr(one["callbacks"]) == repr(other["callbacks"])  # Some values are nan.


def test_a_checkpoint_has_what_was_measured_at_its_step_wherever_it_stands_in_the_list(tmp_path):
    monitor = NeuralCollapseMonitor(every_n_steps=1)
    trainer = trainer_of(pl, tmp_path, LastCheckpoint(1), monitor, max_steps=2, max_epochs=-1)
    trainer.fit(make(pl), loader(), whole())
    content = torch.load(tmp_path / "checkpoints/previous.ckpt", weights_only=False)
    assert content["global_step"] == 1
    assert content["callbacks"][monitor.state_key]["last"]["nc/train/nc1"] > 0


def test_a_damaged_checkpoint_is_refused(tmp_path):
    trainer_of(pl, tmp_path, LastCheckpoint(1), max_epochs=1).fit(make(pl), loader(), whole())
    path = tmp_path / "checkpoints/last.ckpt"
    content = bytearray(path.read_bytes())
    weight = torch.load(path, weights_only=False)["state_dict"]["head.weight"].numpy().tobytes()
    content[content.index(weight)] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        trainer_of(pl, tmp_path, LastCheckpoint(1), max_epochs=2).fit(
            make(pl), loader(), whole(), ckpt_path=path, weights_only=False
        )


@pytest.mark.parametrize("of", ["ours", "theirs"])
def test_loggers_get_the_values(of, tmp_path):
    logger = RunLogger(str(tmp_path)) if of == "ours" else pl.loggers.CSVLogger(tmp_path)
    trainer_of(pl, tmp_path, NeuralCollapseMonitor(), TensorBoardDashboard(), logger=logger).fit(
        make(pl), loader(), whole()
    )
    readings = read_readings(logger.log_dir)
    assert readings.iterations[readings.values["nc/train/nc1"] > 0].tolist() == [3, 6, 9]
    assert readings.iterations[readings.values["nc/val/nc1"] > 0].tolist() == [3, 6, 9]


def test_callbacks_of_theirs_find_the_values(tmp_path):
    stop = pl.callbacks.EarlyStopping("nc/train/nc1", min_delta=1e9, patience=1)
    best = pl.callbacks.ModelCheckpoint(tmp_path / "best", monitor="nc/val/nc2", filename="{epoch}")
    trainer = trainer_of(pl, tmp_path, NeuralCollapseMonitor(), stop, best, enable_checkpointing=True, max_epochs=9)
    trainer.fit(make(pl), loader(), whole())
    assert trainer.current_epoch == 2
    assert best.best_model_score > 0


def test_strategies_under_which_no_process_has_the_weights_are_refused(tmp_path, monkeypatch):
    strategies = importlib.import_module("pytorch_lightning.strategies")
    module, monitor = make(pl), NeuralCollapseMonitor()
    trainer = trainer_of(pl, tmp_path, monitor)
    monkeypatch.setattr(type(trainer), "strategy", strategies.FSDPStrategy())
    monitor.setup(trainer, module, "fit")
    with pytest.raises(UserError, match="FSDPStrategy shards the weights"):
        monitor.on_fit_start(trainer, module)


def test_the_bar_of_full_batch_runs_is_refused(tmp_path):
    trainer = trainer_of(pl, tmp_path, IterationProgressBar(), enable_progress_bar=True)
    with pytest.raises(UserError, match=r"lightning\.Trainer"):
        trainer.fit(make(pl), loader(), whole())


def test_several_processes_log_what_one_does(tmp_path):
    values = []
    for devices in (1, 2):
        logger = pl.loggers.CSVLogger(tmp_path, version=devices)
        data = DataLoader(TensorDataset(INPUTS, LABELS), batch_size=60 // devices)
        trainer = trainer_of(
            pl, tmp_path, NeuralCollapseMonitor(), logger=logger, devices=devices, max_epochs=2,
            strategy="ddp_fork" if devices > 1 else "auto",
        )  # fmt: skip
        trainer.fit(make(pl), data, whole())
        values.append(read_readings(logger.log_dir).values["nc/train/nc1"])
    assert values[0] == pytest.approx(values[1], rel=1e-4, nan_ok=True)


def test_a_run_of_lightning_itself_is_not_disturbed_by_the_other_package(tmp_path):
    module = make(L)
    callbacks = [NeuralCollapseMonitor(), LastCheckpoint()]
    quiet_trainer(tmp_path, max_epochs=1, callbacks=callbacks, enable_checkpointing=True).fit(module, loader(), whole())
    assert (tmp_path / "checkpoints/last.ckpt").is_file()
