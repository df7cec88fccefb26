"""Runs that were stopped by callbacks of others: they end again when they are resumed, until their settings change."""

import re
import time
from datetime import timedelta

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, Timer
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
    "patience": (
        lambda: [patience()],
        r"EarlyStopping\(monitor='flat'\) ended .*did not improve",
        lambda: [patience(5)],
    ),
    "threshold": (
        lambda: [patience(stopping_threshold=2.0)],
        r"EarlyStopping.*Stopping threshold reached",
        lambda: [patience(9, stopping_threshold=0.5)],
    ),
    "none left": (lambda: [patience()], "EarlyStopping", lambda: []),
    "another metric": (lambda: [patience()], "EarlyStopping", lambda: [EarlyStopping("flat", mode="max", patience=9)]),
    "time": (lambda: [Slow(), timer()], "Timer ended .*0:00:00.02", lambda: [Slow(), timer(1e4)]),
    "somebody's": (lambda: [StopAt(7)], r"should_stop, set by StopAt, ended", lambda: [StopAt(20)]),
    "somebody's other setting": (lambda: [StopAt(7)], "StopAt", lambda: [StopAt(7, note="b")]),
    "somebody's, gone": (lambda: [StopAt(7)], "StopAt", lambda: []),
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
    assert re.search(sentence, said)
    longer = fit_plain(tmp_path, change(), last(tmp_path))
    assert longer.global_step > stopped
    assert f"had been stopped at iteration {stopped}. The settings" in capsys.readouterr().out


def test_the_patience_that_is_given_holds_after_a_resume(tmp_path):
    """Lightning takes that of the checkpoint."""
    stopped = fit_plain(tmp_path, [patience(3)])
    longer = fit_plain(tmp_path, [patience(5)], last(tmp_path))
    whole = fit_plain(tmp_path / "whole", [patience(5)])
    assert stopped.global_step < longer.global_step == whole.global_step
    fit_plain(tmp_path / "less", [patience(9)], max_steps=15)
    less = fit_plain(tmp_path / "less", [patience(4)], last(tmp_path / "less"))
    assert less.global_step == 18


def test_less_patience_would_have_stopped_it_too(tmp_path):
    stopped = fit_plain(tmp_path, [patience(3)]).global_step
    assert fit_plain(tmp_path, [patience(2)], last(tmp_path)).global_step == stopped


@pytest.mark.parametrize("least", [{"min_steps": 20}, {"min_epochs": 8}])
def test_a_decision_that_had_to_wait_is_not_forgotten(least, tmp_path, capsys):
    """A threshold is reached once; then a minimum number of steps lets training go on."""
    steps = {"max_steps": 40}
    whole = fit_plain(tmp_path / "whole", [Once(6)], **steps, **least).global_step
    assert 6 < whole < 40
    fit_plain(tmp_path, [Once(6)], max_steps=9, **least)
    assert fit_plain(tmp_path, [Once(6)], last(tmp_path), **steps, **least).global_step == whole
    # With a later minimum a run goes on that had ended.
    later = fit_plain(tmp_path, [Once(6)], last(tmp_path), min_steps=30, **steps).global_step
    assert 30 <= later < 40


class Once(L.Callback):
    """Decides at one step only."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.should_stop = True


def test_more_steps_or_epochs_let_a_run_go_on_that_was_not_stopped(tmp_path, capsys):
    for steps in (6, 9):
        assert fit_plain(tmp_path, [patience(9)], None if steps == 6 else last(tmp_path), max_steps=steps)
    assert torch.load(last(tmp_path), weights_only=True)["global_step"] == 9
    for epochs in (4, 5):
        fit_plain(tmp_path, [patience(9)], last(tmp_path), max_steps=-1, max_epochs=epochs)
    assert torch.load(last(tmp_path), weights_only=True)["global_step"] == 15
    assert "had been stopped" not in capsys.readouterr().out


def test_an_interrupt_is_no_decision_to_stop(tmp_path):
    class Interrupt(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 4:
                raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        fit_plain(tmp_path, [Interrupt()], max_steps=9)
    assert torch.load(last(tmp_path), weights_only=True)["stop"] is None
    assert fit_plain(tmp_path, [], last(tmp_path), max_steps=9).global_step == 9


class KilledAt(L.Callback):
    """Ends a run in its tracks: nothing is saved any more."""

    def __init__(self, hook, step):
        self.step = step
        setattr(self, hook, self._end)

    def _end(self, trainer, *_):
        if trainer.global_step == self.step:
            (own,) = [each for each in trainer.callbacks if isinstance(each, LastCheckpoint)]
            own._saved = None
            raise ZeroDivisionError


@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_train_batch_start", "on_train_batch_end"])
@pytest.mark.parametrize("step", [7, 12])
def test_a_run_killed_around_the_end_of_an_epoch_stops_where_it_would_have(hook, step, tmp_path):
    """Lightning does not ask callbacks again what they decide at the end of an epoch."""

    def fit(folder, callbacks, ckpt_path=None):
        torch.manual_seed(0)
        saves = [*callbacks, LastCheckpoint(3)]
        trainer = quiet_trainer(folder, callbacks=saves, enable_checkpointing=True, max_steps=60)
        trainer.fit(Plain(), loader(), ckpt_path=ckpt_path)
        return trainer

    whole = fit(tmp_path / "whole", [patience()])
    if (hook, step) in [("on_train_epoch_end", 7), ("on_train_batch_start", 12)]:
        return  # Never reached.
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, [patience(), KilledAt(hook, step)])
    again = fit(tmp_path, [patience()], last(tmp_path))
    assert again.global_step == whole.global_step == 12
    for one, other in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert again.fit_loop.epoch_loop._batches_that_stepped == 12


class Silent(UFM):
    """Somebody's module, with hooks of its own."""

    def on_save_checkpoint(self, checkpoint):
        checkpoint["mine"] = 1

    def on_load_checkpoint(self, checkpoint):
        assert checkpoint["mine"] == 1

    def setup(self, stage):
        self.mine = stage


class SilentMonitor(OptimalityMonitor):
    """Somebody's monitor."""

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        checkpoint["of the monitor"] = 1


def fit_ufm(folder, callbacks, ckpt_path=None, model=Silent, **options):
    torch.manual_seed(0)
    logger = RunLogger(str(folder))
    if ckpt_path is not None:
        logger.continue_run(ckpt_path.parents[1], torch.load(ckpt_path, weights_only=True)["global_step"])
    trainer = quiet_trainer(folder, max_steps=60, callbacks=callbacks, logger=logger, enable_checkpointing=True)
    kind = {"lambda_": 5e-3, "iterations_per_step": 10} | options
    trainer.fit(model(4, 3, 6, "ce", **kind), datamodule=IndexDataModule(steps_per_epoch=2), ckpt_path=ckpt_path)
    return trainer


def last_of(folder):
    return folder / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt"


def test_hooks_of_a_module_do_not_lose_why_it_ended(tmp_path, capsys):
    diverging = {"optimizer": lambda params: torch.optim.SGD(params, lr=1e6)}
    trainer = fit_ufm(tmp_path, [SilentMonitor(5), LastCheckpoint(10)], **diverging)
    assert trainer.lightning_module.mine == "fit"
    checkpoint = torch.load(last_of(tmp_path), weights_only=True)
    assert checkpoint["failure"]["is_error"]
    assert checkpoint["mine"] == checkpoint["of the monitor"] == 1
    assert checkpoint["readings"]["count"] > 0
    before = (last_of(tmp_path).parents[1] / "readings.csv").read_bytes()
    capsys.readouterr()
    again = fit_ufm(tmp_path, [SilentMonitor(5), LastCheckpoint(10)], last_of(tmp_path), **diverging)
    assert again.global_step == trainer.global_step
    assert "The objective is not finite any more" in capsys.readouterr().out
    assert (last_of(tmp_path).parents[1] / "readings.csv").read_bytes() == before


def test_hooks_of_a_module_do_not_lose_what_is_checked(tmp_path):
    fit_ufm(tmp_path, [OptimalityMonitor(5), LastCheckpoint(10)])
    with pytest.raises(ValueError, match="belongs to another problem"):
        fit_ufm(tmp_path, [OptimalityMonitor(5), LastCheckpoint(10)], last_of(tmp_path), lambda_=1e-3)


class StopIteration_(L.Callback):
    """Stops in the middle of a Lightning step of a full-batch run."""

    def on_iteration_end(self, trainer, pl_module, batch, iteration):
        if iteration == 33:
            trainer.should_stop = True


@pytest.mark.parametrize("from_end", [True, False])
def test_a_full_batch_run_stopped_within_a_step_ends_again_with_its_last_row(from_end, tmp_path, capsys):
    class SaveAt(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.save_checkpoint(last_of(tmp_path).with_name("33.ckpt"))

    monitors = [OptimalityMonitor(5), NeuralCollapseMonitor(7)]
    callbacks = [StopIteration_(), *monitors, LastCheckpoint(10), *([] if from_end else [SaveAt()])]
    assert fit_ufm(tmp_path, callbacks, model=UFM).global_step == 33
    table = last_of(tmp_path).parents[1] / "readings.csv"
    rows = table.read_bytes()
    path = last_of(tmp_path)
    if not from_end:  # As after a kill between the stop and the last row.
        path = path.with_name("33.ckpt")
        table.write_bytes(rows[: rows.rstrip(b"\n").rfind(b"\n") + 1])
    callbacks = [StopIteration_(), OptimalityMonitor(5), NeuralCollapseMonitor(7), LastCheckpoint(10)]
    assert fit_ufm(tmp_path, callbacks, path, model=UFM).global_step == 33
    assert table.read_bytes() == rows
    assert "should_stop, set by StopIteration_, ended it at iteration 33" in capsys.readouterr().out
