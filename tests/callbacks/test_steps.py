"""At which steps values are logged: the number of optimizer steps done, which never goes back."""

import csv

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from nclightning.callbacks import NeuralCollapseMonitor, OptimalityMonitor
from tests.callbacks.attached import Net, TwoOptimizers, fit, loader, measure

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


def four_batches(samples):
    return loader(tuple(part[:32] for part in samples))


def logged(logger, tag):
    logger.save()
    with open(logger.experiment.metrics_file_path) as file:
        return [(int(row["step"]), float(row[tag])) for row in csv.DictReader(file) if row.get(tag)]


class Counting(NeuralCollapseMonitor):
    """Counts its sweeps, and measures what they should read."""

    def __init__(self, samples, **options):
        super().__init__(**options)
        self.samples, self.steps, self.expected = tuple(part[:32] for part in samples), [], []
        sets = self.at_epochs()._sets
        read = sets.read

        def counted(host, *args):
            self.steps.append(host.module.trainer.global_step)
            self.expected.append(measure(host.module, self.samples)["nc1"])
            host.module.train()
            return read(host, *args)

        sets.read = counted


@pytest.mark.parametrize(
    ("options", "trainer", "steps"),
    [
        ({"every_n_steps": 2}, {"max_epochs": 2}, [2, 4, 6, 8]),
        ({"every_n_steps": 3}, {"max_epochs": 2}, [3, 4, 6, 8]),
        ({"every_n_steps": 4}, {"max_epochs": 2}, [4, 8]),
        ({"every_n_steps": 1, "every_n_epochs": 2}, {"max_epochs": 2}, list(range(1, 9))),
        ({}, {"max_epochs": 2}, [4, 8]),
        ({"every_n_steps": 2}, {"max_epochs": 2, "accumulate_grad_batches": 2}, [2, 4]),
        ({"every_n_steps": 2}, {"max_steps": 6, "max_epochs": -1}, [2, 4, 6]),
    ],
    ids=str,
)
def test_each_step_once_and_in_order(options, trainer, steps, samples, tmp_path):
    logger, monitor = CSVLogger(tmp_path), Counting(samples, stages=("train",), **options)
    fit(tmp_path, [monitor], four_batches(samples), logger=logger, **trainer)
    rows = logged(logger, "nc/train/nc1")
    assert [step for step, _ in rows] == monitor.steps == steps
    assert [value for _, value in rows] == pytest.approx(monitor.expected, rel=1e-5)


def test_a_multiple_that_several_optimizers_step_over_counts(samples, tmp_path):
    logger, monitor = CSVLogger(tmp_path), Counting(samples, every_n_steps=5, every_n_epochs=9, stages=("train",))
    fit(tmp_path, [monitor], four_batches(samples), TwoOptimizers(), logger=logger, max_epochs=4)
    # Of the multiples 5, 10, ..., 30, at two steps a batch.
    assert [step for step, _ in logged(logger, "nc/train/nc1")] == [6, 10, 16, 20, 26, 30]


def test_weights_changed_between_step_and_end_of_the_epoch_are_swept_again(samples, tmp_path):
    """As pruning does, without a version counter's notice."""

    class Prunes(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            pl_module.last.weight.data[0] = 0

    logger, monitor = CSVLogger(tmp_path), Counting(samples, every_n_steps=4, stages=("train",))
    model, trainer = fit(tmp_path, [Prunes(), monitor], four_batches(samples), logger=logger, max_epochs=1)
    assert monitor.steps == [4, 4]
    expected = measure(model, monitor.samples)
    assert float(trainer.callback_metrics["nc/train/nc2"]) == pytest.approx(expected["nc2"], rel=1e-5)
    assert logged(logger, "nc/train/nc2")[-1][1] == pytest.approx(expected["nc2"], rel=1e-5)


def test_a_resumed_fit_goes_on_at_the_cadence(samples, tmp_path):
    options = {"every_n_steps": 3, "every_n_epochs": 9, "stages": ("train",)}
    first, second = Counting(samples, **options), Counting(samples, **options)
    _, trainer = fit(tmp_path, [first], four_batches(samples), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    torch.manual_seed(0)
    again = L.Trainer(
        accelerator="cpu", max_epochs=3, callbacks=[second], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    again.fit(Net(), four_batches(samples), ckpt_path=tmp_path / "a.ckpt")
    assert (first.steps, second.steps) == ([3], [6, 9, 12])


def test_all_values_of_a_fit_are_on_one_axis(samples, tmp_path):
    class Logs(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("own", loss, on_step=False, on_epoch=True)
            return loss

    logger = CSVLogger(tmp_path)
    monitors = [NeuralCollapseMonitor(measures=("nc1", "accuracy")), OptimalityMonitor(loss="ce", head="last")]
    y = torch.arange(len(samples[1])) % 2
    two = Logs()
    two.last, two.auxiliary = torch.nn.Linear(8, 2), torch.nn.Linear(8, 2)
    data = four_batches((samples[0], y)), loader((samples[0], y), shuffle=False, drop_last=False)
    _, trainer = fit(tmp_path, monitors, data, two, logger=logger, max_epochs=2)
    for tag in ("nc/train/nc1", "nc/train/accuracy", "nc/val/nc1", "optimality/gap"):
        assert [step for step, _ in logged(logger, tag)] == [4, 8], tag
        assert float(trainer.logged_metrics[tag]) == float(trainer.callback_metrics[tag])
    # Lightning's own axis for the end of an epoch.
    assert [step for step, _ in logged(logger, "own")] == [3, 7]


def test_other_callbacks_see_them_at_the_end_of_the_epoch(samples, tmp_path):
    for every in (None, 2, 4):
        keep = ModelCheckpoint(tmp_path / str(every), monitor="nc/train/nc1", save_top_k=-1, filename="{step}")
        stop = EarlyStopping("nc/train/nc1", mode="min", stopping_threshold=1e9)
        monitor = Counting(samples, every_n_steps=every)
        _, trainer = fit(
            tmp_path, [monitor, keep, stop], four_batches(samples), max_epochs=3, enable_checkpointing=True
        )
        assert trainer.current_epoch == 1
        assert float(keep.current_score) == pytest.approx(monitor.expected[-1], rel=1e-5)
