"""What the monitors read, when, how it reaches the loggers, and that nothing else changes."""

import csv
import math
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from nclightning.callbacks import LastCheckpoint, NeuralCollapseMonitor, OptimalityMonitor
from nclightning.callbacks.monitor import MonitorAtIterates
from nclightning.data import FullBatchLoader, IndexDataModule
from nclightning.functional import class_statistics, etf_deviation, self_duality, within_class_variability
from nclightning.loggers import RunLogger
from nclightning.metrics.borrowed import Borrowed
from nclightning.models import UFM, RegularizedClassifier
from nclightning.objective import Objective
from tests.helpers import fake_twin
from tests.trainers import quiet_trainer

K, N = 4, 12
TAGS = [
    "loss",
    "optimality/gap",
    "optimality/distance",
    "optimality/grad_norm",
    "optimality/error_bound_ratio",
    "optimality/predicted_decay",
    "line_search/step_size",
    "line_search/evaluations",
    "nc/train/nc1",
    "nc/train/nc2",
    "nc/train/nc3",
]
LOG10 = [
    "optimality/gap",
    "optimality/distance",
    "optimality/grad_norm",
    "optimality/predicted_decay",
    "nc/train/nc1",
    "nc/train/nc2",
    "nc/train/nc3",
]


def ufm(loss="mse", **options):
    torch.manual_seed(0)
    return UFM(K, 3, 6, loss, **({"lambda_": 5e-3, "iterations_per_step": 10} | options))


def monitors(**options):
    return [OptimalityMonitor(5, **options), NeuralCollapseMonitor(5)]


def fit(folder, model, callbacks, max_steps=25, **options):
    trainer = quiet_trainer(folder, max_steps=max_steps, callbacks=callbacks, logger=RunLogger(str(folder)), **options)
    trainer.fit(model, datamodule=IndexDataModule())
    return trainer


def readings(trainer):
    with Path(trainer.log_dir, "readings.csv").open() as file:
        return {
            int(row["iteration"]): {k: float(v) if v else None for k, v in row.items() if k != "iteration"}
            for row in csv.DictReader(file)
        }


def measure(model):
    """The readings at the model's present iterate, computed another way."""
    index, labels = torch.arange(N), torch.arange(N) // 3
    model.zero_grad()
    value = model.evaluate_objective((index, labels))
    value.backward()
    grad_norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
    model.zero_grad()
    point = (model.head.weight, model.features, labels, model.head.bias)
    stats = class_statistics(model.features, labels, K)
    distance = float(model.problem.distance(*point))
    return {
        "loss": float(value.detach()),
        "optimality/gap": float(model.problem.optimality_gap(*point)),
        "optimality/distance": distance,
        "optimality/grad_norm": grad_norm,
        "optimality/error_bound_ratio": distance / grad_norm,
        "nc/train/nc1": float(within_class_variability(stats)),
        "nc/train/nc2": float(etf_deviation(model.head.weight.detach())),
        "nc/train/nc3": float(self_duality(stats, model.head.weight.detach())),
    }


@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_readings_belong_to_their_iterate(loss, tmp_path):
    table = readings(fit(tmp_path, ufm(loss), monitors()))
    assert list(table) == [0, 5, 10, 15, 20, 25]
    assert list(table[0]) == [*TAGS, *(f"log10/{tag}" for tag in LOG10)]
    for iteration in table:
        model = ufm(loss)
        if iteration:
            quiet_trainer(tmp_path, max_steps=iteration).fit(model, datamodule=IndexDataModule())
        for tag, value in measure(model).items():
            # Summation orders differ: a few roundings.
            assert table[iteration][tag] == pytest.approx(value, rel=1e-12), (iteration, tag)
        if iteration:
            optimizer = model.optimizers(use_pl_optimizer=False)
            assert table[iteration]["line_search/step_size"] == optimizer.outcome.step_size
            assert table[iteration]["line_search/evaluations"] == optimizer.total_evaluations
    assert math.isnan(table[0]["line_search/step_size"])
    assert table[0]["line_search/evaluations"] == 0
    for row in table.values():
        assert all(row[f"log10/{tag}"] == math.log10(row[tag]) for tag in LOG10)


def test_the_last_iterate_is_read_even_off_the_cadence(tmp_path):
    assert list(readings(fit(tmp_path, ufm(), monitors(), max_steps=23))) == [0, 5, 10, 15, 20, 23]


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but")
def test_measuring_leaves_buffers_and_masks_of_a_training_network(tmp_path):
    """Batch norm moves its buffers and dropout the random state in every forward, readings' ones too."""

    def train(name, callbacks):
        torch.manual_seed(0)
        body = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)).double()
        model = RegularizedClassifier(
            body,
            nn.Linear(6, K).double(),
            Objective("mse", 1e-2, 1e-3),
            N,
            optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
            iterations_per_step=10,
        )
        batch = torch.randn(N, 6, dtype=torch.float64), torch.arange(N) // 3
        trainer = quiet_trainer(tmp_path / name, max_steps=25, callbacks=callbacks)
        trainer.fit(model, FullBatchLoader(batch, 3))
        return model.state_dict(), torch.get_rng_state(), model.training

    plain, watched = train("plain", []), train("watched", monitors(theory=False))
    assert torch.equal(plain[1], watched[1])
    assert plain[2] == watched[2]
    assert all(torch.equal(value, watched[0][name]) for name, value in plain[0].items())


def test_measuring_leaves_no_trace(tmp_path):
    def state(callbacks, name):
        model = ufm()
        model.head.register_buffer("kept", torch.arange(3.0))
        random = []

        class Random(L.Callback):
            def on_train_end(self, trainer, pl_module):
                random.append(torch.get_rng_state())

        trainer = fit(tmp_path / name, model, [*callbacks, Random()])
        optimizer = trainer.optimizers[0].state_dict()
        return model, optimizer, random[0]

    bare, bare_optimizer, bare_random = state([], "bare")
    read, read_optimizer, read_random = state([OptimalityMonitor(1), NeuralCollapseMonitor(1)], "read")
    assert all(torch.equal(a, b) for a, b in zip(bare.parameters(), read.parameters(), strict=True))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(bare.parameters(), read.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(bare.buffers(), read.buffers(), strict=True))
    assert bare_optimizer == read_optimizer
    assert torch.equal(bare_random, read_random)
    assert read.training == bare.training
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in read.modules())


def test_no_hook_is_left_after_an_exception(tmp_path):
    class Fail(L.Callback):
        def on_iteration_end(self, trainer, pl_module, batch, iteration):
            if iteration == 7:
                raise RuntimeError("stop here")

    model = ufm()
    with pytest.raises(RuntimeError, match="stop here"):
        fit(tmp_path, model, [*monitors(), Fail()])
    assert not model.head._forward_pre_hooks
    # And what was read before is on disk.
    with (tmp_path / "lightning_logs/version_0/readings.csv").open() as file:
        assert [row["iteration"] for row in csv.DictReader(file)] == ["0", "5"]


def test_one_transfer_per_lightning_step(tmp_path):
    """The monitors' own code asks for host values only where readings are flushed: once per step, for both."""
    transfers = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            # Whether numbers are those of a narrower dtype is asked where they are on a CPU, and nowhere else: see the
            # tests with fake CUDA tensors.
            if "_local_scalar_dense" in str(func) and args[0].dtype != torch.bool:
                transfers.append(str(func))
            return func(*args, **(kwargs or {}))

    model = ufm(optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
    both = monitors()
    index, labels = torch.arange(N), torch.arange(N) // 3
    for monitor in both:
        monitor.prepare(model, (index, labels))
        monitor.read(model, (index, labels))  # The first time, the indices are looked at.
    with Watch():
        for monitor in both:
            monitor.read(model, (index, labels))
    assert transfers == []


@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_readings_make_no_host_sync(loss):
    """Fake tensors raise on a host sync; those of a fake CUDA device on a mix of devices, too."""
    model = ufm(loss)
    optimality, collapse = monitors()
    for monitor in (optimality, collapse):
        monitor.prepare(model, (torch.arange(N), torch.arange(N) // 3))
    with FakeTensorMode():
        index, labels = fake_twin(model, "cuda", N)
        model._all_rows = index, index._version  # As after the first reading, which looks at them.
        collapse.at_iterates()._metric._head = Borrowed(model.head)
        optimality.at_iterates()._is_checked = True
        for monitor, count in ((optimality, 5), (collapse, 3)):
            values = list(monitor.read(model, (index, labels)).values())
            assert len(values) == count
            assert {value.device.type for value in values} == {"cuda"}
        point = (model.head.weight, model.features, labels, model.head.bias)
        for quantity in (model.problem.distance, model.problem.optimality_gap):
            assert quantity(*point, check_labels=False).device.type == "cuda"
        with pytest.raises(DataDependentOutputException):
            model.problem.check_labels(labels)  # The proof that a transfer is noticed.


def test_values_reach_callback_metrics_and_other_loggers(tmp_path):
    logger = CSVLogger(tmp_path)
    trainer = quiet_trainer(tmp_path, max_steps=20, callbacks=monitors(), logger=logger)
    trainer.fit(ufm(), datamodule=IndexDataModule())
    assert trainer.callback_metrics["optimality/gap"].dtype == torch.float64
    with Path(logger.log_dir, "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows if row["nc/train/nc1"]] == ["0", "5", "10", "15", "20"]
    assert float(rows[-1]["optimality/gap"]) == float(trainer.callback_metrics["optimality/gap"])


def test_without_a_logger_the_run_goes_on(tmp_path):
    trainer = quiet_trainer(tmp_path, max_steps=20, callbacks=monitors())
    trainer.fit(ufm(), datamodule=IndexDataModule())
    assert float(trainer.callback_metrics["nc/train/nc3"]) > 0


def test_stop_distance_ends_the_run_at_the_reading(tmp_path):
    trainer = fit(tmp_path, ufm("ce"), monitors(stop_distance=1e-3), max_steps=5000)
    table = readings(trainer)
    assert trainer.global_step == max(table)
    below = [it for it, row in table.items() if row["optimality/distance"] <= 1e-3]
    assert below == [trainer.global_step]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_stop_at_floor_ends_the_run_well_after_its_minimum(dtype, tmp_path):
    # A constant step never stalls: it dithers at the floor.
    model = ufm("ce", dtype=dtype, lambda_=2e-2, optimizer=lambda params: torch.optim.SGD(params, lr=2.0))
    trainer = fit(tmp_path, model, monitors(stop_at_floor=True), max_steps=20_000)
    distances = {it: row["optimality/distance"] for it, row in readings(trainer).items()}
    smallest = min(distances, key=distances.get)
    assert smallest < trainer.global_step < 20_000
    assert trainer.global_step == -(-2 * smallest // 5) * 5
    # Floors are some tens of eps times the norm of about 5.
    assert distances[smallest] < 1000 * torch.finfo(getattr(torch, dtype)).eps


def test_stop_at_floor_waits_near_the_saddle(tmp_path):
    """From 1e-9 the distance stands at the norm of the optimum for long, and falls in the end."""
    model = ufm("ce", init_scale=1e-9, lambda_=2e-2)
    trainer = fit(tmp_path, model, monitors(stop_at_floor=True, stop_distance=1e-8), max_steps=20_000)
    assert float(model.problem.distance(model.head.weight, model.features, torch.arange(N) // 3)) <= 1e-8
    assert trainer.global_step < 20_000


def test_without_theory_the_rest_is_read(tmp_path):
    model = UFM(K, 3, 2, "ce", lambda_w=0.0, lambda_h=0.0)
    table = readings(fit(tmp_path, model, [OptimalityMonitor(5, theory=False)], max_steps=10))
    assert set(table[10]) == {
        "loss",
        "optimality/grad_norm",
        "log10/optimality/grad_norm",
        "line_search/step_size",
        "line_search/evaluations",
    }


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: UFM(K, 3, 6, "ce", lambda_w=0.1, lambda_h=0.0), "lambda_h must be positive.*theory=False"),
    ],
)
def test_what_the_theory_does_not_cover_is_refused(model, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, model(), [OptimalityMonitor()])


def test_unbalanced_labels_are_refused(tmp_path):
    labels = torch.tensor([0] * 4 + [1] * 2 + [2] * 3 + [3] * 3)
    trainer = quiet_trainer(tmp_path, max_steps=5, callbacks=[OptimalityMonitor()])
    with pytest.raises(ValueError, match="exactly 3 times"):
        trainer.fit(ufm(), FullBatchLoader((torch.arange(N), labels), 1), [])


def test_labels_beyond_the_head_are_refused(tmp_path):
    trainer = quiet_trainer(tmp_path, max_steps=5, callbacks=[NeuralCollapseMonitor()])
    with pytest.raises(ValueError, match=r"labels must be within 0\.\.3, the outputs of the head 'head', got 1\.\.4"):
        trainer.fit(ufm(), FullBatchLoader((torch.arange(N), torch.arange(N) // 3 + 1), 1), [])


def test_other_modules_are_refused_in_words(tmp_path):
    class Other(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(2, 2)

        def training_step(self, batch, batch_idx):
            return self.head(batch[0]).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = quiet_trainer(tmp_path, max_steps=5, callbacks=[OptimalityMonitor()])
    with pytest.raises(ValueError, match=r"reads full-batch runs .* got Other.*Of other modules NeuralCollapseMonitor"):
        trainer.fit(Other(), FullBatchLoader((torch.ones(3, 2), torch.zeros(3)), 1))


@pytest.mark.parametrize("monitor", [OptimalityMonitor, NeuralCollapseMonitor])
def test_cadence_is_validated(monitor):
    with pytest.raises(ValueError, match="every_n_iterations must be at least 1, got 0"):
        monitor(0)


@pytest.mark.parametrize(
    "options",
    [{"stop_distance": 0.0}, {"stop_distance": 1e-3, "theory": False}, {"stop_at_floor": True, "theory": False}],
)
def test_stopping_is_validated(options):
    with pytest.raises(ValueError, match=r"stop_distance must be None or positive|needs theory=True"):
        OptimalityMonitor(**options)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_validation_reads_the_same_values(stage, tmp_path):
    model = ufm()
    fit(tmp_path, model, monitors())
    trainer = quiet_trainer(tmp_path, callbacks=monitors())
    (values,) = getattr(trainer, stage)(model, datamodule=IndexDataModule(), verbose=False)
    expected = measure(model)
    name = "val" if stage == "validate" else "test"
    for tag, value in expected.items():
        assert values[tag.replace("train", name)] == pytest.approx(value, rel=1e-12), tag
    assert not model.head._forward_pre_hooks


def test_the_base_is_abstract():
    assert MonitorAtIterates.read.__isabstractmethod__


@pytest.mark.parametrize(("cadence", "saved"), [(10, [10, 20, 23]), (15, [20, 23]), (1000, [23])])
def test_last_checkpoint(cadence, saved, tmp_path):
    seen = []

    class Watch(LastCheckpoint):
        def _save(self, trainer):
            super()._save(trainer)
            path = tmp_path / "checkpoints" / "last.ckpt"
            if path.exists():
                seen.append(torch.load(path, weights_only=True)["global_step"])

    quiet_trainer(tmp_path, max_steps=23, callbacks=[Watch(cadence)], enable_checkpointing=True).fit(
        ufm(), datamodule=IndexDataModule()
    )
    assert seen == saved
    kept = {"last.ckpt", "previous.ckpt"} if len(saved) > 1 else {"last.ckpt"}
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == kept


def test_readings_are_on_disk_before_the_checkpoint_is(tmp_path):
    seen = []

    class AtSave(L.Callback):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            events = EventAccumulator(trainer.log_dir)
            events.Reload()
            seen.append((trainer.global_step, [event.step for event in events.Scalars("loss")]))

    options = {"enable_checkpointing": True, "max_steps": 20}
    fit(tmp_path, ufm(), [*monitors(), LastCheckpoint(10), AtSave()], **options)
    # The row of the iterate itself is complete at the end only; a resume reads it again.
    assert seen == [(10, [0, 5]), (20, [0, 5, 10, 15, 20])]


def test_an_interrupt_saves_the_iterate_and_its_readings(tmp_path):
    class Interrupt(L.Callback):
        def on_iteration_end(self, trainer, pl_module, batch, iteration):
            if iteration == 17:
                raise KeyboardInterrupt

    model = ufm()
    with pytest.raises(SystemExit):
        fit(tmp_path, model, [*monitors(), LastCheckpoint(), Interrupt()], enable_checkpointing=True)
    folder = tmp_path / "lightning_logs" / "version_0"
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 17
    assert torch.equal(checkpoint["state_dict"]["backbone.features"], model.features)
    rest = ufm()
    quiet_trainer(tmp_path, max_steps=25, callbacks=monitors()).fit(
        rest, datamodule=IndexDataModule(), ckpt_path=folder / "checkpoints/last.ckpt"
    )
    whole = ufm()
    quiet_trainer(tmp_path, max_steps=25).fit(whole, datamodule=IndexDataModule())
    assert torch.equal(rest.features, whole.features)


@pytest.mark.parametrize("monitor", [OptimalityMonitor, NeuralCollapseMonitor])
def test_a_part_of_the_training_set_is_refused(monitor, tmp_path):
    trainer = quiet_trainer(tmp_path, max_steps=5, callbacks=[monitor()])
    part = FullBatchLoader((torch.arange(8), torch.arange(8) // 2), 1)
    with pytest.raises(ValueError, match="got 8 of num_samples=12"):
        trainer.fit(ufm(), part, [])
