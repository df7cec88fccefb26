"""A head that runs directly on the batch, as a linear probe on saved features does, is measured in every stage."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from nclightning import Probe
from nclightning.callbacks import NeuralCollapseMonitor
from tests.forms import oracle
from tests.trainers import quiet_trainer

K, D, N, B = 4, 6, 48, 8
X, Y = torch.randn(N, D, generator=torch.Generator().manual_seed(0)), torch.arange(N) % K


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(D, K)

    def forward(self, x):
        return self.fc(x)


class Flattens(Plain):
    def forward(self, x):
        return self.fc(x.flatten(1))


class ByKeyword(Plain):
    def forward(self, *, features, scale=None):
        return self.fc(input=features)


class Shifts(Plain):
    """A label belongs to the features one position before, as in causal language models."""

    def forward(self, features, labels=None):
        logits = self.fc(features)
        if labels is None:
            return {"logits": logits}
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


class Deep(nn.Module):
    """The layer named as the head is not the last one."""

    def __init__(self):
        super().__init__()
        self.body, self.out = nn.Sequential(nn.Linear(D, K), nn.Tanh()), nn.Linear(K, K)

    def forward(self, x):
        return self.out(self.body(x))


class Mappings(TensorDataset):
    def __getitem__(self, i):
        return dict(zip(("features", "labels"), super().__getitem__(i), strict=True))


ROWS, IMAGES = (X, Y), (X.reshape(N, 1, 2, 3), Y)
POSITIONS = X.reshape(N // 4, 4, D), Y[torch.randperm(N, generator=torch.Generator().manual_seed(1))].reshape(N // 4, 4)
CASES = {
    "layer": (Plain, TensorDataset(*ROWS), None),
    "sequential": (lambda: nn.Sequential(nn.Linear(D, K)), TensorDataset(*ROWS), None),
    "only": (lambda: nn.Linear(D, K), TensorDataset(*ROWS), None),
    "flattening layer": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(D, K)), TensorDataset(*IMAGES), None),
    "flattened": (Flattens, TensorDataset(*IMAGES), None),
    "keyword": (ByKeyword, Mappings(*ROWS), None),
    "positions": (Plain, TensorDataset(*POSITIONS), None),
    "shifted": (Shifts, Mappings(*POSITIONS), None),
    "another layer": (Deep, TensorDataset(*ROWS), "body.0"),
}


def run(model, batch):
    """As a loop runs it: the logits, and labels that go with them."""
    x, y = batch.values() if isinstance(batch, dict) else batch
    if isinstance(model, Shifts):
        return model(**batch)["logits"].flatten(0, 1), y.flatten()
    logits = model(features=x) if isinstance(batch, dict) else model(x)
    return logits.flatten(0, -2), y.flatten()


def right(case, model):
    """What the head on the inputs is by the book."""
    x, y = CASES[case][1].tensors
    if case == "shifted":
        x, y = x[:, :-1], y[:, 1:]
    head = next(layer for layer in model.modules() if isinstance(layer, nn.Linear))
    return oracle(x.reshape(-1, D), head.weight, y.flatten())


def loader(data):
    return DataLoader(data, batch_size=4)


class Stands(L.LightningModule):
    """Its weights stand still, so that the forwards of a whole epoch have one right answer."""

    def __init__(self, net):
        super().__init__()
        self.net, self.anchor = net.requires_grad_(False), nn.Parameter(torch.zeros(()))

    def forward(self, *args, **kwargs):
        return self.net(*args, **kwargs)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(*run(self.net, batch)) + 0 * self.anchor

    def validation_step(self, batch, batch_idx):
        run(self.net, batch)

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD([self.anchor], lr=0.1)


@pytest.mark.parametrize("source", ["sweep", "online"])
@pytest.mark.parametrize("case", CASES)
def test_monitor(case, source, tmp_path):
    make, data, head = CASES[case]
    model = Stands(make())
    monitor = NeuralCollapseMonitor(head=head and f"net.{head}", source=source)
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[monitor])
    trainer.fit(model, loader(data), loader(data))
    values = dict(trainer.callback_metrics)
    trainer.test(model, loader(data), verbose=False)
    values |= trainer.callback_metrics
    expected = right(case, model)
    assert set(expected) == {"nc1", "nc2", "nc3"}
    for stage in ("train", "val", "test"):
        got = {name: float(values[f"nc/{stage}/{name}"]) for name in expected}
        assert got == pytest.approx(expected, rel=1e-4), stage


@pytest.mark.parametrize("case", CASES)
def test_probe_online(case):
    make, data, head = CASES[case]
    model = make()
    probe = Probe(model, head=head)
    with probe.online() as epoch:
        for batch in epoch.batches(loader(data)):
            run(model, batch)
    assert dict(epoch.measurement) == pytest.approx(right(case, model), rel=1e-4)


@pytest.mark.parametrize("others", [(-1, 1), (1, -1), (-1, 1, 2)], ids=["before", "after", "both"])
def test_of_several_runs_that_on_the_batch_counts(others, tmp_path):
    class Several(Stands):
        def validation_step(self, batch, batch_idx):
            for factor in others:
                self.net(batch[0] if factor == 1 else factor * batch[0])

    model = Several(Plain())
    trainer = quiet_trainer(tmp_path, callbacks=[NeuralCollapseMonitor()])
    values = trainer.validate(model, loader(CASES["layer"][1]), verbose=False)[0]
    assert {tag.removeprefix("nc/val/"): value for tag, value in values.items()} == pytest.approx(
        right("layer", model), rel=1e-4
    )


def test_online_steps_on_something_else_are_refused(tmp_path):
    class Mixes(Stands):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0].flip(0)), batch[1]) + 0 * self.anchor

    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[NeuralCollapseMonitor(source="online")])
    with pytest.raises(ValueError, match=r"'online' and Probe\.online pair"):
        trainer.fit(Mixes(Plain()), *[loader(CASES["layer"][1])] * 2)
