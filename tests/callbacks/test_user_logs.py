"""A sweep leaves the user's own logs and metrics as they are."""

import csv

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassPrecision

from nclightning.callbacks import NeuralCollapseMonitor, OptimalityMonitor
from tests.callbacks.attached import K, Net, fit, loader

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


class Logs(Net):
    """Logs and measures in each forward, in all the ways there are."""

    def __init__(self):
        super().__init__()
        self.accuracy = MulticlassAccuracy(K)
        self.several = MetricCollection([MulticlassAccuracy(K), MulticlassPrecision(K)], prefix="several/")
        self.registered = MeanMetric()
        self.means, self.inner = [MeanMetric()], {"a": (MeanMetric(),)}

    def forward(self, x):
        h = self.body(x)
        self.auxiliary(h)
        z = self.last(h)
        self.log("mean", h.mean(), on_step=True, on_epoch=True)
        self.log_dict({"std": h.std(), "largest": h.max()}, on_step=False, on_epoch=True, reduce_fx="max")
        self.logger.experiment.log_metrics({"direct": float(h.detach().mean())}, self.global_step)
        self.several.update(z, torch.arange(len(z)) % K)
        for metric in (self.registered, self.means[0], self.inner["a"][0]):
            metric.update(h.mean().detach())
        return z

    def step(self, batch):
        x, y = batch
        z = self(x)
        if self.training:
            self.accuracy(z, y)
            self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        return nn.functional.cross_entropy(z, y)

    def on_train_epoch_end(self):
        self.log_dict(self.several.compute())
        self.log_dict({"list": self.means[0].compute(), "dict": self.inner["a"][0].compute()})
        self.log("registered", self.registered)
        self.log("updates", float(self.means[0].update_count))
        self.several.reset()


def run(folder, samples, callbacks):
    torch.manual_seed(0)
    logger = CSVLogger(folder)
    data = loader(samples), loader(samples, shuffle=False, drop_last=False)
    model, trainer = fit(folder, callbacks, data, Logs(), logger=logger, max_epochs=2, num_sanity_val_steps=0)
    logger.save()
    with open(logger.experiment.metrics_file_path) as file:
        rows = [
            {k: v for k, v in row.items() if v and not k.startswith(("nc/", "optimality/"))}
            for row in csv.DictReader(file)
        ]
    own = {k: v for k, v in trainer.callback_metrics.items() if not k.startswith(("nc/", "optimality/"))}
    return [row for row in rows if row.keys() - {"step", "epoch"}], own, trainer.loggers == [logger], model


@pytest.mark.parametrize(
    "make",
    [
        NeuralCollapseMonitor,
        lambda: NeuralCollapseMonitor(every_n_steps=2, measures=("all",), layers=("body.0",)),
        lambda: NeuralCollapseMonitor(source="online"),
        lambda: OptimalityMonitor(loss="ce"),
    ],
    ids=["sweep", "steps", "online", "gap"],
)
def test_rows_and_metrics_are_those_of_a_run_without_a_monitor(make, samples, tmp_path):
    data = samples[0][:48], torch.arange(48) % K
    bare, read = (run(tmp_path, data, callbacks) for callbacks in ([], [make()]))
    assert read[0] == bare[0]
    assert read[1].keys() == bare[1].keys()
    assert all(torch.equal(value, read[1][name]) for name, value in bare[1].items())
    assert read[2]
    assert not {"log", "log_dict"} & vars(read[3]).keys()
    assert float(bare[0][-1].get("updates", 0)) == float(read[0][-1].get("updates", 0))


def test_a_log_of_the_instance_comes_back(samples, tmp_path):
    """Also after an error."""
    model = Net()
    own = model.log = lambda *_, **__: None

    def fail(batch):
        raise RuntimeError("in the sweep")

    with pytest.raises(RuntimeError, match="in the sweep"):
        fit(tmp_path, [NeuralCollapseMonitor(batch_fn=fail)], loader(samples), model)
    assert model.log is own
    assert "log_dict" not in vars(model)
