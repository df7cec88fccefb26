"""Rows, pictures and the summary of a run arrive with W&B and MLflow, and what their users log there stays."""

import csv
import math
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, WandbLogger

from nclightning import sending
from nclightning.callbacks import NeuralCollapseMonitor, OptimalityMonitor, TensorBoardDashboard
from nclightning.closing import close_run
from nclightning.data import IndexDataModule
from nclightning.loggers import RunLogger
from nclightning.models import UFM
from tests.callbacks.attached import K, Net, loader
from tests.offline_runs import (
    finished_wandb_run,
    mlflow_curve,
    mlflow_pictures,
    read_picture,
    wandb_pictures,
    wandb_rows,
)
from tests.trainers import quiet_trainer

ANGLES = "nc/train/angles"


class Counts(L.Callback):
    """Counts requests to MLflow while training runs."""

    def on_train_start(self, trainer, pl_module):
        self.sizes, (logger,) = [], (each for each in trainer.loggers if isinstance(each, MLFlowLogger))
        write = logger.experiment.log_batch

        def log_batch(run_id, metrics=(), **kwargs):
            self.sizes.append(len(metrics))
            write(run_id, metrics=metrics, **kwargs)

        logger.experiment.log_batch = log_batch


@pytest.fixture(scope="module")
def offline():
    pytest.importorskip("wandb")
    pytest.importorskip("mlflow")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        yield


@pytest.fixture(scope="module")
def recorded(offline, tmp_path_factory):
    """One full-batch run, with all its loggers."""
    folder = tmp_path_factory.mktemp("recorded")
    wandb_logger = WandbLogger(save_dir=folder, offline=True, prefix="mine")
    mlflow_logger = MLFlowLogger(tracking_uri=f"file:{folder}/mlruns", prefix="mine")
    ours, counts = RunLogger(str(folder)), Counts()
    torch.manual_seed(0)
    trainer = quiet_trainer(
        folder,
        max_steps=130,
        callbacks=[OptimalityMonitor(1), NeuralCollapseMonitor(5), TensorBoardDashboard(), counts],
        logger=[mlflow_logger, CSVLogger(folder, name="csv"), ours, wandb_logger],
    )
    trainer.fit(UFM(4, 3, 6, "mse", lambda_=5e-3, iterations_per_step=100), datamodule=IndexDataModule())
    sizes = list(counts.sizes)
    close_run(trainer, 3)
    run = finished_wandb_run(wandb_logger.experiment)
    with (Path(ours.log_dir) / "readings.csv").open() as file:
        table = {int(row.pop("iteration")): {k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)}
    client, run_id = mlflow_logger.experiment, mlflow_logger.run_id
    artifacts = folder / "mlruns" / mlflow_logger.experiment_id / run_id / "artifacts"
    return SimpleNamespace(
        table=table, sizes=sizes, wandb=run, client=client, run_id=run_id, artifacts=artifacts, folder=ours.log_dir
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_rows_are_complete_with_mlflow_in_few_requests(recorded):
    for tag in dict.fromkeys(tag for row in recorded.table.values() for tag in row):
        expected = [(step, row[tag]) for step, row in recorded.table.items() if tag in row]
        arrived = mlflow_curve(recorded.client, recorded.run_id, f"mine-{tag}")
        assert [step for step, _ in arrived] == [step for step, _ in expected], tag
        np.testing.assert_array_equal([value for _, value in arrived], [value for _, value in expected])
    assert len(recorded.table) == 131
    assert max(recorded.sizes) <= 1000
    assert sum(recorded.sizes) == sum(map(len, recorded.table.values()))
    assert len(recorded.sizes) <= math.ceil(sum(recorded.sizes) / 900) + 3  # One begun for each flush.


def test_rows_are_complete_with_wandb_at_their_iteration(recorded):
    rows = [row for row in wandb_rows(recorded.wandb) if "mine-loss" in row]
    assert [row["trainer/global_step"] for row in rows] == list(recorded.table)
    for row, expected in zip(rows, recorded.table.values(), strict=True):
        values = {tag.removeprefix("mine-"): float(value) for tag, value in row.items() if tag.startswith("mine-")}
        np.testing.assert_equal(values, expected)


def test_pictures_and_summary_arrive(recorded):
    steps = [0, 1, 2, 4, 8, 16, 32, 64, 128, 130]
    angles = [(tag, step) for tag, step, _ in mlflow_pictures(recorded.artifacts)]
    assert angles == [("mine-convergence", 130), *((f"mine-{ANGLES}", step) for step in steps)]
    in_wandb = wandb_pictures(recorded.wandb, f"mine-{ANGLES}")
    assert [row["trainer/global_step"] for row, _ in in_wandb] == steps
    theirs = [image for tag, _, image in mlflow_pictures(recorded.artifacts) if tag.endswith("angles")]
    assert all(np.array_equal(a, b) for a, (_, b) in zip(theirs, in_wandb, strict=True))
    ((row, picture),) = wandb_pictures(recorded.wandb, "mine-convergence")
    assert row["trainer/global_step"] == 130
    assert np.array_equal(picture, read_picture(Path(recorded.folder) / "convergence.png")[..., :3])
    tag = "mine-summary/iterations"
    assert [row[tag] for row in wandb_rows(recorded.wandb) if tag in row] == [130]
    assert recorded.client.get_run(recorded.run_id).data.params["seed"] == "3"


class Logs(Net):
    """Logs in one of the ways that W&B offers."""

    def __init__(self, way):
        super().__init__()
        self.way = way

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        value = {"mine": float(loss.detach())}
        if self.way == "numbered":
            self.logger.experiment.log(value, step=self.global_step)
        elif self.way == "counted":
            self.logger.experiment.log(value)
        else:
            self.log_dict(value)
        return loss


def run_of(folder, way, callbacks):
    torch.manual_seed(0)
    inputs, labels = torch.randn(48, 5), torch.arange(48) % K
    model, logger = Logs(way), WandbLogger(save_dir=folder, offline=True)
    trainer = quiet_trainer(folder, max_epochs=2, callbacks=callbacks, logger=logger, log_every_n_steps=1)
    data = inputs[:, : model.body[0].in_features], labels
    trainer.fit(model, loader(data), loader(data, shuffle=False))
    return finished_wandb_run(logger.experiment)


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:You defined a `validation_step` but")
@pytest.mark.parametrize("way", ["numbered", "counted", "logged"])
def test_what_users_of_wandb_log_stays(way, offline, tmp_path):
    """W&B drops without a word what is numbered lower than the rows that it has."""
    monitors = [NeuralCollapseMonitor(pictures_every_n_epochs=1, every_n_steps=4), OptimalityMonitor(loss="ce")]
    bare, read = (run_of(tmp_path / name, way, callbacks) for name, callbacks in (("a", []), ("b", monitors)))
    before, after = ([row for row in wandb_rows(folder) if "mine" in row] for folder in (bare, read))
    assert [row["mine"] for row in after] == [row["mine"] for row in before]
    assert len(after) == 12
    if way == "numbered":
        assert [row["_step"] for row in after] == [row["_step"] for row in before]
    if way == "logged":
        assert [row["trainer/global_step"] for row in after] == [row["trainer/global_step"] for row in before]
    steps = [row["trainer/global_step"] for row in wandb_rows(read) if "nc/train/nc1" in row]
    assert steps == [4, 6, 8, 12]
    assert [row["trainer/global_step"] for row, _ in wandb_pictures(read, ANGLES)] == [6, 12]


class Run:
    """A run of W&B, as far as rows go."""

    def __init__(self):
        self.step, self.rows = 0, []

    def log(self, data, step=None, commit=None):
        self.rows.append((self.step, data, commit))
        self.step += step is None and commit is not False


def test_values_of_two_steps_do_not_share_an_open_row():
    run = Run()
    logger = SimpleNamespace(experiment=run, log_image=lambda key, images, step=None: None, log_metrics=None)
    sending.join_row(logger, run, {"a": 1}, 0)
    sending.join_row(logger, run, {"b": 2}, 0)
    sending.join_row(logger, run, {"a": 3}, 10)
    x = "trainer/global_step"
    assert run.rows == [
        (0, {"a": 1, x: 0}, False),
        (0, {"b": 2, x: 0}, False),
        (0, {}, True),
        (1, {"a": 3, x: 10}, False),
    ]


def test_more_values_than_a_batch_holds():
    mlflow = pytest.importorskip("mlflow")
    batches = []

    class Client:
        def log_batch(self, run_id, metrics=(), params=(), tags=(), synchronous=None):
            batches.append(metrics)

    class Stub(Logger):
        name = version = run_id = "r"
        experiment = Client()
        log_hyperparams = None

        def log_metrics(self, metrics, step=None):
            raise AssertionError

    rows = [(0, {"a": 1.0}), (1, {f"b{i}": float(i) for i in range(2500)}), (2, {"a": math.inf})]
    assert list(sending.send_rows(Stub(), rows)) == [0, 1, 2]
    assert [len(batch) for batch in batches] == [1, 1000, 1000, 500, 1]
    assert isinstance(batches[0][0], mlflow.entities.Metric)
    assert batches[-1][0].step == 2
