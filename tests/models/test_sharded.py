"""Networks whose weights ``fully_shard`` shares out take the steps of one process."""

import csv
from datetime import timedelta
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn

from nclightning.callbacks import LastCheckpoint, NeuralCollapseMonitor, OptimalityMonitor, TensorBoardDashboard
from nclightning.data import FullBatchLoader, GaussianDataModule, IndexDataModule
from nclightning.loggers import RunLogger
from nclightning.models import UFM, RegularizedClassifier, TwoLayerMLP
from nclightning.objective import Objective
from nclightning.optim import ArmijoCG, ArmijoGD, ArmijoLBFGS, ArmijoNewtonCG
from nclightning.ranks import sum_over_ranks
from nclightning.sharding import own_shard
from tests.processes import on
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


def adam(params):
    return torch.optim.Adam(params, lr=1e-3)


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


def data():
    return GaussianDataModule(num_classes=3, samples_per_class=7, input_dim=30)


def strategy(world, **options):
    sizes = {"data_parallel_size": world, "tensor_parallel_size": 1, "save_distributed_checkpoint": False}
    return ModelParallelStrategy(**(sizes | {"timeout": timedelta(minutes=1)} | options))


def trainer_of(folder, world, how=None, **options):
    parallel = {"devices": world, "strategy": strategy(world) if how is None else how} if world > 1 else {}
    return quiet_trainer(folder, use_distributed_sampler=False, **(parallel | options))


def fit(folder, world, model, max_steps=20, ckpt_path=None, rows=None, *, theory=True, monitors=True, further=()):
    callbacks = [OptimalityMonitor(5, theory=theory), NeuralCollapseMonitor(5)]
    trainer = trainer_of(
        folder,
        world,
        max_steps=max_steps,
        callbacks=[*(callbacks if monitors else []), *further, LastCheckpoint(10)],
        enable_checkpointing=True,
        logger=RunLogger(str(folder)),
    )
    trainer.fit(model, rows or data(), ckpt_path=ckpt_path)
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


MODELS = {
    "mse": lambda: mlp("mse"),
    "ce": lambda: mlp("ce"),
    "penalty on weights": lambda: mlp("ce", penalty="weights"),
    "momentum": lambda: mlp("mse", optimizer=sgd),
    "adam": lambda: mlp("ce", optimizer=adam),
    "plain sgd": lambda: mlp("ce", optimizer=plain_sgd),
    "own": Own,
}


def pairs(params):
    return ArmijoLBFGS(params, history=4)


# Newton's method takes differences of gradients where weights are shared out, and is exact on a single process: paths
# differ as far as its inexact solutions do, and come together after some more steps.
@pytest.mark.parametrize(
    ("make", "tensors", "tolerance", "steps"),
    [(pairs, 8, 1e-9, 10), (ArmijoCG, 2, 1e-9, 10), (ArmijoNewtonCG, 0, 1e-2, 20)],
)
def test_what_directions_learnt_is_shared_out_as_the_weights_are(make, tensors, tolerance, steps, tmp_path):
    """Roundings grow faster than by descent: what is resumed is compared over few steps."""

    def model():
        return mlp("ce", optimizer=make)

    further = steps + 4
    alone = weights(fit(tmp_path / "alone", 1, model(), steps))
    whole = weights(fit(tmp_path / "whole", 1, model(), further, last(tmp_path / "alone")))

    def job():
        first = fit(tmp_path / "together", 2, model(), steps)
        again = fit(tmp_path / "again", 2, model(), further, last(tmp_path / "together"))
        straight = fit(tmp_path / "straight", 2, model(), further)
        taken = fit(tmp_path / "taken over", 2, model(), further, last(tmp_path / "alone"))
        return weights(first), weights(again), weights(straight), weights(taken)

    (together, again, straight, taken), _ = on(2, tmp_path, job)
    assert difference(alone, together) < tolerance
    assert difference(straight, again) == 0
    assert difference(whole, taken) < tolerance
    resumed = weights(fit(tmp_path / "by itself", 1, model(), further, last(tmp_path / "together")))
    assert difference(straight, resumed) < tolerance
    (state,) = torch.load(last(tmp_path / "together"), weights_only=True)["optimizer_states"]
    shapes = [p.shape for p in model().parameters()]
    assert list(state["state"]) == (list(range(len(shapes))) if tensors else [])
    for index, entries in state["state"].items():
        assert len(entries) == tensors
        assert all(type(value) is torch.Tensor and value.shape == shapes[index] for value in entries.values())


@pytest.mark.parametrize("kind", MODELS)
def test_iterates_readings_and_resumed_runs_are_those_of_one_process(kind, tmp_path):
    options = {"theory": kind not in ("penalty on weights", "own")}
    if kind in ("mse", "own"):
        options["further"] = [TensorBoardDashboard()]
    alone = weights(fit(tmp_path / "alone", 1, MODELS[kind](), **options))
    whole = weights(fit(tmp_path / "whole", 1, MODELS[kind](), 30, last(tmp_path / "alone"), **options))

    def job():
        first = fit(tmp_path / "together", 2, MODELS[kind](), **options)
        shares = [p.to_local().shape for p in first.lightning_module.parameters()]
        again = fit(tmp_path / "again", 2, MODELS[kind](), 30, last(tmp_path / "together"), **options)
        taken = fit(tmp_path / "taken over", 2, MODELS[kind](), 30, last(tmp_path / "alone"), **options)
        return shares, weights(first), weights(again), weights(taken)

    (shares, together, again, taken), (other_shares, *_) = on(2, tmp_path, job)
    assert any(share != other for share, other in zip(shares, other_shares, strict=True))
    # Sums in another order: roundings, carried along by as many steps.
    assert difference(alone, together) < 1e-12
    assert difference(whole, again) < 1e-11
    assert difference(whole, taken) < 1e-11
    one, many = readings(tmp_path / "alone"), readings(tmp_path / "together")
    assert [row["iteration"] for row in one] == [row["iteration"] for row in many] == [0, 5, 10, 15, 20]
    for row, other in zip(one, many, strict=True):
        assert row.keys() == other.keys()
        for tag, value in row.items():
            assert other[tag] == pytest.approx(value, rel=1e-8, nan_ok=True), (row["iteration"], tag)
    resumed = weights(fit(tmp_path / "by itself", 1, MODELS[kind](), 30, last(tmp_path / "together"), **options))
    assert difference(whole, resumed) < 1e-11


def test_three_processes_take_over_from_two(tmp_path):
    """Of three processes two get no row of a head for two classes, or none of its bias."""

    def make():
        torch.manual_seed(0)
        sizes = SIZES | {"num_classes": 2, "samples_per_class": 10}
        return TwoLayerMLP(**sizes, loss="mse", input_dim=30, hidden_dim=16)

    rows = GaussianDataModule(num_classes=2, samples_per_class=10, input_dim=30)
    alone = weights(fit(tmp_path / "alone", 1, make(), 30, rows=rows))
    on(2, tmp_path, lambda: fit(tmp_path / "two", 2, make(), rows=rows).global_step)
    three, *_ = on(3, tmp_path, lambda: weights(fit(tmp_path / "three", 3, make(), 30, last(tmp_path / "two"), rows)))
    assert difference(alone, three) < 1e-11


def test_a_checkpoint_is_that_of_one_process(tmp_path):
    fit(tmp_path / "alone", 1, mlp())
    on(2, tmp_path, lambda: fit(tmp_path / "together", 2, mlp()).global_step)
    one, two = (torch.load(last(tmp_path / name), weights_only=True) for name in ("alone", "together"))
    assert one.keys() == two.keys()
    for stored in (one, two):
        assert {type(value) for value in stored["state_dict"].values()} == {torch.Tensor}
    (state,), (other,) = one["optimizer_states"], two["optimizer_states"]
    assert state["param_groups"] == other["param_groups"]
    assert state["state"] == other["state"] == {}
    outcome, other_outcome = state["search"].pop("outcome"), other["search"].pop("outcome")
    assert outcome.pop("status") == other_outcome.pop("status")
    assert other_outcome == pytest.approx(outcome, rel=1e-10)
    assert state["search"] == other["search"]
    model = TwoLayerMLP.load_from_checkpoint(last(tmp_path / "together"))
    assert difference(model.state_dict(), two["state_dict"]) == 0


def test_processes_that_have_all_samples_each_take_the_same_steps(tmp_path):
    class Everything(GaussianDataModule):
        def _loader(self, length):
            return FullBatchLoader(self.batch(), length)

    def job():
        return weights(fit(tmp_path / "together", 2, mlp(optimizer=sgd), rows=Everything(), monitors=False))

    alone = weights(fit(tmp_path / "alone", 1, mlp(optimizer=sgd)))
    together, _ = on(2, tmp_path, job)
    assert difference(alone, together) < 1e-12


def test_one_process_can_have_the_strategy(tmp_path):
    def job():
        trainer = trainer_of(tmp_path, 1, max_steps=20, strategy=strategy(1), callbacks=[OptimalityMonitor()])
        trainer.fit(mlp(), data())
        return weights(trainer)

    (by_itself,) = on(1, tmp_path, job)
    assert difference(weights(fit(tmp_path / "alone", 1, mlp())), by_itself) < 1e-12


@pytest.mark.parametrize("optimizer", [ArmijoGD, sgd])
def test_forwards_in_between_change_nothing(optimizer, tmp_path):
    """They leave weights gathered, which the next move makes stale."""

    class Look(L.Callback):
        def on_iteration_end(self, trainer, pl_module, batch, iteration):
            with torch.no_grad():
                looks.append(float(pl_module.evaluate_objective(batch)) + float(pl_module(batch[0]).sum()))
            pl_module.value_and_grad_norm(batch)
            pl_module.evaluate_objective(batch)  # With a graph, which nobody follows back.

    class Validated(GaussianDataModule):
        def val_dataloader(self):
            return self._loader(1)

    def job():
        rows = Validated(steps_per_epoch=2)
        return weights(fit(tmp_path / "together", 2, mlp(optimizer=optimizer), rows=rows, further=[Look()])), len(
            set(looks)
        )

    looks = []
    alone = weights(fit(tmp_path / "alone", 1, mlp(optimizer=optimizer)))

    (together, different), _ = on(2, tmp_path, job)
    assert difference(alone, together) < 1e-12
    assert different == 20


def test_a_search_that_ends_without_a_step_leaves_the_weights_of_before(tmp_path):
    def too_far(params):
        return ArmijoGD(params, initial_step=1e3, max_trials=1)

    class Watch(L.Callback):
        def on_iteration_end(self, trainer, pl_module, batch, iteration):
            assert all(own_shard(p.detach()).shape[0] < p.shape[0] for p in pl_module.parameters())

    def job():
        monitors = [Watch(), OptimalityMonitor(1), NeuralCollapseMonitor(1)]
        trainer = fit(tmp_path, 2, mlp(optimizer=too_far), monitors=False, further=monitors)
        return trainer.global_step, weights(trainer)

    (steps, after), _ = on(2, tmp_path, job)
    assert steps == 1
    assert difference(mlp().state_dict(), after) == 0
    first, second = ({k: v for k, v in row.items() if k.startswith(("opt", "nc"))} for row in readings(tmp_path))
    assert first == second


def test_a_weight_that_is_changed_in_between_counts(tmp_path):
    """Whole or in its shard: the gradient that the search carries is then another's, and the features are others."""

    class Change(L.Callback):
        @torch.no_grad()
        def on_iteration_end(self, trainer, pl_module, batch, iteration):
            weight = pl_module.backbone[2].weight
            if iteration == 7:
                weight.mul_(0.5)
            if iteration == 13:
                pl_module(batch[0])
                own_shard(weight).mul_(0.5)
                seen.append(float(sum_over_ranks(pl_module.features_of(batch[0]).square().sum())))

    def job():
        return weights(fit(tmp_path / "together", 2, mlp(), further=[Change()])), seen

    seen = []
    (together, values), _ = on(2, tmp_path, job)
    alone = weights(fit(tmp_path / "alone", 1, mlp(), further=[Change()]))
    assert difference(alone, together) < 1e-12
    assert values == pytest.approx(seen, rel=1e-10)


@pytest.mark.parametrize("kind", ["mse", "own"])
def test_validation_reads_the_whole_set(kind, tmp_path):
    def job(world=2):
        callbacks = [OptimalityMonitor(theory=kind == "mse"), NeuralCollapseMonitor()]
        (values,) = trainer_of(tmp_path, world, callbacks=callbacks).validate(MODELS[kind](), data(), verbose=False)
        return values

    alone = job(1)
    for values in on(2, tmp_path, job):
        assert values == pytest.approx(alone, rel=1e-6)  # Lightning carries some as float32.


def error_of(call):
    with pytest.raises((ValueError, KeyError)) as caught:
        call()
    return str(caught.value)


def test_refusals(tmp_path):
    on(2, tmp_path, lambda: fit(tmp_path / "first", 2, mlp(), 10, monitors=False).global_step)

    class Nested(TwoLayerMLP):
        def configure_model(self):
            fsdp.fully_shard(self.head, mesh=self.device_mesh["data_parallel"])
            super().configure_model()

    def broken():
        model = mlp()
        with torch.no_grad():
            model.head.weight[-1, 0] = torch.nan
        return model

    def broken_checkpoint():
        stored = torch.load(last(tmp_path / "first"), weights_only=True)
        stored["state_dict"]["head.weight"][0, 0] = torch.inf
        torch.save(stored, tmp_path / "broken.ckpt")
        return tmp_path / "broken.ckpt"

    path = broken_checkpoint()

    def job():
        def refused(model, **options):
            return error_of(lambda: fit(tmp_path / "second", 2, model, monitors=False, **options))

        return [
            refused(mlp(optimizer=lbfgs)),
            refused(broken()),
            refused(mlp(), ckpt_path=path),
            refused(mlp(hidden_dim=15), ckpt_path=last(tmp_path / "first")),
            refused(Nested(**SIZES, loss="ce", input_dim=30, hidden_dim=16)),
            refused(mlp(), ckpt_path=tmp_path),
            error_of(lambda: trainer_of(tmp_path, 2).validate(UFM(**SIZES, loss="ce"), IndexDataModule())),
        ]

    first, second = on(2, tmp_path, job)
    assert first == second
    for message, start in zip(
        first,
        (
            "LBFGS takes inner products over all parameters, but weights are sharded",
            "head.weight has entries that are not finite",
            "head.weight has entries that are not finite",
            "the checkpoint belongs to another problem (hidden_dim: 16 there, 15 here)",
            "the full-batch loop needs all weights of FSDPNested in one group",
            f"ckpt_path={tmp_path} is a folder",
            "ModelParallelStrategy does not fit free features",
        ),
        strict=True,
    ):
        assert message.startswith(start)


@pytest.mark.parametrize(
    ("model", "how", "message"),
    [
        (mlp, ModelParallelStrategy(), "set its data_parallel_size=2, tensor_parallel_size=1 and save_distr"),
        (mlp, strategy(1, tensor_parallel_size=2), "ModelParallelStrategy would split layers"),
        (mlp, strategy(2, save_distributed_checkpoint=True), "set its save_distributed_checkpoint=False"),
        (lambda: UFM(**SIZES, loss="ce"), strategy(2), r"free features, .* trainer.strategy=ddp"),
    ],
)
def test_strategies_that_do_not_fit_are_refused_before_processes_start(model, how, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        model().check_trainer(trainer_of(tmp_path, 2, how, max_steps=5))


def test_other_ways_to_shard_are_refused():
    trainer = SimpleNamespace(
        strategy=FSDPStrategy(), max_steps=5, precision="32-true", world_size=2,
        gradient_clip_val=None, accumulate_grad_batches=1, limit_train_batches=1.0,
    )  # fmt: skip
    with pytest.raises(ValueError, match="FSDPStrategy does not fit the full-batch loop"):
        mlp().check_trainer(trainer)
