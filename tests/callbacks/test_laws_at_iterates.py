"""OptimizerLaws on full-batch modules, and in several processes."""

import csv
import logging

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from nclightning.callbacks import OptimizerLaws
from nclightning.data import GaussianDataModule, IndexDataModule
from nclightning.errors import UserError
from nclightning.functional import dense_hessian
from nclightning.loggers import RunLogger
from nclightning.models import UFM, TwoLayerMLP
from nclightning.optim import ArmijoGD
from tests.callbacks.law_runs import LINEAR, data, loss_of, made, said
from tests.trainers import quiet_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
SIZES = {"num_classes": 4, "samples_per_class": 5, "feature_dim": 7, "lambda_": 5e-3}


def fit(folder, model, laws, max_steps=60, ckpt_path=None, datamodule=None, **options):
    logger = RunLogger(str(folder))
    options = {"callbacks": [laws], "max_steps": max_steps, "logger": logger} | options
    trainer = quiet_trainer(folder, **options)
    trainer.fit(model, IndexDataModule() if datamodule is None else datamodule, ckpt_path=ckpt_path)
    return trainer


def readings(folder, version=0):
    with (folder / f"lightning_logs/version_{version}/readings.csv").open() as file:
        return [{tag: float(value) for tag, value in row.items() if value} for row in csv.DictReader(file)]


def ufm(optimizer, loss="ce", **options):
    torch.manual_seed(0)
    return UFM(**SIZES, loss=loss, iterations_per_step=10, optimizer=optimizer, **options)


OPTIMIZERS = {
    "line search": ArmijoGD,
    "plain": lambda params: torch.optim.SGD(params, lr=1.0),
    "decay": lambda params: torch.optim.SGD(params, lr=1.0, weight_decay=1e-2),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.2, momentum=0.9),
    "nesterov": lambda params: torch.optim.SGD(params, lr=0.2, momentum=0.9, nesterov=True),
}


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_laws_of_the_unconstrained_feature_model(name, every, tmp_path):
    fit(tmp_path, ufm(OPTIMIZERS[name]), OptimizerLaws(every_n_iterations=every), max_steps=59)
    rows = readings(tmp_path)
    assert len(rows) == {1: 60, 4: 16}[every]  # The last iterate is read, too.
    steps_are_plain = "momentum" not in name and "nesterov" not in name
    for i, row in enumerate(rows):
        assert row["laws/nc0_residual"] < 1e-13
        assert row["laws/nc0_predicted"] == pytest.approx(row["laws/nc0_norm"], rel=1e-11)
        assert ("laws/balance_residual" in row) is (steps_are_plain and i > 0 and (every == 1 or i < 15))
        assert row.get("laws/balance_residual", 0.0) < 1e-14
        assert 0 <= row["laws/balance"] <= 1
    assert rows[-1]["laws/nc0_norm"] < rows[0]["laws/nc0_norm"]


@pytest.mark.parametrize("decay", [0.0, 1e-2])
def test_head_and_features_end_in_balance(decay, tmp_path):
    def make(params):
        return torch.optim.SGD(params, lr=1.0, momentum=0.9, weight_decay=decay)

    fit(tmp_path, ufm(make), OptimizerLaws(500), max_steps=4000)
    rows = readings(tmp_path)
    assert rows[0]["laws/balance"] > 0.1
    assert rows[-1]["laws/balance"] < 1e-6


def test_a_loss_without_the_law(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        fit(tmp_path, ufm(OPTIMIZERS["plain"], "mse"), OptimizerLaws())
    (sentence,) = said(caplog)
    assert "SquaredError changes when one number is added" in sentence
    rows = readings(tmp_path)
    assert "laws/nc0_residual" not in rows[-1]
    assert rows[-1]["laws/balance_residual"] < 1e-14


def test_a_network_has_no_balance(tmp_path):
    torch.manual_seed(0)
    model = TwoLayerMLP(**SIZES, loss="ce", input_dim=30, hidden_dim=16, optimizer=OPTIMIZERS["momentum"])
    fit(tmp_path, model, OptimizerLaws(5), datamodule=GaussianDataModule())
    rows = readings(tmp_path)
    assert max(row["laws/nc0_residual"] for row in rows) < 1e-13
    assert not [tag for tag in rows[-1] if "balance" in tag]


@pytest.mark.parametrize("name", ["plain", "momentum", "line search"])
def test_sharpness_against_the_limit(name, tmp_path):
    model = ufm(OPTIMIZERS[name])
    fit(tmp_path, model, OptimizerLaws(10, sharpness_every_n_steps=20))
    rows = {int(row["iteration"]): row for row in readings(tmp_path)}
    assert [i for i, row in rows.items() if "laws/sharpness" in row] == [0, 20, 40, 60]
    batch = torch.arange(20), torch.arange(4).repeat_interleave(5)
    batch = next(iter(model.trainer.datamodule.train_dataloader())) if model.trainer.datamodule else batch
    params = list(model.parameters())
    largest = float(torch.linalg.eigvalsh(dense_hessian(lambda: model.evaluate_objective(batch), params))[-1])
    assert rows[60]["laws/sharpness"] == pytest.approx(largest, rel=1e-3)
    limit = {"plain": 2.0, "momentum": 3.8 / 0.2, "line search": None}[name]
    limit = 2 / model.optimizers(use_pl_optimizer=False).outcome.step_size if limit is None else limit
    assert rows[60]["laws/sharpness_over_limit"] == pytest.approx(largest / limit, rel=1e-3)


@pytest.mark.parametrize("name", ["line search", "momentum"])
def test_iterates_are_the_same_without_it(name, tmp_path):
    runs = []
    for callbacks in ([], [OptimizerLaws(3, sharpness_every_n_steps=9)]):
        model = ufm(OPTIMIZERS[name])
        trainer = fit(tmp_path, model, None, callbacks=callbacks)
        runs.append((list(model.parameters()), torch.get_rng_state(), trainer.optimizers[0]))
    (bare, state, _), (read, state_read, optimizer) = runs
    assert all(torch.equal(a, b) for a, b in zip(bare, read, strict=True))
    assert torch.equal(state, state_read)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_resumed_run_goes_on(tmp_path):
    make = OPTIMIZERS["momentum"]
    fit(tmp_path / "whole", ufm(make), OptimizerLaws(5), max_steps=60)
    trainer = fit(tmp_path / "half", ufm(make), OptimizerLaws(5), max_steps=30)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    fit(tmp_path / "rest", ufm(make), OptimizerLaws(5), max_steps=60, ckpt_path=tmp_path / "half.ckpt")
    whole, rest = readings(tmp_path / "whole"), readings(tmp_path / "rest")
    for tag in ("laws/nc0_norm", "laws/nc0_predicted", "laws/balance"):
        assert rest[-1][tag] == whole[-1][tag]
    assert rest[-1]["laws/nc0_residual"] < 1e-13


def test_what_is_refused(tmp_path):
    for arguments, words in (
        ({"penalty": 0.1, "bias_penalty": 0.2}, "penalty and bias_penalty of OptimizerLaws mean nothing for UFM"),
        ({"head": "fc"}, "head of OptimizerLaws mean"),
        ({"data": [1], "loss_fn": loss_of, "sharpness_every_n_steps": 5}, "data and loss_fn of OptimizerLaws mean"),
    ):
        with pytest.raises(UserError, match=words):
            fit(tmp_path, ufm(OPTIMIZERS["plain"]), OptimizerLaws(**arguments))


def test_a_configuration_makes_it():
    parser = ArgumentParser()
    parser.add_subclass_arguments(OptimizerLaws, "laws")
    text = yaml.safe_load(
        "class_path: nclightning.callbacks.OptimizerLaws\ninit_args: {every_n_steps: 20, head: last, penalty: 0.1}"
    )
    laws = parser.instantiate_classes(parser.parse_object({"laws": text})).laws
    assert isinstance(laws, OptimizerLaws)
    assert laws.state_key == "OptimizerLaws{'head': 'last', 'penalty': 0.1}"


# Several processes.


def test_two_processes_follow_the_law(tmp_path):
    options = {"devices": 2, "strategy": "ddp_fork", "logger": CSVLogger(tmp_path, name="csv"), "max_epochs": 3}
    laws = OptimizerLaws(every_n_steps=1, sharpness_every_n_steps=5, data=data(), loss_fn=loss_of)
    model = made(LINEAR["groups"], schedule=True)
    quiet_trainer(tmp_path, callbacks=[laws], **options).fit(model, data(drop_last=True))
    with (tmp_path / "csv/version_0/metrics.csv").open() as file:
        rows = [{tag: float(value) for tag, value in row.items() if value} for row in csv.DictReader(file)]
    assert [row["step"] for row in rows if "laws/sharpness_over_limit" in row] == [0, 5]
    rows = [row for row in rows if "laws/nc0_norm" in row]
    assert [row["step"] for row in rows] == list(range(10))  # Three batches an epoch for each process.
    assert max(row["laws/nc0_residual"] for row in rows) < 1e-13
    assert all(row["laws/nc0_predicted"] == pytest.approx(row["laws/nc0_norm"], rel=1e-11) for row in rows)


def test_shared_features_in_two_processes(tmp_path):
    fit(
        tmp_path,
        ufm(OPTIMIZERS["momentum"]),
        OptimizerLaws(5),
        devices=2,
        strategy="ddp_fork",
    )
    rows = readings(tmp_path)
    assert max(row["laws/nc0_residual"] for row in rows) < 1e-13
    assert not [tag for tag in rows[-1] if "balance" in tag]  # No process has all features.


def test_sharpness_needs_one_process(tmp_path):
    laws = OptimizerLaws(sharpness_every_n_steps=1)
    with pytest.raises(Exception, match="whole training set in one process"):
        fit(tmp_path, ufm(OPTIMIZERS["momentum"]), laws, devices=2, strategy="ddp_fork")


# Gradient scalers.


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_scaler_leaves_out(fused):
    from nclightning.callbacks.row_sums import RowSum  # noqa: PLC0415

    torch.manual_seed(0)
    head = nn.Linear(3, 4)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9, weight_decay=0.5, fused=fused)
    row_sum = RowSum(head.weight, optimizer, 0, 0.0, None)
    scaler, skipped = torch.amp.GradScaler("cpu", init_scale=16.0), 0
    for i in range(12):
        before = head.weight.detach().clone()
        loss = nn.functional.cross_entropy(head(torch.randn(8, 3)), torch.arange(8) % 4)
        optimizer.zero_grad()
        scaler.scale(loss * (float("inf") if i % 3 == 1 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        skipped += torch.equal(before, head.weight)
    assert skipped == 4
    with torch.no_grad():
        values = row_sum.read("norm", "predicted", "residual", "forcing")
    assert values["residual"] < 1e-6
    row_sum.remove()
