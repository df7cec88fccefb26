"""The registry of quantities: that it has all that is logged, and nothing else, and what tags are made of."""

import subprocess
import sys

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from nclightning import callbacks
from nclightning.callbacks import (
    NeuralCollapseMonitor,
    OptimalityMonitor,
    OptimizerLaws,
    RegressionCollapseMonitor,
)
from nclightning.data import IndexDataModule
from nclightning.figures.readings import read_readings
from nclightning.loggers import RunLogger
from nclightning.metrics.measures import MEASURES
from nclightning.models import UFM
from nclightning.quantities import (
    ANGLES,
    CONVERGING,
    GAP,
    GROUPS,
    LOSS,
    MEASURE_NAMES,
    NC,
    NC1,
    QUANTITIES,
    measure_named,
    mirrored_tags,
    parse_tag,
    quantity_of,
    tagged,
)
from tests.trainers import quiet_trainer


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def logged_by(model, folder, monitors, **options):
    """Tags that a full-batch run of ten iterations logs."""
    logger = RunLogger(str(folder))
    trainer = quiet_trainer(folder, max_steps=10, callbacks=monitors, logger=logger, **options)
    trainer.fit(model, datamodule=IndexDataModule())
    return set(read_readings(logger.log_dir).values)


def ufm(**options):
    torch.manual_seed(0)
    return UFM(4, 3, 6, "ce", **({"lambda_": 5e-3, "iterations_per_step": 10} | options))


def monitors():
    return [
        OptimalityMonitor(5),
        NeuralCollapseMonitor(5, measures=("all",)),
        RegressionCollapseMonitor(5),
        OptimizerLaws(5, sharpness_every_n_steps=1),
    ]


def test_all_that_a_run_logs_is_in_the_registry_and_the_right_part_of_it_twice(tmp_path):
    tags = logged_by(ufm(), tmp_path, monitors())
    once = {tag for tag in tags if not parse_tag(tag).is_log10}
    assert {tag for tag in tags if quantity_of(tag) is None} == set()
    mirrored = {tag for tag in once if quantity_of(tag).mirrored}
    assert {tag.removeprefix("log10/") for tag in tags - once} == mirrored
    # All measures and all of the others but those of bias, bounds and other optimizers.
    names = {quantity_of(tag) for tag in once}
    assert {each.name for each in names if each.maker == "measure"} == set(MEASURE_NAMES)
    assert {each.group for each in names} == {"", *GROUPS}


def test_what_other_optimizers_and_a_bias_log_is_there_too(tmp_path):
    model = ufm(optimizer=lambda params: torch.optim.Adam(params, lr=0.01))
    tags = logged_by(model, tmp_path, [OptimizerLaws(5), OptimalityMonitor(5, theory=False)])
    assert "laws/nc0_forcing" in tags
    assert {tag for tag in tags if quantity_of(tag) is None} == set()


def test_what_is_logged_at_ends_of_epochs_is_in_the_registry(tmp_path):
    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(24, 5), torch.arange(24) % 3), batch_size=8)
    chosen = [
        NeuralCollapseMonitor(measures=("all",), layers=("net.0",), datasets={"more": data, "odd": data}, ood=("odd",)),
        OptimalityMonitor(loss="ce"),
        OptimizerLaws(every_n_steps=1),
    ]
    logger = CSVLogger(tmp_path)
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=chosen, logger=logger)
    trainer.fit(Classifier(), data)
    tags = {tag for tag in trainer.callback_metrics if parse_tag(tag).group}
    assert {tag for tag in tags if quantity_of(tag) is None} == set()
    assert {"nc/train/net.0/nc1", "nc/odd/nc5", "nc/more/accuracy", "optimality/lambda_w", "laws/bias_sum"} <= tags


def test_measures_are_those_that_can_be_read():
    assert tuple(MEASURES) == MEASURE_NAMES


def test_each_quantity_says_what_it_is():
    assert [tag for tag, each in QUANTITIES.items() if not (each.meaning and each.maker)] == []
    assert [tag for tag, each in QUANTITIES.items() if each is not ANGLES and not each.chart] == []
    assert max(len(each.meaning) for each in QUANTITIES.values()) <= 80
    monitors = {each.maker for each in QUANTITIES.values() if each.maker.endswith(("Monitor", "Laws"))}
    assert all(hasattr(callbacks, name) for name in monitors)
    # A log axis shows nothing of what can be negative.
    assert [tag for tag, each in QUANTITIES.items() if each.signed and (each.axis == "log" or each.mirrored)] == []


def test_what_converges_is_zero_at_collapse_and_drawn_on_a_log_axis():
    assert {(each.collapsed if each.collapsed == 0 else each.at_collapse(4, 8)) for each in CONVERGING.values()} == {0}
    assert {each.axis for each in CONVERGING.values()} == {"log"}
    assert CONVERGING.keys() <= mirrored_tags("optimality") | mirrored_tags(NC, "train")


@pytest.mark.parametrize(
    ("tag", "parts"),
    [
        ("loss", ("", "", "loss", False)),
        ("optimality/gap", ("optimality", "", "gap", False)),
        ("log10/optimality/gap", ("optimality", "", "gap", True)),
        ("nc/train/nc1", ("nc", "train", "nc1", False)),
        ("nc/val/second/layer.4/nc1", ("nc", "val/second/layer.4", "nc1", False)),
        ("train/loss", ("", "train", "loss", False)),
        ("ncx/train/nc1", ("", "ncx/train", "nc1", False)),
    ],
)
def test_tags_are_taken_apart(tag, parts):
    assert parse_tag(tag) == parts


@pytest.mark.parametrize(
    ("tag", "quantity"),
    [
        ("loss", LOSS),
        ("log10/optimality/gap", GAP),
        ("nc/val/second/layer.4/nc1", NC1),
        ("train/loss", None),
        ("optimality/train/gap", None),
        ("nc1", None),
        ("lr-SGD", None),
    ],
)
def test_tags_are_looked_up(tag, quantity):
    assert quantity_of(tag) is quantity


def test_tags_are_put_together():
    assert [GAP.tag(), GAP.tag(""), NC1.tag("train"), NC1.tag("val", "second")] == [
        "optimality/gap",
        "optimality/gap",
        "nc/train/nc1",
        "nc/val/second/nc1",
    ]
    assert tagged({"nc1": 1.0, "layer/nc1": 2.0}, NC, "train") == {"nc/train/nc1": 1.0, "nc/train/layer/nc1": 2.0}


def test_an_unknown_measure_has_no_meaning():
    assert measure_named("nc1") is NC1
    assert (measure_named("unknown").meaning, measure_named("unknown").collapsed) == ("", None)


def test_the_registry_needs_no_other_library():
    code = (
        "import sys, nclightning.quantities; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'lightning')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
