"""The sharpness of a run, against dense Hessians and runs at the edge of stability."""

import logging

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from nclightning.callbacks import OptimizerLaws
from nclightning.callbacks.sharpness import Sharpness
from nclightning.errors import UserError
from nclightning.functional import dense_hessian
from tests.callbacks.law_runs import LINEAR, K, Net, adaptive, data, fit, loss_of, made, repeated, sgd
from tests.helpers import Once

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


def whole(**options):
    return data(batch_size=50, shuffle=False, **options)


def sharp(**options):
    defaults = {"every_n_steps": 1, "sharpness_every_n_steps": 1, "data": data(), "loss_fn": loss_of}
    return OptimizerLaws(**(defaults | options))


def hessian_of(model, decay=0.0):
    """As the model trains: with the statistics of each batch."""
    batches = list(data(shuffle=False))
    count = sum(len(y) for _, y in batches)
    params = list(model.parameters())

    def value():
        parts = [loss_of(model, batch) * (len(batch[1]) / count) for batch in batches]
        return sum(parts) + decay / 2 * sum(p.square().sum() for p in params)

    return dense_hessian(value, params)


class Dense(L.Callback):
    """Keeps the model and its optimizer as they are after each batch."""

    def __init__(self):
        self.kept = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        state = {name: value.clone() for name, value in pl_module.state_dict().items()}
        optimizer = trainer.optimizers[0]
        self.kept.append((state, [dict(optimizer.state[p]) for p in pl_module.parameters()]))


def test_sharpness_is_the_largest_eigenvalue_as_the_model_trains(tmp_path):
    model, dense = made(sgd(weight_decay=0.05), dropout=0.0), Dense()
    rows, _ = fit(tmp_path, sharp(), model, max_epochs=2, callbacks=[dense])
    for i in (0, 5, 13):
        model.load_state_dict(dense.kept[i][0])
        largest = float(torch.linalg.eigvalsh(hessian_of(model, 0.05))[-1])
        assert rows[i]["laws/sharpness"] == pytest.approx(largest, rel=1e-3)
        assert rows[i]["laws/sharpness_over_limit"] == pytest.approx(largest * 0.1 / 2, rel=1e-3)


def test_adam_sees_the_curvature_through_its_preconditioner(tmp_path):
    model, dense = made(adaptive(torch.optim.AdamW), dropout=0.0), Dense()
    rows, _ = fit(tmp_path, sharp(), model, max_epochs=1, callbacks=[dense])
    state, moments = dense.kept[-1]
    model.load_state_dict(state)
    t = len(rows)
    roots = [(each["exp_avg_sq"] / (1 - 0.999**t)).sqrt().flatten() for each in moments]
    inverse = 1 / ((1 - 0.9**t) * (torch.cat(roots) + 1e-8))
    limit = 1.9 * (2 - 0.05 * 0.2) / (0.1 * 0.05)
    largest = float(torch.linalg.eigvals(inverse[:, None] * hessian_of(model)).real.max())
    assert rows[-1]["laws/sharpness_over_limit"] == pytest.approx(largest / limit, rel=1e-3)
    assert rows[-1]["laws/sharpness"] == pytest.approx(float(torch.linalg.eigvalsh(hessian_of(model))[-1]), rel=1e-3)


class Quadratic(L.LightningModule):
    """Half of c x^2 beside a head that stands still."""

    def __init__(self, make, curvature):
        super().__init__()
        self.last, self.x, self.c = nn.Linear(3, K).double(), nn.Parameter(torch.ones(1).double()), curvature
        self.last.requires_grad_(False)
        self.make = make

    def forward(self, x):
        return self.last(x)

    def training_step(self, batch, batch_idx):
        self(batch[0])
        return self.c / 2 * self.x.square().sum()

    def configure_optimizers(self):
        return self.make(self)


@pytest.mark.parametrize("name", ["plain", "decay", "momentum", "dampened", "nesterov"])
def test_a_ratio_of_one_parts_growth_from_decay(name, tmp_path):
    def run(curvature):
        model = Quadratic(LINEAR[name], curvature)
        laws = sharp(
            every_n_steps=1000, data=whole(), loss_fn=lambda model, batch: model.c / 2 * model.x.square().sum()
        )
        rows, _ = fit(tmp_path, laws, model, repeated(300), max_epochs=1)
        return rows[-1]["laws/sharpness_over_limit"], abs(model.x.item())

    ratio, _ = run(1.0)
    decay = 0.1 if name in ("decay", "momentum", "dampened", "nesterov") else 0.0
    curvature = (1 + decay) / ratio - decay
    for factor in (0.97, 1.03):
        ratio, end = run(factor * curvature)
        assert (ratio < 1) is (factor < 1)
        assert (end < 1) is (factor < 1)


def test_dropout_is_drawn_alike_at_each_reading(tmp_path):
    rows, _ = fit(tmp_path, sharp(), made(sgd(lr=0.0)), max_epochs=1)
    assert len({row["laws/sharpness"] for row in rows}) == 1


class Noisy(Dataset):
    """Draws noise from a generator of its own."""

    def __init__(self):
        self.samples, self.generator = data().dataset, torch.Generator().manual_seed(3)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        x, y = self.samples[i]
        return x + torch.randn(3, generator=self.generator).double(), y


def test_generators_of_the_data_are_put_back(tmp_path):
    ends = []
    for laws in (None, sharp):
        loader = DataLoader(Noisy(), batch_size=8)
        model = made(sgd())
        fit(tmp_path, None if laws is None else laws(data=loader), model, loader, max_epochs=2)
        ends.append(model.last.weight.detach())
    assert torch.equal(*ends)


def in_eval_mode(model, batch):
    model.eval()
    return loss_of(model, batch)


def mixed_up(model, batch):
    share = np.random.beta(1.0, 1.0)
    return share * loss_of(model, batch) + (1 - share) * loss_of(model, (batch[0], batch[1].flip(0)))


@pytest.mark.parametrize("loss", [in_eval_mode, mixed_up])
def test_what_the_loss_does_to_modes_and_random_states_is_undone(loss, tmp_path):
    class Mixing(Net):
        def training_step(self, batch, batch_idx):
            return mixed_up(self, batch)

    ends = []
    for laws in (None, sharp(loss_fn=loss)):
        np.random.seed(0)
        torch.manual_seed(0)
        model = Mixing(sgd())
        fit(tmp_path, laws, model, max_epochs=2)
        ends.append(list(model.state_dict().values()))
    assert all(map(torch.equal, *ends))


def test_the_cadence_of_its_own(tmp_path):
    read = []

    def loss(model, batch):
        read.append(model.trainer.global_step)
        return loss_of(model, batch)

    laws = OptimizerLaws(every_n_steps=2, sharpness_every_n_steps=6, data=whole(), loss_fn=loss)
    fit(tmp_path, laws, made(sgd()), max_epochs=2)
    assert read == [0, 6, 12]


def test_what_users_log_in_the_loss_stays_out(tmp_path):
    class Logging(Net):
        def forward(self, x):
            self.log("in_forward", x.mean(), on_step=True, batch_size=len(x))
            return super().forward(x)

    values = []
    for laws in (None, sharp()):
        torch.manual_seed(0)
        _, trainer = fit(tmp_path, laws, Logging(sgd()), max_epochs=2)
        values.append(float(trainer.callback_metrics["in_forward"]))
    assert values[0] == values[1]


def test_what_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(UserError, match="data, batches to take the loss on, and loss_fn"):
        fit(tmp_path, OptimizerLaws(sharpness_every_n_steps=1), made(sgd()))
    for loss in (lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none"), lambda *_: 1.0):
        with pytest.raises(UserError, match=r"loss_fn must return the mean loss .* got (shape \(8,\)|float)"):
            fit(tmp_path, sharp(loss_fn=loss), made(sgd()))
    with pytest.raises(UserError, match="a loss without a graph"):
        fit(tmp_path, sharp(loss_fn=lambda model, batch: loss_of(model, batch).detach()), made(sgd(weight_decay=0.1)))
    with pytest.raises(UserError, match="data has no batch"):
        fit(tmp_path, sharp(data=[]), made(sgd()))
    for data_once in (iter([]), 3):
        with pytest.raises(TypeError, match="can be read in each fit"):
            sharp(data=data_once)


def attention(model, batch):
    """Torch takes a fused kernel, of which it has no second derivative."""
    rows = model.body(batch[0]).reshape(1, 1, -1, 6)
    logits = model.last(F.scaled_dot_product_attention(rows, rows, rows)[0, 0])
    return F.cross_entropy(logits, batch[1])


def once(model, batch):
    return F.cross_entropy(Once.apply(model(batch[0])), batch[1])


@pytest.mark.parametrize("loss", [attention, once])
def test_a_loss_without_second_derivative_is_refused(loss, tmp_path):
    with pytest.raises(UserError, match="no second derivative"):
        fit(tmp_path, sharp(loss_fn=loss), made(sgd()))


def test_where_no_limit_is_known_sharpness_is_read_alone(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        rows, _ = fit(tmp_path, sharp(), made(lambda model: torch.optim.RMSprop(model.parameters())), max_epochs=1)
    (said,) = [record.getMessage() for record in caplog.records if "sharpness_over_limit" in record.getMessage()]
    assert "stable curvature of RMSprop is not known" in said
    assert rows[-1]["laws/sharpness"] > 0
    assert "laws/sharpness_over_limit" not in rows[-1]


def test_it_is_said_that_lanczos_has_not_converged(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(Sharpness.__init__, "__defaults__", (1e-12, 3))
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        fit(tmp_path, sharp(), made(sgd()), max_epochs=1)
    said = [record.getMessage() for record in caplog.records if "lower bound" in record.getMessage()]
    assert len(said) == 1
