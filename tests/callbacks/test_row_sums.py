"""Sums of the rows of heads follow their law, along runs of modules that know nothing of it."""

import math

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from nclightning.callbacks import OptimizerLaws
from nclightning.errors import UserError
from nclightning.functional import GradientStep
from nclightning.optim import ArmijoGD
from tests.trainers import quiet_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
K, D = 4, 6


class Net(L.LightningModule):
    """Batch norm and dropout in float64, on unbalanced samples in batches of a random order."""

    def __init__(self, optimizer, loss=F.cross_entropy, head=None, penalty=0.0, dropout=0.3, schedule=False):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, D), nn.BatchNorm1d(D), nn.Tanh(), nn.Dropout(dropout))
        self.last = nn.Linear(D, K) if head is None else head
        self.make, self.loss, self.penalty, self.schedule = optimizer, loss, penalty, schedule
        self.double()

    def forward(self, x):
        return self.last(self.body(x))

    def training_step(self, batch, batch_idx):
        return self.loss(self(batch[0]), batch[1]) + self.penalty / 2 * self.last.weight.square().sum()

    def configure_optimizers(self):
        optimizer = self.make(self)
        if not self.schedule:
            return optimizer
        rate = (lambda i: 0.95**i) if self.schedule is True else (lambda i: 1 - i / self.schedule)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def data(**options):
    generator = torch.Generator().manual_seed(0)
    y = torch.multinomial(torch.tensor([0.6, 0.2, 0.1, 0.1]), 50, replacement=True, generator=generator)
    x = torch.randn(50, 3, generator=generator).double() + y[:, None]
    return DataLoader(TensorDataset(x, y), **({"batch_size": 8, "shuffle": True} | options))


class Record(L.Callback):
    """Keeps the values that callbacks see after each batch."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, *_):
        self.rows.append({tag: float(v) for tag, v in trainer.callback_metrics.items() if tag.startswith("laws/")})


def fit(folder, laws, model, loader=None, seed=0, ckpt_path=None, **options):
    torch.manual_seed(seed)
    record = Record()
    callbacks = [*([laws] if laws is not None else []), record, *options.pop("callbacks", [])]
    trainer = quiet_trainer(folder, **({"max_epochs": 4, "callbacks": callbacks} | options))
    trainer.fit(model, data() if loader is None else loader, ckpt_path=ckpt_path)
    return record.rows, trainer


def made(*args, seed=0, **options):
    torch.manual_seed(seed)
    return Net(*args, **options)


def sgd(**options):
    return lambda model: torch.optim.SGD(model.parameters(), **({"lr": 0.1} | options))


def with_groups(model):
    """Decay on weights alone, as is usual, and a step of its own for the head."""
    decayed = [p for p in model.body.parameters() if p.ndim > 1]
    others = [p for p in (*model.body.parameters(), model.last.bias) if p.ndim < 2]
    groups = [{"params": others}, {"params": decayed, "weight_decay": 0.1}]
    groups.append({"params": [model.last.weight], "weight_decay": 0.2, "lr": 0.3})
    return torch.optim.SGD(groups, lr=0.1, momentum=0.5)


LINEAR = {
    "plain": sgd(),
    "decay": sgd(weight_decay=0.1),
    "momentum": sgd(momentum=0.9, weight_decay=0.1),
    "dampened": sgd(momentum=0.9, dampening=0.5, weight_decay=0.1),
    "nesterov": sgd(momentum=0.9, nesterov=True, weight_decay=0.1),
    "nesterov, one tensor at a time": sgd(momentum=0.9, nesterov=True, foreach=False),
    "fused": sgd(momentum=0.9, weight_decay=0.1, fused=True),
    "groups": with_groups,
    "step in a tensor": sgd(lr=torch.tensor(0.1, dtype=torch.float64), weight_decay=0.1, foreach=False),
}


def norm_of_sum(weight):
    return float(weight.detach().sum(0).norm())


def hooks_of(trainer):
    return sum(len(o._optimizer_step_pre_hooks) + len(o._optimizer_step_post_hooks) for o in trainer.optimizers)


def loss_of(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def said(caplog):
    return [record.getMessage() for record in caplog.records if "no exact law" in record.getMessage()]


def adaptive(kind):
    return lambda model: kind(model.parameters(), lr=0.05, weight_decay=0.2)


def repeated(count):
    """All samples in each batch, which is faster than as many epochs."""
    return DataLoader(data().dataset, batch_sampler=[list(range(50))] * count)


def check_law(rows, trainer, names=("nc0", "bias_sum")):
    """Each reading is that of the law, to the rounding of some tens of steps."""
    size = math.sqrt(K) * float(trainer.model.last.weight.detach().norm())
    norms = {"nc0": "laws/nc0_norm", "bias_sum": "laws/bias_sum"}
    assert len(rows) > 5
    for row in rows:
        for name in names:
            assert row[f"laws/{name}_residual"] < 1e-13, name
            assert abs(row[norms[name]] - row[f"laws/{name}_predicted"]) < 1e-12 * max(size, 1), name


@pytest.mark.parametrize("every_n_steps", [1, 4])
@pytest.mark.parametrize("make", LINEAR.values(), ids=LINEAR)
def test_steps_that_are_linear_follow_the_law(make, every_n_steps, tmp_path):
    model = made(make, schedule=True)
    rows, trainer = fit(tmp_path, OptimizerLaws(every_n_steps=every_n_steps), model)
    check_law(rows, trainer)
    assert rows[-1]["laws/nc0_norm"] == pytest.approx(norm_of_sum(model.last.weight), rel=1e-12)
    assert rows[-1]["laws/bias_sum"] == pytest.approx(norm_of_sum(model.last.bias[:, None]), rel=1e-12, abs=1e-15)


class Transposed(nn.Module):
    """A weight (d, K)."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(D, K)), nn.Parameter(torch.randn(K))

    def forward(self, x):
        return x @ self.weight + self.bias


class Pointwise(nn.Conv1d):
    def forward(self, x):
        return super().forward(x[..., None])[..., 0]


@pytest.mark.parametrize("head", [Transposed, lambda: Pointwise(D, K, 1), lambda: nn.Linear(D, K, bias=False)])
def test_forms_of_heads(head, tmp_path):
    torch.manual_seed(0)
    model = made(LINEAR["momentum"], head=head())
    rows, trainer = fit(tmp_path, OptimizerLaws(every_n_steps=2, head="last"), model)
    check_law(rows, trainer, ("nc0",) if model.last.bias is None else ("nc0", "bias_sum"))


TRAINERS = {
    "clipped by norm": {"gradient_clip_val": 1e-2},
    "accumulated": {"accumulate_grad_batches": 3},
    "short epochs": {"limit_train_batches": 3},
}


@pytest.mark.parametrize("options", TRAINERS.values(), ids=TRAINERS)
def test_trainers_that_leave_the_law_as_it_is(options, tmp_path):
    check_law(*fit(tmp_path, OptimizerLaws(every_n_steps=2), made(LINEAR["momentum"]), **options))


@pytest.mark.parametrize(
    ("precision", "most"),
    [
        ("32-true", 1e-6),
        ("bf16-mixed", 1e-2),  # Gradients are rounded to eight bits before they are summed.
        ("bf16-true", 0.1),  # So are the weights.
    ],
)
def test_lower_precision_shows_its_rounding(precision, most, tmp_path):
    model = made(LINEAR["momentum"]).float()
    x, y = data().dataset.tensors
    loader = DataLoader(TensorDataset(x.float(), y), batch_size=8)
    rows, _ = fit(tmp_path, OptimizerLaws(every_n_steps=2), model, loader, precision=precision)
    assert most / 1e5 < max(row["laws/nc0_residual"] for row in rows) < most


class Manual(Net):
    """Manual optimization: two optimizers, of which one is not stepped with each batch."""

    def __init__(self, *args):
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        body, head = self.optimizers()
        body.zero_grad()
        head.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        body.step()
        if batch_idx % 2:
            self.clip_gradients(head, 0.1, "norm")
            head.step()

    def configure_optimizers(self):
        return [torch.optim.Adam(self.body.parameters()), torch.optim.SGD(self.last.parameters(), 0.1, 0.9, 0, 0.1)]


def test_manual_optimization(tmp_path):
    torch.manual_seed(0)
    rows, trainer = fit(tmp_path, OptimizerLaws(every_n_steps=2), Manual(None), max_epochs=3)
    check_law(rows, trainer)
    assert rows[-1]["laws/nc0_norm"] != rows[0]["laws/nc0_norm"]


class InTurns(Net):
    """Manual optimization in which every other step has no gradient of the head."""

    def __init__(self, *args):
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        logits = self(batch[0])
        loss = F.cross_entropy(logits, batch[1]) if batch_idx % 2 else self.body(batch[0]).square().mean()
        self.manual_backward(loss)
        optimizer.step()


def test_steps_without_a_gradient_of_the_head(tmp_path):
    torch.manual_seed(0)
    check_law(*fit(tmp_path, OptimizerLaws(every_n_steps=3), InTurns(LINEAR["momentum"])))


def test_a_penalty_in_the_loss(tmp_path):
    def run(penalty, **options):
        model = made(sgd(weight_decay=0.05), penalty=0.2)
        return fit(tmp_path, OptimizerLaws(every_n_steps=2, penalty=penalty), model, **options)

    check_law(*run(0.2))
    rows, _ = run(0.1)
    assert rows[-1]["laws/nc0_residual"] > 1e-4


def test_a_line_search(tmp_path):
    model = made(lambda net: ArmijoGD(net.parameters()), penalty=0.1, dropout=0.0)
    rows, trainer = fit(
        tmp_path, OptimizerLaws(every_n_steps=1, penalty=0.1), model, data(batch_size=50, shuffle=False), max_epochs=30
    )
    check_law(rows, trainer)
    assert rows[-1]["laws/nc0_norm"] < 0.1 * rows[0]["laws/nc0_norm"]


def test_an_optimizer_of_your_own(tmp_path):
    class SGDW(torch.optim.SGD):
        """Decoupled decay."""

        def step(self, closure=None):
            value = closure()
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.mul_(1 - 0.1 * 0.3)
            super().step()
            return value

    torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1)  # From the first one on, torch calls hooks in its step.

    def law(optimizer, group):
        return GradientStep(group["lr"], group["momentum"], decoupled_decay=0.3)

    model = made(lambda net: SGDW(net.parameters(), lr=0.1, momentum=0.9))
    check_law(*fit(tmp_path, OptimizerLaws(every_n_steps=2, step_fn=law), model))


def test_a_step_fn_that_returns_something_else_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"must return a .*GradientStep, it returned a float"):
        fit(tmp_path, OptimizerLaws(step_fn=lambda optimizer, group: group["lr"]), made(sgd()))


class OwnSGD(torch.optim.Optimizer):
    """Heavy ball that keeps its momentum under a name of its own."""

    def __init__(self, params, name):
        super().__init__(params, {"lr": 0.1, "momentum": 0.9})
        self.name = name

    def step(self, closure=None):
        value = closure()
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                buffer = self.state[p].setdefault(self.name, torch.zeros_like(p)).mul_(0.9).add_(p.grad)
                p.mul_(1 - 0.1 * 0.3).sub_(buffer, alpha=0.1)
        return value


def test_step_fn_reads_what_a_step_left(tmp_path):
    def law(optimizer, group):
        assert optimizer.state[group["params"][0]]
        return GradientStep(group["lr"], group["momentum"], decoupled_decay=0.3)

    model = made(lambda net: OwnSGD(net.parameters(), "momentum_buffer"))
    check_law(*fit(tmp_path, OptimizerLaws(every_n_steps=2, step_fn=law), model))
    with pytest.raises(UserError, match="has no state 'momentum_buffer' of the head"):
        fit(tmp_path, OptimizerLaws(step_fn=law), made(lambda net: OwnSGD(net.parameters(), "velocity")))


def test_momentum_that_is_left_out_for_some_steps(tmp_path):
    class Pause(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            trainer.optimizers[0].param_groups[0]["momentum"] = 0.0 if trainer.global_step % 5 in (2, 3) else 0.9

    model = made(sgd(momentum=0.9, weight_decay=0.1))
    check_law(*fit(tmp_path, OptimizerLaws(every_n_steps=1), model, callbacks=[Pause()]))
    check_law(*fit(tmp_path, OptimizerLaws(every_n_steps=7), model, callbacks=[Pause()]))
