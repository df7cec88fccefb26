"""Compiled models: right values in every stage, and what they log themselves stays as it is."""

import lightning as L
import pytest
import torch
from torch import nn

from nclightning.callbacks import NeuralCollapseMonitor
from tests.callbacks.attached import K, Net, fit, loader, measure, read
from tests.trainers import quiet_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec"),
]


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5))
        self.last = nn.Linear(8, K)

    def forward(self, x):
        return self.last(self.body(x))


class Model(Net):
    """Holds all of its layers in one part, and logs its losses."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.net = Inner()
        del self.body, self.last, self.auxiliary

    def forward(self, x):
        return self.net(x)

    def step(self, batch):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        return self.step(batch)

    test_step = validation_step

    # Not in the steps: the compiler cannot take Lightning's log.
    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.log("loss_of_train", outputs["loss"])

    def on_validation_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
        self.log("loss_of_val", outputs)


def whole(options):
    return lambda: torch.compile(Model(), **options)


def method(options):
    def make():
        model = Model()
        model.compile(**options)
        return model

    return make


def part(options):
    def make():
        model = Model()
        model.net = torch.compile(model.net, **options)
        return model

    return make


def part_by_method(options):
    def make():
        model = Model()
        model.net.compile(**options)
        return model

    return make


def function(options):
    def make():
        model = Model()
        model.net.forward = torch.compile(model.net.forward, **options)
        return model

    return make


def body_only(options):
    def make():
        model = Model()
        model.net.body = torch.compile(model.net.body, **options)
        return model

    return make


WAYS = [whole, method, part, part_by_method, function, body_only]


def inner_of(model):
    model = getattr(model, "_orig_mod", model)
    net = getattr(model.net, "_orig_mod", model.net)
    net.eval()
    return net


def data_of(samples):
    return loader(samples), loader(tuple(p[:30] for p in samples), shuffle=False, batch_size=10)


@pytest.fixture(autouse=True)
def _anew():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# Where the compiler sits is nothing that it knows, so that the second backend has the two ends of what it may be given.
@pytest.mark.parametrize(
    ("way", "backend"), [*((way, "eager") for way in WAYS), (whole, "aot_eager"), (part, "aot_eager")]
)
def test_every_stage_of_a_compiled_model_is_read(way, backend, samples, tmp_path):
    """Validation after two epochs of it, and a test."""
    make, seen = way({"backend": backend}), []
    half = tuple(p[:30] for p in samples)

    class Collect(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                expected = measure(inner_of(pl_module), half)
                seen.append((read(trainer, "val"), expected))

    model, trainer = fit(tmp_path, [NeuralCollapseMonitor(), Collect()], data_of(samples), make(), max_epochs=2)
    assert len(seen) == 2
    for got, expected in seen:
        assert got == pytest.approx(expected, rel=1e-5)
    assert read(trainer) == pytest.approx(measure(inner_of(model), samples), rel=1e-5)
    trainer.test(model, data_of(samples)[1], verbose=False)
    assert read(trainer, "test") == pytest.approx(measure(inner_of(model), half), rel=1e-5)


@pytest.mark.parametrize("way", [whole, part])
def test_decisions_and_layers_of_a_compiled_model(way, samples, tmp_path):
    measures = ("nc1", "accuracy", "ncc_accuracy")
    runs = []
    for make in (Model, way({"backend": "eager"})):
        model = make()
        net = "net._orig_mod" if way is part and make is not Model else "net"
        monitor = NeuralCollapseMonitor(measures=measures, layers=(f"{net}.body.0",))
        _, trainer = fit(tmp_path, [monitor], data_of(samples), model, max_epochs=2)
        runs.append({k.replace("._orig_mod", ""): float(v) for k, v in trainer.callback_metrics.items()})
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)


def test_a_compiled_model_trains_and_logs_as_without_a_monitor(samples, tmp_path):
    runs = []
    for callbacks in ([], [NeuralCollapseMonitor(measures=("all",))]):
        torch.compiler.reset()
        model, trainer = fit(tmp_path, callbacks, data_of(samples), whole({"backend": "aot_eager"})(), max_epochs=2)
        own = {k: v for k, v in trainer.callback_metrics.items() if not k.startswith("nc/")}
        runs.append((own, inner_of(model).state_dict()))
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in inner_of(model).modules())
    for bare, with_monitor in zip(*runs, strict=True):
        assert all(torch.equal(value, with_monitor[name]) for name, value in bare.items())


def test_online_measurements_of_a_compiled_model_are_refused(samples, tmp_path):
    monitor = NeuralCollapseMonitor(source="online", stages=("train",))
    with pytest.raises(ValueError, match="need the features of training's own forwards"):
        fit(tmp_path, [monitor], loader(samples), whole({"backend": "eager"})())


def test_a_validation_of_its_own_compiles_nothing_with_hooks(samples, tmp_path):
    model = whole({"backend": "eager"})()
    trainer = quiet_trainer(tmp_path, callbacks=[NeuralCollapseMonitor()])
    data = data_of(samples)[1]
    for _ in range(2):
        trainer.validate(model, data, verbose=False)
        expected = measure(inner_of(model), tuple(p[:30] for p in samples))
        assert read(trainer, "val") == pytest.approx(expected, rel=1e-5)
        with torch.no_grad():
            inner_of(model).body[0].weight.mul_(-1)


@pytest.mark.slow
def test_a_model_compiled_by_the_default_compiler(samples, tmp_path):
    model, trainer = fit(tmp_path, [NeuralCollapseMonitor()], data_of(samples), whole({})(), max_epochs=2)
    assert read(trainer) == pytest.approx(measure(inner_of(model), samples), rel=1e-5)
    expected = measure(inner_of(model), tuple(p[:30] for p in samples))
    assert read(trainer, "val") == pytest.approx(expected, rel=1e-5)
