"""One row per iterate, whoever reads there, and none lost when a logger fails."""

import csv
import math
from pathlib import Path

import lightning as L
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nclightning.callbacks import LastCheckpoint, NeuralCollapseMonitor, OptimalityMonitor
from nclightning.callbacks.monitor import ReadingsMonitor
from nclightning.callbacks.rows import Readings
from nclightning.data import IndexDataModule
from nclightning.loggers import RunLogger
from nclightning.models import UFM
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


class WeightNorm(ReadingsMonitor):
    """Somebody's own monitor."""

    def read(self, pl_module, batch):
        return {"weight_norm": pl_module.head.weight.detach().norm()}


class AtTheEnd(L.Callback):
    """Somebody's own value of the last iterate; listed after the monitors or before them."""

    def on_train_end(self, trainer, pl_module):
        Readings.of(trainer).add(trainer.global_step, {"mine": 1.5})


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
                Readings.of(trainer).add(3, {"mine": 1.0})

    with pytest.raises(ValueError, match=r"values of iteration 3 \(mine\) came after its row was complete"):
        fit(tmp_path, [OptimalityMonitor(5), Late()])


def test_two_fits_with_one_logger_are_still_refused(tmp_path):
    logger = RunLogger(str(tmp_path))
    fit(tmp_path, [OptimalityMonitor(5)], logger=logger)
    with pytest.raises(ValueError, match="two runs share a RunLogger"):
        fit(tmp_path, [OptimalityMonitor(5)], logger=logger)
