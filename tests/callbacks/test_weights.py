"""Features, head and class means of a measurement are of the same weights, whoever changes them and when."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from torch import nn

from nclightning.callbacks import NeuralCollapseMonitor
from nclightning.functional import class_statistics
from nclightning.metrics import NearestClassCentre
from tests.callbacks.attached import K, Net, fit, loader, measure, metrics, read
from tests.trainers import quiet_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but"),
    pytest.mark.filterwarnings("ignore:Swapping scheduler"),
]
MEASURES = ("nc1", "nc2", "nc3", "accuracy", "ncc_accuracy", "ncc_mismatch")


def whole(samples):
    return loader(samples, shuffle=False, drop_last=False)


def expected_of(model, train, samples):
    """All measures of a data set at a model's weights, with the class means of the training set."""
    training = model.training
    values = measure(model, samples)
    with torch.no_grad():
        decisions = NearestClassCentre(class_statistics(model.body(train[0]), train[1], K), model.last)
        decisions.update(model.body(samples[0]), samples[1])
    model.train(training)
    return values | {name: float(decisions.compute()[name]) for name in MEASURES[3:]}


class Watch(L.Callback):
    """Measures where validation runs, by the weights that its steps see."""

    def __init__(self, train, samples):
        self.train, self.samples, self.expected = train, samples, []

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 0:
            self.expected.append(expected_of(pl_module, self.train, self.samples))


def no_batch_norm():
    torch.manual_seed(1)
    model = Net()
    model.body[1] = nn.Identity()  # Batch norm is updated by averaging callbacks in a pass of its own.
    return model


@pytest.mark.parametrize("first", [True, False], ids=["monitor first", "monitor last"])
@pytest.mark.parametrize(
    "averaging",
    [
        lambda: EMAWeightAveraging(decay=0.9),
        lambda: StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1, annealing_epochs=1),
    ],
    ids=["ema", "swa"],
)
def test_validation_on_averaged_weights(averaging, first, samples, tmp_path):
    half = tuple(part[:25] for part in samples)
    monitor, watch = NeuralCollapseMonitor(measures=MEASURES), Watch(samples, half)
    callbacks = [monitor, averaging(), watch] if first else [averaging(), monitor, watch]
    values = []

    class Collect(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            values.append(metrics(trainer, "nc/val/"))

    data = loader(samples), whole(half)
    fit(tmp_path, [*callbacks, Collect()], data, no_batch_norm(), num_sanity_val_steps=0)
    assert len(values) == 3
    for got, expected in zip(values, watch.expected, strict=True):
        assert got == pytest.approx(expected, rel=1e-5)


class SwapsInside(Net):
    """Runs each validation step with other weights, as ``with ema.average_parameters():`` does."""

    def __init__(self):
        super().__init__()
        self.body[1] = nn.Identity()

    def validation_step(self, batch, batch_idx):
        kept = [p.data.clone() for p in self.parameters()]
        for p in self.parameters():
            p.data.mul_(-0.5).add_(0.1)
        self.inside = {name: value.clone() for name, value in self.state_dict().items()}
        self.step(batch)
        for p, value in zip(self.parameters(), kept, strict=True):
            p.data.copy_(value)


def test_weights_swapped_inside_a_step(samples, tmp_path):
    data = loader(samples), whole(samples)
    model, trainer = fit(tmp_path, [NeuralCollapseMonitor()], data, SwapsInside())
    got, outside = read(trainer, "val"), measure(model, samples)
    model.load_state_dict(model.inside)
    assert got == pytest.approx(measure(model, samples), rel=1e-5)
    assert got != pytest.approx(outside, rel=1e-2)


def test_class_means_of_weights_swapped_inside_a_step_are_refused(samples, tmp_path):
    data = loader(samples), whole(samples)
    with pytest.raises(ValueError, match="the step itself swaps weights: swap them in on_validation_epoch_start"):
        fit(tmp_path, [NeuralCollapseMonitor(measures=MEASURES)], data, SwapsInside())


WRITES = {
    "data": lambda p: p.data.copy_(torch.randn_like(p) / 3),
    "set_": lambda p: p.data.set_(torch.randn_like(p) / 3),
    "new data": lambda p: setattr(p, "data", torch.randn_like(p) / 3),
    "numpy": lambda p: p.detach().numpy().__imul__(-1.5),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_weights_written_after_the_fit(write, samples, tmp_path):
    monitor = NeuralCollapseMonitor(measures=MEASURES)
    model, trainer = fit(tmp_path, [monitor], (loader(samples), whole(samples)), no_batch_norm())
    for p in model.parameters():
        write(p)
    half = tuple(part[:25] for part in samples)
    trainer.validate(model, whole(half), verbose=False)
    assert metrics(trainer, "nc/val/") == pytest.approx(expected_of(model, samples, half), rel=1e-5)


@pytest.mark.parametrize("name", ["same name", "another name"])
@pytest.mark.parametrize("stage", ["train", "val"])
def test_a_head_that_is_replaced_on_the_way(stage, name, samples, tmp_path):
    class Replaces(Net):
        """Gets a new head in each epoch; under another name the old one stays where it was."""

        def on_train_epoch_start(self):
            self.new = nn.Linear(8, K)
            if name == "same name":
                self.last = self.new

        def forward(self, x):
            h = self.body(x)
            if self.last is not self.new:
                self.last(h)
            return self.new(h)

    model, trainer = fit(
        tmp_path, [NeuralCollapseMonitor()], (loader(samples), whole(samples)), Replaces(), num_sanity_val_steps=0
    )
    model.last = model.new
    assert read(trainer, stage) == pytest.approx(measure(model, samples), rel=1e-5)


def test_a_whole_part_that_is_replaced_between_validations(samples, tmp_path):
    monitor = NeuralCollapseMonitor(measures=MEASURES)
    model, trainer = fit(tmp_path, [monitor], (loader(samples), whole(samples)), no_batch_norm())
    other = no_batch_norm()
    model.body, model.last = other.body, other.last
    trainer.validate(model, whole(samples), verbose=False)
    assert metrics(trainer, "nc/val/") == pytest.approx(expected_of(model, samples, samples), rel=1e-5)


def test_hooks_are_gone(samples, tmp_path):
    for model in (Net(), SwapsInside()):
        fit(tmp_path, [NeuralCollapseMonitor()], (loader(samples), whole(samples)), model)
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_validation_without_a_fit(samples, tmp_path):
    model = no_batch_norm()
    trainer = quiet_trainer(tmp_path, callbacks=[NeuralCollapseMonitor()])
    trainer.validate(model, whole(samples), verbose=False)
    assert read(trainer, "val") == pytest.approx(measure(model, samples), rel=1e-5)
