"""Processes that share a training set take the steps of one that has all of it."""

import csv
import functools
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from nclightning import problems
from nclightning.callbacks import LastCheckpoint, NeuralCollapseMonitor, OptimalityMonitor
from nclightning.data import GaussianDataModule, IndexDataModule
from nclightning.loggers import RunLogger
from nclightning.models import UFM, TwoLayerMLP
from nclightning.models.backbones import FeatureTable
from nclightning.optim import ArmijoCG, ArmijoLBFGS, ArmijoNewtonCG, HeavyBall
from tests import forked
from tests.trainers import quiet_trainer

# 20 samples: 3 processes get 6, 7 and 7, and each misses some class.
SIZES = {"num_classes": 4, "samples_per_class": 5, "feature_dim": 7, "lambda_": 5e-3, "iterations_per_step": 10}


def ufm(loss, **options):
    torch.manual_seed(0)
    return UFM(**SIZES, loss=loss, **options)


def mlp(loss, **options):
    torch.manual_seed(0)
    return TwoLayerMLP(**SIZES, loss=loss, input_dim=30, hidden_dim=16, **options)


MODELS = {"ufm": (ufm, IndexDataModule), "mlp": (mlp, GaussianDataModule)}


def fit(folder, model, data, devices, max_steps=20, ckpt_path=None):
    trainer = quiet_trainer(
        folder,
        max_steps=max_steps,
        devices=devices,
        strategy="ddp_fork" if devices > 1 else "auto",
        callbacks=[OptimalityMonitor(5), NeuralCollapseMonitor(5), LastCheckpoint(10)],
        enable_checkpointing=True,
        logger=RunLogger(str(folder)),
    )
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return model


def readings(folder):
    with (folder / "lightning_logs/version_0/readings.csv").open() as file:
        return [{tag: float(value) for tag, value in row.items() if value} for row in csv.DictReader(file)]


def difference(model, other):
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max((p - q).detach().abs().max().item() for p, q in pairs)


def sgd(params):
    return torch.optim.SGD(params, lr=0.2, momentum=0.9)


@pytest.fixture(scope="module")
def of_one_process(tmp_path_factory):
    """Give the models of a kind and a loss after 20 and 30 iterations, with the readings of the first; each once."""

    @functools.cache
    def runs(kind, loss):
        make, data = MODELS[kind]
        folder = tmp_path_factory.mktemp("alone")
        alone = fit(folder / "alone", make(loss), data(), 1)
        return alone, fit(folder / "whole", make(loss), data(), 1, max_steps=30), readings(folder / "alone")

    return runs


@pytest.mark.parametrize("devices", [2, 3])
@pytest.mark.parametrize("loss", ["mse", "ce"])
@pytest.mark.parametrize("kind", MODELS)
def test_iterates_readings_and_resumed_runs_are_those_of_one_process(kind, loss, devices, tmp_path, of_one_process):
    make, data = MODELS[kind]
    alone, whole, one = of_one_process(kind, loss)
    together = fit(tmp_path / "together", make(loss), data(), devices)
    # Sums in another order: roundings, carried along by as many steps.
    assert difference(alone, together) < 1e-12
    many = readings(tmp_path / "together")
    assert [row["iteration"] for row in one] == [row["iteration"] for row in many] == [0, 5, 10, 15, 20]
    for row, other in zip(one, many, strict=True):
        for tag, value in row.items():
            # Near the optimum every reading is of differences that the iterates' roundings blur.
            assert other[tag] == pytest.approx(value, rel=1e-6, nan_ok=True), (row["iteration"], tag)
    checkpoint = tmp_path / "together/lightning_logs/version_0/checkpoints/last.ckpt"
    for number in (1, 5 - devices):
        resumed = fit(tmp_path / f"on {number}", make(loss), data(), number, max_steps=30, ckpt_path=checkpoint)
        assert difference(whole, resumed) < 1e-11


PROBLEMS = {
    "penalized bias": problems.mse_with_penalized_bias([9, 4, 2], 5, 5e-2, 2e-2, lambda_b=0.3),
    "soft labels": problems.soft_labels([[0.8, 0.1, 0.1], [0.2, 0.3, 0.5]], [8, 7], 5, 5e-2, 2e-2),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems_of_other_losses_are_shared_alike(name, tmp_path):
    models = []
    for devices in (1, 3):
        torch.manual_seed(0)
        model = UFM(problem=PROBLEMS[name], iterations_per_step=10)
        models.append(fit(tmp_path / str(devices), model, IndexDataModule(), devices))
    assert difference(*models) < 1e-12  # Sums in another order: roundings, carried along by 20 steps.


def adam_backwards(params):
    return torch.optim.Adam(list(params)[::-1], lr=0.01)


def adam_in_groups(params):
    features, *head = params
    return torch.optim.Adam([{"params": head}, {"params": [features]}], lr=0.01)


@pytest.mark.parametrize("make", [sgd, HeavyBall, adam_backwards, adam_in_groups])
def test_what_optimizers_keep_of_shared_features_goes_into_the_checkpoint(make, tmp_path):
    alone = fit(tmp_path / "alone", ufm("mse", optimizer=make, init_scale=0.1), IndexDataModule(), 1, max_steps=30)
    fit(tmp_path / "together", ufm("mse", optimizer=make, init_scale=0.1), IndexDataModule(), 2)
    checkpoint = tmp_path / "together/lightning_logs/version_0/checkpoints/last.ckpt"
    for number in (1, 3):
        model = ufm("mse", optimizer=make, init_scale=0.1)
        resumed = fit(tmp_path / f"on {number}", model, IndexDataModule(), number, max_steps=30, ckpt_path=checkpoint)
        assert difference(alone, resumed) < 1e-12


def armijo_lbfgs(params):
    return ArmijoLBFGS(list(params)[::-1], history=4)


@pytest.mark.parametrize(
    ("loss", "make"), [("mse", armijo_lbfgs), ("ce", armijo_lbfgs), ("ce", ArmijoCG), ("ce", ArmijoNewtonCG)]
)
def test_what_directions_learnt_on_shared_features_goes_into_the_checkpoint(loss, make, tmp_path):
    """Roundings grow faster than by descent: what is resumed is compared over few steps."""

    def run(name, devices, max_steps, ckpt_path=None):
        return fit(tmp_path / name, ufm(loss, optimizer=make), IndexDataModule(), devices, max_steps, ckpt_path)

    one, two = (run(f"{devices} to 10", devices, 10) for devices in (1, 2))
    assert difference(one, two) < 1e-9
    checkpoint = tmp_path / "2 to 10/lightning_logs/version_0/checkpoints/last.ckpt"
    straight = run("2 to 14", 2, 14)
    for devices in (1, 2, 3):
        resumed = run(f"on {devices}", devices, 14, checkpoint)
        assert difference(straight, resumed) < (1e-10 if devices != 2 else 1e-300)


def test_a_checkpoint_of_several_processes_is_that_of_one(tmp_path):
    fit(tmp_path / "together", ufm("ce"), IndexDataModule(), 3)
    model = UFM.load_from_checkpoint(tmp_path / "together/lightning_logs/version_0/checkpoints/last.ckpt")
    assert model.features.shape == (20, 7)
    distance = float(model.problem.distance(model.head.weight, model.features, model.problem.labels()))
    assert distance == pytest.approx(readings(tmp_path / "together")[-1]["optimality/distance"], rel=1e-9)


@pytest.mark.parametrize("kind", MODELS)
def test_validation_reads_the_whole_set(kind, tmp_path):
    make, data = MODELS[kind]
    model = make("mse")
    values = {}
    for devices in (1, 2, 3):  # Of 20 samples three processes have 6, 7 and 7.
        trainer = quiet_trainer(
            tmp_path,
            devices=devices,
            strategy="ddp_fork" if devices > 1 else "auto",
            callbacks=[OptimalityMonitor(), NeuralCollapseMonitor()],
        )
        (values[devices],) = trainer.validate(model, data(), verbose=False)
    assert values[1].keys() == values[2].keys() == values[3].keys()
    for tag, value in values[1].items():
        for devices in (2, 3):
            assert values[devices][tag] == pytest.approx(value, rel=1e-6), tag  # Lightning carries some as float32.


def lbfgs(params):
    return torch.optim.LBFGS(params)


def hooked(model):
    model.head.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: ufm("mse", optimizer=lbfgs), "LBFGS may combine numbers"),
        (lambda: hooked(ufm("mse")), "features shared by processes need head and features as UFM makes them"),
        (lambda: UFM(2, 1, 3, "mse", lambda_=1e-2), "2 samples cannot be divided between 3 processes"),
        (
            lambda: UFM(6, 2, 3, "mse", lambda_=1e-2),
            "need feature_dim of at least num_classes - 1 = 5 where processes share the features, got 3",
        ),
    ],
)
def test_what_cannot_be_shared_is_refused(model, message, tmp_path):
    with pytest.raises(Exception, match=message):  # Of the type that carries a process's error.
        fit(tmp_path, model(), IndexDataModule(), 3)


def test_a_table_keeps_its_rows_and_loads_those_of_a_whole_one():
    whole = FeatureTable(10, 3, torch.float64)
    nn.init.normal_(whole.features)
    table = FeatureTable(10, 3, torch.float64)
    table.keep_rows(4, 3)
    table.load_state_dict(whole.state_dict())
    assert torch.equal(table.features, whole.features[4:7])
    assert torch.equal(table(torch.tensor([6, 4])), whole(torch.tensor([6, 4])))


@pytest.mark.slow
def test_the_command_line_runs_on_two_processes(tmp_path):
    words = [sys.executable, "-m", "nclightning", "fit", "--config", "ufm_ce.yaml", "--trainer.enable_progress_bar"]
    for name, extra in (("one", []), ("two", ["--trainer.strategy", "ddp", "--trainer.devices", "2"])):
        (tmp_path / name).mkdir()
        command = [*words, "false", "--trainer.max_steps", "100", *extra]
        done = forked.run(command, cwd=tmp_path / name, env=environment())
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Run folder:") == 1
    one, two = readings(tmp_path / "one"), readings(tmp_path / "two")
    assert [row["iteration"] for row in one] == [row["iteration"] for row in two]
    assert all(
        math.isclose(a["optimality/gap"], b["optimality/gap"], rel_tol=1e-6) for a, b in zip(one, two, strict=True)
    )
    folder = tmp_path / "two/lightning_logs/version_0"
    assert sorted(p.name for p in Path(tmp_path / "two/lightning_logs").iterdir()) == ["version_0"]
    assert all((folder / name).is_file() for name in ("config.yaml", "convergence.png", "checkpoints/last.ckpt"))


def environment():
    """Without what a launcher in this process may have left."""
    left = ("LOCAL_RANK", "NODE_RANK", "GLOBAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {k: v for k, v in os.environ.items() if k not in left} | {"PYTHONPATH": str(Path(__file__).parents[2])}
