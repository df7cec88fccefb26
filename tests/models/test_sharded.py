"""Networks whose weights ``fully_shard`` shares out take the steps of one process."""

import csv
import os
import socket
import warnings
from datetime import timedelta

import pytest
import torch
import torch.multiprocessing as mp
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn

from nclightning.callbacks import LastCheckpoint, NeuralCollapseMonitor, OptimalityMonitor, TensorBoardDashboard
from nclightning.data import GaussianDataModule, IndexDataModule
from nclightning.loggers import RunLogger
from nclightning.models import UFM, RegularizedClassifier, TwoLayerMLP
from nclightning.objective import Objective
from nclightning.optim import ArmijoGD
from tests.trainers import quiet_trainer

fsdp = pytest.importorskip("torch.distributed.fsdp")
pytestmark = pytest.mark.skipif(not hasattr(fsdp, "fully_shard"), reason="an older torch keeps it elsewhere")

# 21 samples: of two processes one gets 10 and one 11. Of the head, and of the bias that MSE has, they get 2 rows and 1.
SIZES = {"num_classes": 3, "samples_per_class": 7, "feature_dim": 5, "lambda_": 5e-3, "iterations_per_step": 10}


def mlp(loss="mse", **options):
    torch.manual_seed(0)
    return TwoLayerMLP(**SIZES, loss=loss, **({"input_dim": 30, "hidden_dim": 16} | options))


def sgd(params):
    return torch.optim.SGD(params, lr=0.02, momentum=0.9)


def plain_sgd(params):
    return torch.optim.SGD(params, lr=0.02)


def lbfgs(params):
    return torch.optim.LBFGS(params)


class Own(RegularizedClassifier):
    """A user's: a frozen layer, a parameter that the objective leaves out, a buffer, a call of the whole model."""

    def __init__(self):
        torch.manual_seed(0)
        frozen = nn.Linear(30, 12).requires_grad_(False)
        backbone, head = nn.Sequential(frozen, nn.Tanh(), nn.Linear(12, 5)).double(), nn.Linear(5, 3).double()
        super().__init__(backbone, head, Objective("ce", 1e-2, 1e-3), 21, iterations_per_step=10)
        self.scale, self.idle = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
        self.register_buffer("shift", torch.tensor([0.1, 0.0, -0.1], dtype=torch.float64))

    def evaluate_objective(self, batch):
        logits = self.scale[0] * self(batch[0]) + self.shift
        rows = self.scale.expand(len(logits), 2)
        return self.objective.from_logits(logits, self.head.weight, rows, batch[1], num_samples=self.num_samples)


def data(kind=GaussianDataModule):
    options = {} if kind is IndexDataModule else {"input_dim": 30}
    return kind(num_classes=3, samples_per_class=7, **options)


def strategy(world, **options):
    sizes = {"data_parallel_size": world, "tensor_parallel_size": 1, "save_distributed_checkpoint": False}
    return ModelParallelStrategy(**(sizes | {"timeout": timedelta(minutes=1)} | options))


def trainer_of(folder, world, how=None, **options):
    parallel = {"devices": world, "strategy": strategy(world) if how is None else how} if world > 1 else {}
    return quiet_trainer(folder, use_distributed_sampler=False, **(parallel | options))


def fit(folder, world, model, max_steps=40, ckpt_path=None, theory=True, how=None, monitors=True):
    callbacks = [OptimalityMonitor(5, theory=theory), NeuralCollapseMonitor(5), TensorBoardDashboard()]
    trainer = trainer_of(
        folder,
        world,
        how,
        max_steps=max_steps,
        callbacks=[*(callbacks if monitors else []), LastCheckpoint(20)],
        enable_checkpointing=True,
        logger=RunLogger(str(folder)),
    )
    trainer.fit(model, data(), ckpt_path=ckpt_path)
    return trainer


def weights(trainer):
    """Return the whole weights, which the first process has."""
    return trainer.strategy.lightning_module_state_dict()


def last(folder):
    return folder / "lightning_logs/version_0/checkpoints/last.ckpt"


def readings(folder):
    with (folder / "lightning_logs/version_0/readings.csv").open() as file:
        return [{tag: float(value) for tag, value in row.items() if value} for row in csv.DictReader(file)]


def difference(some, other):
    assert some.keys() == other.keys()
    return max(float((some[name] - other[name]).abs().max()) for name in some)


def run(rank, world, port, folder, job):
    os.environ.update(
        LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    warnings.simplefilter("ignore")  # Of few workers; none is about shards.
    torch.save(job(), folder / f"{rank}.pt")


def on(world, folder, job):
    """Run a job on several processes and return what each returns."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(run, (world, port, folder, job), nprocs=world, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


MODELS = {
    "mse": lambda: mlp("mse"),
    "ce": lambda: mlp("ce"),
    "penalty on weights": lambda: mlp("ce", penalty="weights"),
    "momentum": lambda: mlp("mse", optimizer=sgd),
    "plain sgd": lambda: mlp("ce", optimizer=plain_sgd),
    "own": Own,
}


@pytest.mark.parametrize("kind", MODELS)
def test_iterates_readings_and_resumed_runs_are_those_of_one_process(kind, tmp_path):
    options = {"theory": kind not in ("penalty on weights", "own")}
    alone = weights(fit(tmp_path / "alone", 1, MODELS[kind](), **options))
    whole = weights(fit(tmp_path / "whole", 1, MODELS[kind](), 60, last(tmp_path / "alone"), **options))

    def job():
        first = fit(tmp_path / "together", 2, MODELS[kind](), **options)
        shares = [p.to_local().shape for p in first.lightning_module.parameters()]
        again = fit(tmp_path / "again", 2, MODELS[kind](), 60, last(tmp_path / "together"), **options)
        taken = fit(tmp_path / "taken over", 2, MODELS[kind](), 60, last(tmp_path / "alone"), **options)
        return shares, weights(first), weights(again), weights(taken)

    (shares, together, again, taken), (other_shares, *_) = on(2, tmp_path, job)
    assert any(share != other for share, other in zip(shares, other_shares, strict=True))
    # Sums in another order: roundings, carried along by as many steps.
    assert difference(alone, together) < 1e-12
    assert difference(whole, again) < 1e-11
    assert difference(whole, taken) < 1e-11
    one, many = readings(tmp_path / "alone"), readings(tmp_path / "together")
    assert [row["iteration"] for row in one] == [row["iteration"] for row in many] == [0, 5, 10, 15, 20, 25, 30, 35, 40]
    for row, other in zip(one, many, strict=True):
        assert row.keys() == other.keys()
        for tag, value in row.items():
            assert other[tag] == pytest.approx(value, rel=1e-8, nan_ok=True), (row["iteration"], tag)
    resumed = weights(fit(tmp_path / "by itself", 1, MODELS[kind](), 60, last(tmp_path / "together"), **options))
    assert difference(whole, resumed) < 1e-11
