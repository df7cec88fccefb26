"""The first forwards of a module: the head is found, and training is as without a monitor."""

import re

import pytest
import torch
from torch import nn

from nclightning.callbacks import NeuralCollapseMonitor, OptimalityMonitor
from nclightning.probe.nesting import measurements
from tests.callbacks.attached import K, N, Net, TwoOptimizers, fit, hooks_of, loader, metrics
from tests.callbacks.stateful import CASES
from tests.trainers import quiet_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training"),
    pytest.mark.filterwarnings("ignore:Lazy modules are a new feature"),
    pytest.mark.filterwarnings("ignore:The total number of parameters detected may be inaccurate"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


def counting(kind, path):
    """Count forwards in a file, which no measurement puts back."""

    class Counting(kind):
        def forward(self, *args):
            with path.open("a") as file:
                file.write("m" if measurements() else "o")
            return super().forward(*args)

    return Counting()


class Inner(Net):
    """Its step does not call the module itself."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(self.body, self.last)

    def forward(self, x):
        return self.net(x)

    def step(self, batch):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


class Lbfgs(Net):
    """Several forwards in a step."""

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), max_iter=3)


class Mixed(Net):
    """Adds a loss of other inputs, by a second forward."""

    def step(self, batch):
        return super().step(batch) + self(batch[0].flip(0) * 0.5).square().mean()


class TrainsOtherwise(Net):
    """Returns more in training mode."""

    def forward(self, x):
        h = self.body(x)
        return (self.last(h), self.auxiliary(h)) if self.training else self.last(h)

    def step(self, batch):
        out = self(batch[0])
        return nn.functional.cross_entropy(out[0] if self.training else out, batch[1])


def made(kind):
    torch.manual_seed(0)
    return kind()


def traces(model, trainer):
    states = [value for state in trainer.optimizers[0].state_dict()["state"].values() for value in state.values()]
    tensors = [*model.state_dict().values(), *(value for value in states if isinstance(value, torch.Tensor))]
    return [tensor.tolist() for tensor in tensors], torch.get_rng_state().tolist()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize("kind", [Net, Inner, Lbfgs, TwoOptimizers, Mixed, TrainsOtherwise])
@pytest.mark.parametrize("source", ["online", "sweep"])
def test_training_is_the_same(kind, accumulated, precision, source, samples, tmp_path):
    if (accumulated > 1 and kind is TwoOptimizers) or (precision != "32-true" and kind is Lbfgs):
        pytest.skip("Lightning has no such training")
    options = {"accumulate_grad_batches": accumulated, "precision": precision, "max_epochs": 1}
    options |= {"limit_train_batches": 4}
    more = {"every_n_steps": 1} if source == "sweep" else {}
    bare = traces(*fit(tmp_path, [], loader(samples), made(kind), **options))
    model, trainer = fit(
        tmp_path, [NeuralCollapseMonitor(source=source, **more)], loader(samples), made(kind), **options
    )
    assert traces(model, trainer) == bare
    assert hooks_of(model) == 0
    assert trainer.callback_metrics["nc/train/nc1"].isfinite()


@pytest.mark.parametrize("kind", [Net, TwoOptimizers, Lbfgs, Inner, TrainsOtherwise], ids=str)
def test_online_looks_at_the_model_before_training_and_at_the_end_only(kind, samples, tmp_path):
    path = tmp_path / "forwards"
    fit(tmp_path, [NeuralCollapseMonitor(source="online")], loader(samples), counting(kind, path), max_epochs=1)
    assert re.fullmatch("m{2,4}o*m", path.read_text())


def test_the_first_batch_is_among_those_that_are_read(samples, tmp_path):
    """All batches in one: the reading is of its features and the head after its step."""

    class Keeps(Net):
        def __init__(self):
            super().__init__()
            self.body[3].p = 0.0

    def read(epochs, **options):
        _, trainer = fit(
            tmp_path, [NeuralCollapseMonitor(source="online", **options)],
            loader(samples, batch_size=N, shuffle=False), made(Keeps), max_epochs=epochs,
        )  # fmt: skip
        return metrics(trainer)

    assert read(1) == read(1, head="last") == read(1, forward_fn=lambda module, x: module(x))


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_a_head_that_is_not_seen_is_refused_after_the_first_step(on_error, samples, tmp_path):
    class Squares(Net):
        def forward(self, x):
            return super().forward(x).square()

    monitor = NeuralCollapseMonitor(source="online", on_error=on_error)
    if on_error == "raise":
        model = Squares()
        with pytest.raises(ValueError, match="no layer of Squares was seen to be the head"):
            fit(tmp_path, [monitor], loader(samples), model, max_epochs=1)
    else:
        with pytest.warns(UserWarning, match="no layer of Squares was seen to be the head"):
            model, _ = fit(tmp_path, [monitor], loader(samples), Squares(), max_epochs=1)
    assert hooks_of(model) == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [("a lazy head", "has lazy layers without weights"), ("a head that a forward makes", "was seen to be the head")],
)
def test_models_without_weights_are_refused_before_training(name, message, tmp_path):
    x, y = torch.randn(12, 4), torch.arange(12) % K
    trainer = quiet_trainer(tmp_path, callbacks=[NeuralCollapseMonitor()])
    with pytest.raises(ValueError, match=message):
        trainer.validate(CASES[name](), loader((x, y), shuffle=False), verbose=False)


def test_the_other_monitor_waits_for_lazy_layers(tmp_path):
    x, y = torch.randn(12, 4), torch.arange(12) % K
    states = []
    for callbacks in ([], [OptimalityMonitor(loss="ce")]):
        model, trainer = fit(
            tmp_path, callbacks, loader((x, y), batch_size=4), made(CASES["a lazy head"]), max_epochs=2
        )
        states.append(traces(model, trainer))
    assert states[0] == states[1]
    assert "optimality/gap" in trainer.callback_metrics
