"""One row per iterate, whoever reads there, and none lost when a logger fails."""

import csv
import math
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nclightning.callbacks import LastCheckpoint, NeuralCollapseMonitor, OptimalityMonitor
from nclightning.callbacks.monitor import MonitorAtIterates
from nclightning.callbacks.rows import Rows
from nclightning.data import IndexDataModule
from nclightning.errors import UserError
from nclightning.files import observers
from nclightning.loggers import RunLogger
from nclightning.models import UFM
from nclightning.table import check_rows
from tests.trainers import quiet_trainer


def fit(folder, callbacks, max_steps=25, logger=None, ckpt_path=None, **options):
    torch.manual_seed(0)
    model = UFM(4, 3, 6, "ce", lambda_=5e-3, **({"iterations_per_step": 10} | options))
    saves = any(isinstance(each, LastCheckpoint) for each in callbacks)
    trainer = quiet_trainer(
        folder,
        max_steps=max_steps,
        callbacks=callbacks,
        logger=RunLogger(str(folder)) if logger is None else logger,
        enable_checkpointing=saves,
    )
    trainer.fit(model, datamodule=IndexDataModule(), ckpt_path=ckpt_path)
    return trainer


def table(folder):
    with Path(folder, "lightning_logs/version_0/readings.csv").open() as file:
        return {int(row.pop("iteration")): {k: v for k, v in row.items() if v} for row in csv.DictReader(file)}


def scalars(folder):
    events = EventAccumulator(str(Path(folder, "lightning_logs/version_0")), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory):
    """All values at every iterate up to 25."""
    folder = tmp_path_factory.mktemp("everywhere")
    fit(folder, [OptimalityMonitor(1), NeuralCollapseMonitor(1)])
    return table(folder)


@pytest.mark.parametrize("cadences", [(1, 7), (5, 5), (5, 10), (10, 5), (3, 7), (7, 3), (10, 100), (100, 10), (4, 6)])
@pytest.mark.parametrize("max_steps", [20, 21])
def test_two_cadences_share_the_rows(cadences, max_steps, everywhere, tmp_path):
    seen = []

    class Watch(L.Callback):
        def on_train_end(self, trainer, pl_module):
            seen.append(dict(trainer.callback_metrics))

    fit(
        tmp_path,
        [OptimalityMonitor(cadences[0]), NeuralCollapseMonitor(cadences[1]), LastCheckpoint(4), Watch()],
        max_steps,
    )
    rows = table(tmp_path)
    expected = {}
    for iteration in range(max_steps + 1):
        for cadence, is_ours in zip(cadences, (lambda tag: "nc/" not in tag, lambda tag: "nc/" in tag), strict=True):
            if iteration % cadence == 0 or iteration == max_steps:
                values = {tag: value for tag, value in everywhere[iteration].items() if is_ours(tag)}
                expected.setdefault(iteration, {}).update(values)
    assert rows == expected
    # Each value once, the last row included.
    for tag, curve in scalars(tmp_path).items():
        finite = [it for it, row in rows.items() if math.isfinite(float(row.get(tag, "nan")))]
        assert [step for step, _ in curve] == finite, tag


def test_the_last_value_of_each_tag_is_in_callback_metrics(tmp_path):
    """Also of a monitor that did not read at the last iterate of the Lightning step."""
    seen = {}

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            seen[trainer.global_step] = {k: float(v) for k, v in trainer.callback_metrics.items()}

    fit(tmp_path, [OptimalityMonitor(5), NeuralCollapseMonitor(4), Watch()], 20)
    rows = table(tmp_path)
    assert seen[10]["nc/train/nc1"] == float(rows[8]["nc/train/nc1"])
    assert seen[10]["log10/nc/train/nc1"] == float(rows[8]["log10/nc/train/nc1"])
    assert seen[10]["loss"] == float(rows[10]["loss"])


class WeightNorm(MonitorAtIterates):
    """Somebody's own monitor."""

    def read(self, pl_module, batch):
        return {"weight_norm": pl_module.head.weight.detach().norm()}


class AtTheEnd(L.Callback):
    """Somebody's own value of the last iterate; listed after the monitors or before them."""

    def on_train_end(self, trainer, pl_module):
        Rows.of(trainer).add(trainer.global_step, {"mine": 1.5})


@pytest.mark.parametrize("order", [1, -1])
def test_own_monitors_and_values_of_the_last_iterate_join_its_row(order, tmp_path):
    class Saver(L.Callback):
        def on_train_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "own.ckpt")

    callbacks = [OptimalityMonitor(10), WeightNorm(7), NeuralCollapseMonitor(5), AtTheEnd()]
    fit(tmp_path, [*callbacks[::order], LastCheckpoint(10)], 23)
    rows = table(tmp_path)
    assert sorted(rows) == [0, 5, 7, 10, 14, 15, 20, 21, 23]
    assert set(rows[14]) == {"weight_norm"}
    assert {"mine", "weight_norm", "loss", "nc/train/nc1"} <= set(rows[23])
    other = tmp_path / "other"
    fit(other, [OptimalityMonitor(10), Saver(), NeuralCollapseMonitor(4)], 23)  # A checkpoint among the last readings.
    assert {"loss", "nc/train/nc1"} <= set(table(other)[23])


def test_values_that_come_too_late_are_refused(tmp_path):
    class Late(L.Callback):
        def on_iteration_end(self, trainer, pl_module, batch, iteration):
            if iteration == 12:
                Rows.of(trainer).add(3, {"mine": 1.0})

    with pytest.raises(ValueError, match=r"values of iteration 3 \(mine\) came after its row was complete"):
        fit(tmp_path, [OptimalityMonitor(5), Late()])


def test_two_fits_with_one_logger_are_still_refused(tmp_path):
    logger = RunLogger(str(tmp_path))
    fit(tmp_path, [OptimalityMonitor(5)], logger=logger)
    with pytest.raises(ValueError, match="two runs share a RunLogger"):
        fit(tmp_path, [OptimalityMonitor(5)], logger=logger)


class Flaky(CSVLogger):
    """Fails once, in the middle of the rows of a Lightning step."""

    def __init__(self, folder):
        super().__init__(folder)
        self.seen, self.fails = [], True

    def log_metrics(self, metrics, step=None):
        if step == 15 and self.fails:
            self.fails = False
            raise OSError(28, "No space left on device")
        self.seen.append(step)


class Loggers:
    """A trainer's loggers; the flaky one first or last."""

    def __init__(self, folder, flaky_first):
        self.flaky, self.ours = Flaky(folder / "other"), RunLogger(str(folder))
        self.all = [self.flaky, self.ours] if flaky_first else [self.ours, self.flaky]


@pytest.mark.parametrize("flaky_first", [False, True])
def test_rows_that_one_logger_did_not_take_are_kept_and_come_once(flaky_first, tmp_path):
    loggers = Loggers(tmp_path, flaky_first)
    with pytest.raises(OSError, match="No space left"):
        fit(tmp_path, [OptimalityMonitor(5), NeuralCollapseMonitor(5)], logger=loggers.all)
    # The end of a fit that failed tries once more.
    assert loggers.flaky.seen == [0, 5, 10, 15, 20]
    assert list(table(tmp_path)) == [0, 5, 10, 15, 20]
    assert [step for step, _ in scalars(tmp_path)["loss"]] == [0, 5, 10, 15, 20]


@pytest.fixture
def disk():
    """Makes the disk refuse what a function says, by operation and path."""
    refusals = []

    def observe(operation):
        if not operation.done and any(refuses(operation) for refuses in refusals):
            raise OSError(28, "No space left on device")

    observers.append(observe)
    yield refusals
    observers.remove(observe)


@pytest.mark.parametrize("name", ["readings.csv", "events", "last.ckpt"])
@pytest.mark.parametrize("at", [0, 10, 20])
@pytest.mark.filterwarnings("ignore:the last checkpoint could not be saved")
def test_a_full_disk_ends_in_a_sentence_and_a_later_resume_has_all_rows(name, at, disk, tmp_path):
    """Full from an iteration on, for good. What the last checkpoint promises is there."""
    reached = []

    class Watch(L.Callback):
        def on_iteration_end(self, trainer, pl_module, batch, iteration):
            reached.append(iteration)

    def monitors():
        return [OptimalityMonitor(5), NeuralCollapseMonitor(4), LastCheckpoint(10)]

    def refuses(operation):
        return name in operation.path.name and reached and reached[-1] >= max(at, 1)

    disk.append(refuses)
    with pytest.raises(UserError, match=r"cannot write .*: No space left on device"):
        fit(tmp_path, [Watch(), *monitors()], 40)
    disk.clear()
    whole = tmp_path / "whole"
    fit(whole, monitors(), 40)
    run = tmp_path / "lightning_logs" / "version_0"
    checkpoint = run / "checkpoints" / "last.ckpt"
    if not checkpoint.exists():
        assert at < 20
        return
    content = torch.load(checkpoint, weights_only=True)
    check_rows(run / "readings.csv", content["global_step"], content["readings"])
    logger = RunLogger(str(tmp_path))
    logger.continue_run(run, content["global_step"])
    fit(tmp_path, monitors(), 40, logger=logger, ckpt_path=checkpoint)
    assert table(tmp_path) == table(whole)
    assert scalars(tmp_path) == scalars(whole)


def test_the_words_of_the_first_error_are_kept(disk, tmp_path):
    """An interrupt on a full disk ends as an interrupt, and says what could not be written."""

    class Interrupt(L.Callback):
        def on_iteration_end(self, trainer, pl_module, batch, iteration):
            if iteration == 17:
                disk.append(lambda operation: True)
                raise RuntimeError("mine")

    with (
        pytest.warns(UserWarning, match=r"the last readings could not be written: cannot write .*No space left"),
        pytest.warns(UserWarning, match=r"the last checkpoint could not be saved: cannot write .*No space left"),
        pytest.raises(RuntimeError, match="mine"),
    ):
        fit(tmp_path, [OptimalityMonitor(5), LastCheckpoint(10), Interrupt()], 40)
    assert torch.load(tmp_path / "lightning_logs/version_0/checkpoints/last.ckpt")["global_step"] == 10


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
def test_another_checkpoint_callback_has_its_rows_on_disk_too(tmp_path):
    """Lightning's own saves at ends of epochs, when no row may have come since the last flush."""
    seen = []

    class Saver(ModelCheckpoint):
        def _save_checkpoint(self, trainer, filepath):
            super()._save_checkpoint(trainer, filepath)
            seen.append((trainer.global_step, max(step for step, _ in scalars(tmp_path)["loss"])))

    trainer = quiet_trainer(
        tmp_path,
        max_steps=40,
        callbacks=[OptimalityMonitor(10), Saver(dirpath=tmp_path / "own", every_n_train_steps=20, save_top_k=-1)],
        logger=RunLogger(str(tmp_path)),
        enable_checkpointing=True,
    )
    trainer.fit(UFM(4, 3, 6, "ce", lambda_=5e-3, iterations_per_step=5), datamodule=IndexDataModule())
    assert seen[0] == (20, 10)
