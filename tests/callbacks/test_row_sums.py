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
from tests.callbacks.law_runs import LINEAR, D, K, Net, data, fit, made, norm_of_sum, sgd

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


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
