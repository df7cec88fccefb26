"""Optimizers and schedulers that a subclass gives to the full-batch loop, and callbacks that write to parameters."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim import lr_scheduler as schedulers

from nclightning.callbacks import LastCheckpoint
from nclightning.data import FullBatchLoader, IndexDataModule
from nclightning.models import UFM, RegularizedClassifier
from nclightning.objective import Objective
from nclightning.optim import ArmijoGD
from tests.trainers import quiet_trainer

OPTIMIZERS = {"SGD": lambda params: torch.optim.SGD(params, lr=0.5), "ArmijoGD": ArmijoGD}
LABELS = torch.arange(12) % 4


class Scheduled(UFM):
    """A UFM under constant steps that a scheduler shortens."""

    form = staticmethod(lambda optimizer, scheduler: ([optimizer], [scheduler]))

    def __init__(self, optimizer_name="SGD"):
        torch.manual_seed(0)
        super().__init__(4, 3, 6, "mse", lambda_=5e-3, iterations_per_step=10)
        self.make_optimizer = OPTIMIZERS[optimizer_name]

    def make_scheduler(self, optimizer):
        return schedulers.StepLR(optimizer, 4, gamma=0.5)

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.parameters())
        return self.form(optimizer, self.make_scheduler(optimizer))


class AsDictionary(Scheduled):
    form = staticmethod(lambda optimizer, scheduler: {"optimizer": optimizer, "lr_scheduler": scheduler})


class EverySecond(Scheduled):
    form = staticmethod(
        lambda optimizer, scheduler: {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step", "frequency": 2},
        }
    )


def by_hand(model, steps, frequency=1):
    optimizer = model.make_optimizer(model.parameters())
    scheduler = model.make_scheduler(optimizer)
    index = torch.arange(12)

    def closure():
        optimizer.zero_grad()
        value = model.evaluate_objective((index, index // 3))
        value.backward()
        return value

    for i in range(1, steps + 1):
        optimizer.step(closure)
        if i % frequency == 0:
            scheduler.step()
    return optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("kind", "frequency"), [(Scheduled, 1), (AsDictionary, 1), (EverySecond, 2)])
def test_schedulers_are_stepped_once_an_iteration(kind, frequency, optimizer, tmp_path):
    model, plain = kind(optimizer), kind(optimizer)
    quiet_trainer(tmp_path, max_steps=25).fit(model, datamodule=IndexDataModule())
    lr = by_hand(plain, 25, frequency)
    assert model.optimizers(use_pl_optimizer=False).param_groups[0]["lr"] == lr
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)  # Autograd there, closed form here.


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", [Scheduled, AsDictionary, EverySecond])
def test_scheduled_runs_resume_bit_for_bit_and_without_a_warning(kind, optimizer, tmp_path):
    whole, first, rest = kind(optimizer), kind(optimizer), kind(optimizer)
    quiet_trainer(tmp_path, max_steps=35).fit(whole, datamodule=IndexDataModule())
    trainer = quiet_trainer(tmp_path / "a", max_steps=14, callbacks=[LastCheckpoint(10)], enable_checkpointing=True)
    trainer.fit(first, datamodule=IndexDataModule())
    path = tmp_path / "a" / "checkpoints" / "last.ckpt"
    quiet_trainer(tmp_path / "b", max_steps=35).fit(rest, datamodule=IndexDataModule(), ckpt_path=path)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), rest.parameters(), strict=True))


def test_a_run_of_the_line_search_resumes_without_a_warning_of_its_lr(tmp_path):
    def model():
        torch.manual_seed(0)
        return UFM(4, 3, 6, "mse", lambda_=5e-3, iterations_per_step=10)

    trainer = quiet_trainer(tmp_path, max_steps=20)
    trainer.fit(model(), datamodule=IndexDataModule())
    assert trainer.optimizers[0].param_groups[0]["lr"] != 1.0
    trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    quiet_trainer(tmp_path, max_steps=30).fit(model(), datamodule=IndexDataModule(), ckpt_path=tmp_path / "last.ckpt")


def test_a_scheduler_that_wants_a_metric_is_refused_before_anything_is_trained(tmp_path):
    model = Scheduled()
    model.make_scheduler = schedulers.ReduceLROnPlateau
    before = model.features.detach().clone()
    with pytest.raises(ValueError, match="configure_optimizers returned ReduceLROnPlateau"):
        quiet_trainer(tmp_path, max_steps=5).fit(model, datamodule=IndexDataModule())
    assert torch.equal(model.features, before)


def test_two_optimizers_are_refused(tmp_path):
    class Two(UFM):
        def configure_optimizers(self):
            return ArmijoGD([self.features]), ArmijoGD(self.head.parameters())

    with pytest.raises(ValueError, match="steps one optimizer, but configure_optimizers returned 2"):
        quiet_trainer(tmp_path, max_steps=5).fit(Two(4, 3, 6, "mse", lambda_=5e-3), datamodule=IndexDataModule())


def test_the_monitor_of_learning_rates_shows_where_the_search_goes_on(tmp_path):
    torch.manual_seed(0)
    monitor = LearningRateMonitor("step")
    trainer = quiet_trainer(tmp_path, max_steps=30, callbacks=[monitor], logger=CSVLogger(tmp_path))
    trainer.fit(UFM(4, 3, 6, "mse", lambda_=5e-3, iterations_per_step=10), datamodule=IndexDataModule())
    (shown,) = monitor.lrs.values()
    assert len(shown) == 3
    assert shown[0] == 1.0


class Disturb(L.Callback):
    """Writes where torch counts nothing, in the middle of a step of the loop or at its end."""

    def __init__(self, where, change):
        self.change = change
        setattr(self, where, self.act)

    def act(self, trainer, pl_module, *args):
        iteration = args[-1] if len(args) == 2 else trainer.global_step
        if iteration == 10:
            self.change(pl_module)


def scaled(model):
    model.head.weight.data.mul_(0.5)


def frozen(model):
    model.head.weight.requires_grad_(False)


def ufm():
    torch.manual_seed(0)
    return UFM(4, 3, 6, "mse", lambda_=5e-3, iterations_per_step=5)


def mlp():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(5, 6, dtype=torch.float64), nn.Tanh())
    return RegularizedClassifier(
        body, nn.Linear(6, 4, dtype=torch.float64), Objective("ce", 1e-2, 1e-2), 12, iterations_per_step=5
    )


def data_of(model):
    if isinstance(model, UFM):
        index = torch.arange(12)
        return index, index // 3
    return torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), LABELS


def fit(model, folder, steps, *callbacks):
    quiet_trainer(folder, max_steps=steps, callbacks=list(callbacks)).fit(model, FullBatchLoader(data_of(model), 1), [])


@pytest.mark.parametrize("change", [scaled, frozen])
@pytest.mark.parametrize("where", ["on_iteration_end", "on_train_batch_end"])
@pytest.mark.parametrize("make", [ufm, mlp])
def test_a_step_after_a_callback_goes_along_the_gradient_where_it_begins(make, where, change, tmp_path):
    model, reference = make(), make()
    fit(reference, tmp_path, 10)
    change(reference)
    start = [p.detach().clone() for p in reference.parameters()]
    for p in reference.parameters():
        p.grad = None
    reference.evaluate_objective(data_of(reference)).backward()
    fit(model, tmp_path, 11, Disturb(where, change))
    outcome = model.optimizers(use_pl_optimizer=False).outcome
    assert outcome.accepted
    for p, x, g in zip(model.parameters(), start, [p.grad for p in reference.parameters()], strict=True):
        expected = x if g is None else x - outcome.step_size * g
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-14)
