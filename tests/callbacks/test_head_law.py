"""Where the sum of the rows of a head follows no law, that is seen or said."""

import logging
import math

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import nn
from torch.nn import functional as F

from nclightning.callbacks import OptimizerLaws
from nclightning.errors import UserError
from tests.callbacks.law_runs import D, K, Net, adaptive, fit, hooks_of, made, norm_of_sum, repeated, said, sgd

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


def test_other_losses_and_writes_are_seen(tmp_path):
    class Write(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            with torch.no_grad():
                pl_module.last.weight[0] += 1e-3

    binary = made(sgd(), loss=lambda z, y: F.binary_cross_entropy_with_logits(z, F.one_hot(y, K).double()))
    rows, _ = fit(tmp_path, OptimizerLaws(every_n_steps=1), binary)
    assert min(row["laws/nc0_residual"] for row in rows) > 1e-5
    rows, _ = fit(tmp_path, OptimizerLaws(every_n_steps=2), made(sgd()), callbacks=[Write()])
    assert rows[-1]["laws/nc0_residual"] > 1e-5


@pytest.mark.parametrize(("kind", "vanishes"), [(torch.optim.Adam, True), (torch.optim.AdamW, False)])
def test_decoupled_decay_leaves_nc0_and_coupled_decay_takes_it(kind, vanishes, tmp_path, caplog):
    model = made(adaptive(kind), dropout=0.0, schedule=800)
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        rows, _ = fit(tmp_path, OptimizerLaws(every_n_steps=100), model, repeated(800), max_epochs=1)
    size = math.sqrt(K) * float(model.last.weight.detach().norm())
    assert (rows[-1]["laws/nc0_norm"] < 1e-4 * size) is vanishes
    assert (rows[-1]["laws/nc0_norm"] > 1e-2 * size) is not vanishes
    assert "laws/nc0_residual" not in rows[-1]
    (sentence,) = said(caplog)
    assert f"{kind.__name__} divides each entry" in sentence


@pytest.mark.parametrize("every", [1, 3])
def test_forcing_is_what_steps_add(every, tmp_path):
    model, sums = made(adaptive(torch.optim.AdamW), schedule=True), []

    class Sums(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            sums.append((trainer.optimizers[0].param_groups[0]["lr"], pl_module.last.weight.detach().sum(0)))

    rows, _ = fit(tmp_path, OptimizerLaws(every_n_steps=every), model, callbacks=[Sums()])
    for start in range(0, len(sums) - every, every):
        rates, decayed, length = [rate for rate, _ in sums[start : start + every]], sums[start][1], 0.0
        for rate in rates:
            decayed, length = (1 - rate * 0.2) * decayed, (1 - rate * 0.2) * length + rate
        expected = float((decayed - sums[start + every][1]).norm()) / length
        assert rows[start + every - 1]["laws/nc0_forcing"] == pytest.approx(expected, rel=1e-10)


class Cosine(nn.Linear):
    def forward(self, x):
        return F.linear(F.normalize(x), F.normalize(self.weight))


class Tied(Net):
    """The head is also used to embed labels."""

    def __init__(self, *args):
        super().__init__(*args)
        self.other = nn.Linear(D, K).double()
        self.other.weight = self.last.weight


def frozen(*args):
    model = made(*args)
    model.last.requires_grad_(False)
    return model


def left_out(model):
    return torch.optim.SGD(model.body.parameters(), lr=0.1)


WITHOUT = {
    "cosine": (lambda: made(sgd(), head=Cosine(D, K, bias=False)), {"head": "last"}, {}, "cosine head"),
    "frozen": (lambda: frozen(sgd()), {}, {}, "not trained"),
    "not in the optimizer": (lambda: made(left_out), {}, {}, "not trained"),
    "weight norm": (
        lambda: made(sgd(), head=nn.utils.parametrizations.weight_norm(nn.Linear(D, K))),
        {},
        {},
        "made of other parameters",
    ),
    "a function": (
        lambda: made(sgd()),
        {"head": lambda model: (model.last.weight, model.last.bias)},
        {},
        "made of other parameters",
    ),
    "tied": (lambda: Tied(sgd()), {}, {}, "another layer"),
    "clipped by value": (
        lambda: made(sgd()),
        {},
        {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
        "entry by entry",
    ),
    "a penalty and clipping": (lambda: made(sgd()), {"penalty": 0.1}, {"gradient_clip_val": 1.0}, "rescale"),
    "a penalty and accumulation": (lambda: made(sgd()), {"penalty": 0.1}, {"accumulate_grad_batches": 2}, "rescale"),
    "a penalty and accumulation from a callback": (
        lambda: made(sgd()),
        {"penalty": 0.1},
        {"callbacks": [GradientAccumulationScheduler({0: 1, 1: 2})]},
        "rescale",
    ),
    "unknown": (
        lambda: made(lambda model: torch.optim.RMSprop(model.parameters())),
        {},
        {},
        "steps of RMSprop are not known",
    ),
}


@pytest.mark.filterwarnings("ignore:'last' is a cosine head")
@pytest.mark.parametrize(("make", "arguments", "options", "why"), WITHOUT.values(), ids=WITHOUT)
def test_without_a_law_the_norm_is_read_and_that_said_once(make, arguments, options, why, tmp_path, caplog):
    model = make()
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        rows, trainer = fit(tmp_path, OptimizerLaws(every_n_steps=1, **arguments), model, max_epochs=2, **options)
    (sentence,) = said(caplog)
    assert why in sentence
    assert not {"laws/nc0_predicted", "laws/nc0_residual", "laws/nc0_forcing"} & rows[-1].keys()
    weight = F.normalize(model.last.weight) if why == "cosine head" else model.last.weight
    assert rows[-1]["laws/nc0_norm"] == pytest.approx(norm_of_sum(weight), rel=1e-12)
    assert hooks_of(trainer) == 0


def test_a_head_that_is_replaced_within_a_fit_is_refused(tmp_path):
    class Replace(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                pl_module.last = nn.Linear(D, K).double()
                trainer.optimizers[0].add_param_group({"params": list(pl_module.last.parameters())})

    with pytest.raises(UserError, match="'last' is no layer of the module any more"):
        fit(tmp_path, OptimizerLaws(every_n_steps=1), made(sgd()), callbacks=[Replace()])
