"""The full-batch loop, the UFM, and line searches under Lightning."""

from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from nclightning.callbacks import LastCheckpoint
from nclightning.data import FullBatchLoader, IndexDataModule
from nclightning.models import UFM, RegularizedClassifier
from nclightning.objective import Objective
from nclightning.optim import ArmijoCG, ArmijoGD, ArmijoLBFGS, ArmijoNewtonCG, SearchStatus
from tests.trainers import quiet_trainer

SIZES = {"num_classes": 4, "samples_per_class": 3, "feature_dim": 6}


def ufm(loss="mse", **options):
    torch.manual_seed(0)
    return UFM(**SIZES, loss=loss, **({"lambda_": 5e-3} | options))


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def batch():
    index = torch.arange(12)
    return index, index // 3


def run_plainly(model, steps, make=ArmijoGD):
    """The same iterations by hand: five lines of plain PyTorch."""
    optimizer = make(model.parameters())

    def closure():
        optimizer.zero_grad()
        value = model.evaluate_objective(batch())
        value.backward()
        return value

    for _ in range(steps):
        optimizer.step(closure)
    return optimizer


class Automatic(L.LightningModule):
    """Somebody else's module, in automatic optimization, around the same objective."""

    def __init__(self, model, make=ArmijoGD):
        super().__init__()
        self.model, self.make = model, make

    def training_step(self, batch, batch_idx):
        return self.model.evaluate_objective(batch)

    def configure_optimizers(self):
        return self.make(self.model.parameters())

    def train_dataloader(self):
        return FullBatchLoader(batch(), 1)


# Roundings of another order, carried along: what is computed from differences of gradients amplifies them.
@pytest.mark.parametrize(("make", "tolerance"), [(ArmijoGD, 1e-13), (ArmijoLBFGS, 1e-9), (ArmijoCG, 1e-9)])
@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_plain_automatic_and_own_loop_agree(loss, make, tolerance, tmp_path):
    steps = 25
    plain, own = ufm(loss), ufm(loss, iterations_per_step=10, optimizer=make)
    automatic = Automatic(ufm(loss), make)
    run_plainly(plain, steps, make)
    quiet_trainer(tmp_path, max_steps=steps).fit(own, datamodule=IndexDataModule())
    quiet_trainer(tmp_path, max_steps=steps, max_epochs=-1, log_every_n_steps=1).fit(automatic)
    for a, b, c in zip(weights(plain), weights(own), weights(automatic), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)  # The own loop has its gradients in closed form.
        assert torch.equal(a, c)


def test_constant_step_descent_takes_the_same_loop(tmp_path):
    plain, own = ufm(), ufm(optimizer=lambda params: torch.optim.SGD(params, lr=0.3))
    run_plainly(plain, 25, lambda params: torch.optim.SGD(params, lr=0.3))
    quiet_trainer(tmp_path, max_steps=25).fit(own, datamodule=IndexDataModule())
    for a, b in zip(weights(plain), weights(own), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)  # Autograd there, closed form here.


@pytest.mark.parametrize("iterations_per_step", [1, 7, 100])
def test_steps_are_iterations(iterations_per_step, tmp_path):
    seen = []

    class Counter(L.Callback):
        def on_iteration_end(self, trainer, pl_module, batch, iteration):
            seen.append(iteration)

    trainer = quiet_trainer(tmp_path, max_steps=30, callbacks=[Counter()])
    trainer.fit(ufm(iterations_per_step=iterations_per_step), datamodule=IndexDataModule())
    assert trainer.global_step == 30
    assert seen == list(range(1, 31))


def test_whatever_else_is_logged_has_iterations_on_its_axis(tmp_path):
    class Log(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            pl_module.log("x", 1.0)

    logger = CSVLogger(tmp_path)
    trainer = quiet_trainer(tmp_path, max_steps=30, callbacks=[Log()], logger=logger)
    trainer.fit(ufm(iterations_per_step=10), datamodule=IndexDataModule())
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().split()[1:]
    assert [row.split(",")[1] for row in rows] == ["10", "20", "30"]


@pytest.mark.parametrize("make", [ArmijoGD, ArmijoLBFGS, ArmijoCG, ArmijoNewtonCG])
def test_an_automatic_run_is_resumed_bit_for_bit(make, tmp_path):
    whole, first, rest = (Automatic(ufm(), make) for _ in range(3))
    quiet_trainer(tmp_path, max_steps=40).fit(whole)
    trainer = quiet_trainer(tmp_path, max_steps=20)
    trainer.fit(first)
    trainer.save_checkpoint(tmp_path / "middle.ckpt")
    quiet_trainer(tmp_path, max_steps=40).fit(rest, ckpt_path=tmp_path / "middle.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(rest), strict=True))


@pytest.mark.parametrize("make", [ArmijoGD, ArmijoLBFGS, ArmijoCG, ArmijoNewtonCG])
@pytest.mark.parametrize("stop", [10, 14, 20])
def test_resume_is_bit_for_bit(stop, make, tmp_path):
    whole = ufm(iterations_per_step=10, optimizer=make)
    quiet_trainer(tmp_path, max_steps=35).fit(whole, datamodule=IndexDataModule())
    first = quiet_trainer(tmp_path / "a", max_steps=stop, callbacks=[LastCheckpoint(10)], enable_checkpointing=True)
    first.fit(ufm(iterations_per_step=10, optimizer=make), datamodule=IndexDataModule())
    rest = ufm(iterations_per_step=10, optimizer=make)
    with torch.no_grad():
        rest.features.zero_()
    second = quiet_trainer(tmp_path / "b", max_steps=35)
    second.fit(rest, datamodule=IndexDataModule(), ckpt_path=tmp_path / "a" / "checkpoints" / "last.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(rest), strict=True))
    assert second.global_step == 35
    assert rest.optimizers(use_pl_optimizer=False).total_evaluations == (
        whole.optimizers(use_pl_optimizer=False).total_evaluations
    )


def test_load_from_checkpoint_keeps_float64(tmp_path):
    model = ufm()
    trainer = quiet_trainer(tmp_path, max_steps=5)
    trainer.fit(model, datamodule=IndexDataModule())
    trainer.save_checkpoint(tmp_path / "model.ckpt", weights_only=False)
    loaded = UFM.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(loaded), strict=True))
    assert loaded.features.dtype == torch.float64
    assert loaded.objective == model.objective


@pytest.mark.parametrize("other", [torch.optim.Adam, ArmijoGD])
def test_another_optimizer_is_refused_and_leaves_the_checkpoint(other, tmp_path):
    def go_on(make, **options):
        callbacks = [LastCheckpoint(10)]
        trainer = quiet_trainer(tmp_path, max_steps=40, callbacks=callbacks, enable_checkpointing=True)
        trainer.fit(ufm(optimizer=make, iterations_per_step=10), datamodule=IndexDataModule(), **options)

    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.1)

    first = quiet_trainer(tmp_path, max_steps=20, callbacks=[LastCheckpoint(10)], enable_checkpointing=True)
    first.fit(ufm(optimizer=sgd, iterations_per_step=10), datamodule=IndexDataModule())
    path = tmp_path / "checkpoints" / "last.ckpt"
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"was not written by {other.__name__}"):
        go_on(other, ckpt_path=path)
    assert path.read_bytes() == before
    go_on(sgd, ckpt_path=path)


def test_a_fit_that_never_started_saves_nothing(tmp_path):
    class Refuse(L.Callback):
        def on_fit_start(self, trainer, pl_module):
            raise ValueError("no")

    def fit(steps, *more, **options):
        callbacks = [LastCheckpoint(10), *more]
        trainer = quiet_trainer(tmp_path, max_steps=steps, callbacks=callbacks, enable_checkpointing=True)
        trainer.fit(ufm(iterations_per_step=10), datamodule=IndexDataModule(), **options)

    fit(20)
    path = tmp_path / "checkpoints" / "last.ckpt"
    before = path.stat().st_mtime_ns
    with pytest.raises(ValueError, match="no"):
        fit(40, Refuse(), ckpt_path=path)
    assert path.stat().st_mtime_ns == before


def test_another_problem_is_not_resumed(tmp_path):
    trainer = quiet_trainer(tmp_path, max_steps=5)
    trainer.fit(ufm(), datamodule=IndexDataModule())
    trainer.save_checkpoint(tmp_path / "model.ckpt", weights_only=False)
    with pytest.raises(ValueError, match=r"another problem \(lambda_w: 0.015 there, 0.03 here"):
        quiet_trainer(tmp_path, max_steps=9).fit(
            ufm(lambda_=1e-2), datamodule=IndexDataModule(), ckpt_path=tmp_path / "model.ckpt"
        )


def test_optimizer_options_that_a_resume_ignores_are_named(tmp_path):
    trainer = quiet_trainer(tmp_path, max_steps=5)
    trainer.fit(ufm(), datamodule=IndexDataModule())
    trainer.save_checkpoint(tmp_path / "model.ckpt", weights_only=False)
    other = ufm(optimizer=lambda params: ArmijoGD(params, c1=0.1))
    with pytest.warns(UserWarning, match=r"Ignored: c1=0.1 \(kept: 0.3\)\."):
        quiet_trainer(tmp_path, max_steps=9).fit(other, datamodule=IndexDataModule(), ckpt_path=tmp_path / "model.ckpt")
    assert other.optimizers(use_pl_optimizer=False).param_groups[0]["c1"] == 0.3


def test_lambdas():
    assert ufm(lambda_=5e-3).objective == Objective("mse", 3 * 5e-3, 5e-3)
    assert ufm(lambda_=5e-3, lambda_h=1e-4).objective == Objective("mse", 3 * 5e-3, 1e-4)
    assert ufm(lambda_=None, lambda_w=0.1, lambda_h=0.2).objective == Objective("mse", 0.1, 0.2)
    assert ufm(lambda_=5e-3).hparams["lambda_w"] == 3 * 5e-3


def test_features_are_the_parameter_and_bias_is_for_mse_only():
    model = ufm("mse")
    assert isinstance(model.features, nn.Parameter)
    assert model.features.shape == (12, 6)
    assert torch.equal(model(torch.arange(12)), model.head(model.features))
    assert model.head.bias is not None
    assert ufm("ce").head.bias is None


def test_initialisation_is_normal_with_the_stated_scale():
    torch.manual_seed(0)
    model = UFM(10, 100, 50, "ce", lambda_=1e-3, init_scale=0.1)
    # 50,000 entries: the standard deviation is known to 1/sqrt(2 * 50,000) = 0.3 %; four of these.
    assert float(model.features.detach().std()) == pytest.approx(0.1, rel=0.013)
    single = ufm(dtype="float32")
    # The same numbers, rounded.
    assert torch.equal(single.features.detach(), ufm().features.detach().float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
        ({"samples_per_class": 0}, "samples_per_class must be at least 1"),
        ({"feature_dim": 0}, "feature_dim must be at least 1"),
        ({"loss": "hinge"}, "loss must be 'mse' or 'ce'"),
        ({"lambda_": None}, "lambda_w is missing: give lambda_w and lambda_h, or"),
        ({"lambda_": None, "lambda_w": 0.1}, "lambda_h is missing"),
        ({"lambda_h": -1.0}, "lambda_h must be finite and non-negative"),
        ({"init_scale": float("nan")}, "init_scale must be finite"),
        ({"dtype": "float16"}, "dtype must be 'float64' or 'float32'"),
        ({"iterations_per_step": 0}, "iterations_per_step must be at least 1"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        UFM(**(SIZES | {"loss": "mse", "lambda_": 1e-2} | change))


def test_features_that_are_not_finite_are_refused(tmp_path):
    model = ufm()
    with torch.no_grad():
        model.features[3, 2] = torch.nan
    with pytest.raises(ValueError, match=r"backbone.features has entries that are not finite before training"):
        quiet_trainer(tmp_path, max_steps=5).fit(model, datamodule=IndexDataModule())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": -1, "max_epochs": 1}, "trainer.max_steps must be set"),
        ({"precision": "bf16-mixed"}, "precision='bf16-mixed' does not fit"),
        ({"precision": "16-true"}, "precision='16-true' does not fit"),
        (
            {
                "callbacks": [L.pytorch.callbacks.ModelCheckpoint(every_n_train_steps=70)],
                "enable_checkpointing": True,
            },
            "every_n_train_steps of ModelCheckpoint must be a multiple of iterations_per_step = 100, got 70",
        ),
    ],
)
def test_trainer_options_that_do_not_fit_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        quiet_trainer(tmp_path, **({"max_steps": 5} | options)).fit(ufm(), datamodule=IndexDataModule())


def test_strategies_that_shard_or_replicate_by_themselves_are_refused(tmp_path):
    trainer = quiet_trainer(tmp_path, max_steps=5, strategy=ModelParallelStrategy(), devices=2)
    with pytest.raises(ValueError, match=r"ModelParallelStrategy does not fit .*trainer.strategy=ddp"):
        ufm().check_trainer(trainer)


def test_double_precision_trainer_with_float32_parameters_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"precision='64-true' does not fit parameters of torch.float32"):
        quiet_trainer(tmp_path, max_steps=5, precision="64-true").fit(
            ufm(dtype="float32"), datamodule=IndexDataModule()
        )


def test_a_search_that_ends_without_a_step_ends_the_run(tmp_path):
    model = ufm("ce", iterations_per_step=10)
    optimum = model.problem.random_optimum()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()  # The saddle at zero: its gradient vanishes exactly.
    trainer = quiet_trainer(tmp_path, max_steps=50)
    trainer.fit(model, datamodule=IndexDataModule())
    assert trainer.global_step == 1
    assert model.optimizers(use_pl_optimizer=False).outcome.status is SearchStatus.STATIONARY
    assert optimum.bias is None


def test_gradient_accumulation_is_refused_in_automatic_optimization(tmp_path):
    module = Automatic(ufm())
    module.train_dataloader = lambda: FullBatchLoader(batch(), 4)
    trainer = quiet_trainer(tmp_path, max_steps=4, max_epochs=2, accumulate_grad_batches=2, log_every_n_steps=1)
    with pytest.raises(ValueError, match="accumulate_grad_batches=1"):
        trainer.fit(module)


def test_float16_mixed_precision_is_refused_in_automatic_optimization(tmp_path):
    """On a GPU, '16-mixed' steps through a gradient scaler without a closure; here the scaler itself."""
    model = ufm()
    optimizer = ArmijoGD(model.parameters())
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model.evaluate_objective(batch())).backward()
    with pytest.raises(ValueError, match="16-mixed"):
        scaler.step(optimizer)


def test_any_backbone_is_trained(tmp_path):
    inputs, labels = torch.randn(12, 5, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 4
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(5, 6), nn.ReLU())
    model = RegularizedClassifier(body, nn.Linear(6, 4), Objective("ce", 1e-2, 1e-2), 12)
    before = float(model.evaluate_objective((inputs, labels)).detach())
    quiet_trainer(tmp_path, max_steps=20).fit(model, FullBatchLoader((inputs, labels), 1), [])
    assert float(model.evaluate_objective((inputs, labels)).detach()) < before
