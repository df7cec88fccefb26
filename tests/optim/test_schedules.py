"""The lr of ArmijoGD, and who reads and writes it: torch's schedulers, and Lightning in automatic optimization."""

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader, TensorDataset

from nclightning.optim import ArmijoGD
from tests.trainers import quiet_trainer


def problem(curvature=0.5):
    """F = curvature x^2 / 2 accepts steps up to 1.4 / curvature."""
    x = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = ArmijoGD([x])

    def closure():
        optimizer.zero_grad()
        value = curvature * x.square().sum() / 2
        value.backward()
        return value

    return optimizer, closure


def steps_under(optimizer, closure, scheduler, count, *metric):
    """Return the first trials and the steps taken."""
    for _ in range(count):
        first = optimizer.param_groups[0]["lr"]
        optimizer.step(closure)
        yield first, optimizer.outcome.step_size
        scheduler.step(*metric)


def test_lr_is_where_the_next_search_begins():
    optimizer, closure = problem(0.1)
    seen = []
    for _ in range(4):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step(closure)
        assert optimizer.outcome.step_size == seen[-1]
    assert seen == [1.0, 1.0, 4.0, 4.0]


SCHEDULES = {
    # Growth to 4 is due after two steps of 1 in a row, were it not written over, and 4 * 0.1 would be accepted.
    "lambda": (lambda o: schedulers.LambdaLR(o, lambda i: 1 / (i + 1)), [1, 1 / 2, 1 / 3, 1 / 4]),
    "cosine": (lambda o: schedulers.CosineAnnealingLR(o, 4), [1.0, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5]),
    "one cycle": (
        lambda o: schedulers.OneCycleLR(
            o, max_lr=2.0, total_steps=5, cycle_momentum=False, anneal_strategy="linear", div_factor=4, pct_start=0.6
        ),
        [0.5, 1.25, 2.0, 1.000025],
    ),
    "sequential": (
        lambda o: schedulers.SequentialLR(
            o, [schedulers.ConstantLR(o, 0.5, 9), schedulers.ExponentialLR(o, 0.5)], milestones=[2]
        ),
        [0.5, 0.5, 1.0, 0.5],
    ),
}


@pytest.mark.parametrize(("make", "expected"), SCHEDULES.values(), ids=SCHEDULES)
def test_a_schedule_says_where_each_search_begins(make, expected):
    optimizer, closure = problem(0.1)
    firsts, taken = zip(*steps_under(optimizer, closure, make(optimizer), 4), strict=True)
    assert firsts == pytest.approx(expected, rel=1e-5)
    assert taken == pytest.approx(expected, rel=1e-5)


def test_a_schedule_is_shortened_where_it_is_too_long():
    optimizer, closure = problem(1.0)  # Up to 1.4.
    firsts, taken = zip(
        *steps_under(optimizer, closure, schedulers.LambdaLR(optimizer, lambda i: 1 + i), 4), strict=True
    )
    assert firsts == (1, 2, 3, 4)
    assert taken[:1] == (1,)
    optimizer, closure = problem(0.9)
    firsts, taken = zip(
        *steps_under(optimizer, closure, schedulers.LambdaLR(optimizer, lambda i: 1 + i), 4), strict=True
    )
    assert (firsts, taken) == ((1, 2, 3, 4), (1, 1, 1.5, 1))  # 1.4 / 0.9 = 1.56.


def test_step_lr_shortens_and_the_search_lengthens_again():
    optimizer, closure = problem(0.1)
    firsts, _ = zip(*steps_under(optimizer, closure, schedulers.StepLR(optimizer, 2, gamma=0.1), 6), strict=True)
    assert firsts == pytest.approx([1.0, 1.0, 0.4, 0.4, 0.16, 0.16])  # Grown fourfold, then a tenth of it.


def test_reduce_on_plateau_shortens():
    optimizer, closure = problem(0.5)
    scheduler = schedulers.ReduceLROnPlateau(optimizer, factor=0.25, patience=0)
    firsts, _ = zip(*steps_under(optimizer, closure, scheduler, 3, 1.0), strict=True)
    assert firsts == (1.0, 1.0, 0.25)


def test_a_schedule_that_ends_at_zero_is_refused_at_the_next_step_and_saved_before():
    optimizer, closure = problem()
    scheduler = schedulers.LinearLR(optimizer, 1.0, 1e-300, total_iters=1)
    optimizer.step(closure)
    scheduler.step()
    optimizer.param_groups[0]["lr"] = 0.0
    state = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="A scheduler has to keep it above zero"):
        optimizer.step(closure)
    other, other_closure = problem()
    other.load_state_dict(state)
    with pytest.raises(ValueError, match="A scheduler has to keep it above zero"):
        other.step(other_closure)


def test_cycles_of_momentum_are_refused_by_torch():
    optimizer, _ = problem()
    with pytest.raises(ValueError, match="must support momentum"):
        schedulers.OneCycleLR(optimizer, max_lr=1.0, total_steps=5)


def test_a_gradient_scaler_is_refused():
    optimizer, closure = problem()
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(optimizer, closure=closure)
    scaler.scale(closure())
    with pytest.raises(ValueError, match="16-mixed"):
        scaler.step(optimizer)


def test_states_without_lr_load():
    optimizer, closure = problem(0.1)
    for _ in range(3):
        optimizer.step(closure)
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        del group["lr"]
    other, other_closure = problem(0.1)
    with torch.no_grad():
        other.param_groups[0]["params"][0].copy_(optimizer.param_groups[0]["params"][0])
    other.load_state_dict(state)
    for _ in range(3):
        optimizer.step(closure)
        other.step(other_closure)
        assert other.outcome == optimizer.outcome


@pytest.mark.parametrize("done", [1, 2, 3, 4])
@pytest.mark.parametrize("written", ["a schedule", "an option"])
def test_a_run_resumes_bit_for_bit_after_a_write_to_its_groups(written, done):
    """Growth is due after steps in a row that nobody wrote in between, before a checkpoint and after it."""

    def made():
        optimizer, closure = problem(0.01)
        schedule = schedulers.LambdaLR(optimizer, lambda i: 0.5**i) if written == "a schedule" else None
        return optimizer, closure, schedule

    def write(optimizer, schedule):
        if schedule is not None:
            schedule.step()
        else:
            optimizer.param_groups[0]["c1"] *= 0.9

    optimizer, closure, schedule = made()
    for _ in range(done):
        optimizer.step(closure)
        write(optimizer, schedule)
    other, other_closure, _ = made()
    with torch.no_grad():
        other.param_groups[0]["params"][0].copy_(optimizer.param_groups[0]["params"][0])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(6):
        optimizer.step(closure)
        other.step(other_closure)
        assert other.outcome == optimizer.outcome
        assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


class Regression(L.LightningModule):
    """Somebody's module in automatic optimization: least squares on the whole data set."""

    def __init__(self, make_schedule=None, **options):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(5, 1, dtype=torch.float64)
        self.make_schedule, self.options = make_schedule, options
        self.outcomes = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = (self.layer(x) - y).square().mean()
        self.log("loss", loss)
        return loss

    validation_step = training_step

    def on_train_batch_end(self, *_):
        self.outcomes.append(self.optimizers().optimizer.outcome)

    def configure_optimizers(self):
        optimizer = ArmijoGD(self.parameters(), **self.options)
        if self.make_schedule is None:
            return optimizer
        made = self.make_schedule(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": made}

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(30, 5, dtype=torch.float64, generator=generator)
        return DataLoader(TensorDataset(x, x.sum(dim=1, keepdim=True)), batch_size=30)

    val_dataloader = train_dataloader


def fit(module, folder, steps, **options):
    trainer = quiet_trainer(folder, max_steps=steps, **{"limit_val_batches": 0} | options)
    trainer.fit(module)
    return trainer


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.parametrize("options", [{}, {"noise": 0.0}], ids=["to the optimum", "to a failure"])
def test_lightning_goes_on_after_a_search_that_found_no_step(options, tmp_path):
    """Each step calls its closure: Lightning raises otherwise."""
    module = Regression(**options)
    trainer = fit(module, tmp_path, 400)
    assert trainer.global_step == 400
    ended = [o for o in module.outcomes if not o.accepted]
    assert len(ended) > 1
    assert all(o.evaluations >= 1 for o in module.outcomes)
    assert float(module.layer.weight.detach().sub(1).abs().max()) < 1e-6


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.parametrize(
    "make",
    [
        None,
        lambda o: {"scheduler": schedulers.StepLR(o, 5), "interval": "step"},
        lambda o: {"scheduler": schedulers.LambdaLR(o, lambda i: 1 / (i + 1)), "interval": "step"},
        lambda o: {"scheduler": schedulers.ReduceLROnPlateau(o, patience=1), "monitor": "loss"},
        lambda o: {
            "scheduler": schedulers.OneCycleLR(o, max_lr=1.0, total_steps=30, cycle_momentum=False),
            "interval": "step",
        },
    ],
    ids=["none", "step", "lambda", "plateau", "one cycle"],
)
def test_lightning_schedules_and_shows_the_lr(make, tmp_path):
    module, logger = Regression(make), CSVLogger(tmp_path)
    monitor = LearningRateMonitor("step")
    fit(module, tmp_path, 12, callbacks=[monitor], logger=logger)
    (shown,) = monitor.lrs.values()
    assert len(shown) == 12
    for lr, outcome in zip(shown, module.outcomes, strict=True):
        assert outcome.step_size <= lr  # Where the search began.
        assert lr / outcome.step_size == 2 ** round(torch.log2(torch.tensor(lr / outcome.step_size)).item())
    if make is not None and "LambdaLR" in str(type(module.lr_schedulers())):
        assert shown == pytest.approx([1 / (i + 1) for i in range(12)])


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
def test_averaged_weights_that_are_swapped_in_for_validation_leave_training_as_it_is(tmp_path):
    plain, averaged = Regression(), Regression()
    fit(plain, tmp_path, 20)
    callback = EMAWeightAveraging(decay=0.5)
    path = []

    class Weights(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            path.append(pl_module.layer.weight.detach().clone())

    fit(averaged, tmp_path, 20, callbacks=[callback, Weights()], limit_val_batches=1)
    assert torch.equal(path[-1], plain.layer.weight.detach())
    assert averaged.outcomes == plain.outcomes


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
def test_a_resumed_schedule_goes_on_bit_for_bit(tmp_path):
    def make(optimizer):
        return {"scheduler": schedulers.StepLR(optimizer, 3, gamma=0.5), "interval": "step"}

    whole, first, rest = Regression(make), Regression(make), Regression(make)
    fit(whole, tmp_path, 14)
    fit(first, tmp_path, 7).save_checkpoint(tmp_path / "middle.ckpt")
    trainer = quiet_trainer(tmp_path, max_steps=14, limit_val_batches=0)
    trainer.fit(rest, ckpt_path=tmp_path / "middle.ckpt", weights_only=False)
    assert rest.outcomes == whole.outcomes[7:]
    assert torch.equal(rest.layer.weight, whole.layer.weight)
