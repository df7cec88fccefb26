"""``nclightning.Probe`` in loops as public repositories have them: their batches, samplers, models and ways to stop."""

import copy
import pickle
import random
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset

from nclightning import Probe, measure
from nclightning.probe.host import moved
from tests.probe.loops import EXACT, D, K, N, X, Y, loader, made, sgd, states, step

# Batches of a class of the user's own.


class Attributes(dict):
    __getattr__ = dict.__getitem__


class Pair(list):
    def __init__(self, x, y):
        super().__init__([x, y])


class Triple(tuple):
    __slots__ = ()

    def __new__(cls, x, y, z):
        return super().__new__(cls, (x, y, z))


@pytest.mark.parametrize(
    ("batch", "is_kept"),
    [
        (Attributes(image=X, label=Y, size=X.shape), True),
        (Pair(X, Y), True),
        (Triple(X, Y, "a name"), False),
        ({"image": [X, (Y, None)]}, True),
    ],
    ids=["mapping with attributes", "list", "tuple", "dictionary"],
)
def test_batches_keep_their_class(batch, is_kept):
    assert moved(batch, torch.device("cpu")) is batch
    there = moved(batch, torch.device("meta"))
    assert (type(there) is type(batch)) == is_kept
    assert isinstance(there, type(batch).__mro__[-2])
    first, own = (each["image"] if isinstance(each, dict) else each[0] for each in (there, batch))
    assert first[1][0].is_meta if isinstance(first, list) else first.is_meta
    assert own is X or own[0] is X


def test_the_loop_gets_its_own_batches():
    model = made()
    probe = Probe(model, batch_fn=lambda batch: (batch["image"], batch["label"]))
    data = DataLoader([*zip(X.double(), Y, strict=True)], 8, collate_fn=_with_attributes)
    with probe.online() as epoch:
        for batch in epoch.batches(data):
            step(model, sgd(model), batch.image, batch.label)
    assert epoch.measurement.num_samples == N
    assert probe.read(data) == measure(model, loader(shuffle=False))


def _with_attributes(samples):
    images, labels = zip(*samples, strict=True)
    return Attributes(image=torch.stack(images), label=torch.stack(labels))


# Steps that write to the batch.


class Centring(nn.Module):
    """It writes to its inputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.out = nn.Linear(5, D).double(), nn.Linear(D, K).double()

    def forward(self, x):
        return self.out(self.body(x.sub_(0.5)))


@pytest.mark.parametrize("copied", [False, True])
def test_samples_that_are_mixed_in_place_are_refused(copied):
    model = made()
    probe = Probe(model)

    def run():
        with probe.online() as epoch:
            for x, _ in epoch.batches(loader()):
                other = x.flip(0).mul_(0.3)  # As timm's Mixup does.
                x.mul_(0.7).add_(other)
                model(x.clone() if copied else x)

    before = states(model)[1]
    with pytest.raises(ValueError, match="on other inputs than those of the batch"):
        run()
    assert states(model)[1] == before


def test_a_model_may_write_to_its_inputs():
    model, seen = Centring(), []
    probe, data = Probe(model, measures=("nc1", "nc3", "accuracy")), [(X.double(), Y)]
    rows = model.body(X.double() - 0.5).detach()
    right = dict(
        measure(
            measures=("nc1", "nc3", "accuracy"), features=rows, labels=Y, weight=model.out.weight, bias=model.out.bias
        )
    )
    assert dict(probe.read(loader())) == pytest.approx(right, **EXACT)
    assert dict(probe.read(data)) == dict(probe.read(data)) == pytest.approx(right, **EXACT)
    assert torch.equal(data[0][0], X.double())
    with torch.inference_mode():
        assert dict(probe.read([(X.double(), Y)])) == pytest.approx(right, **EXACT)
    with Probe(model).online() as epoch:
        for x, _ in epoch.batches(loader(shuffle=False)):
            model(x)
            seen.append(x)
    assert dict(epoch.measurement)["nc1"] == pytest.approx(right["nc1"], **EXACT)
    assert torch.equal(torch.cat(seen), X.double() - 0.5)


# Language models that take their labels beside the tokens.


class Tokens(nn.Module):
    """As nanoGPT: logits of the last position alone, unless it is given labels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Sequential(nn.Embedding(K, D), nn.Linear(D, D)), nn.Linear(D, K, bias=False)
        self.body[0].weight = self.head.weight

    def forward(self, tokens, labels=None):
        features = self.body(tokens).cumsum(1)
        if labels is None:
            return self.head(features[:, [-1]]), None
        logits = self.head(features)
        return logits, F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def test_labels_may_go_into_a_language_model_beside_its_tokens():
    text, model = torch.randint(K, (40, 7), generator=torch.Generator().manual_seed(0)), Tokens()
    data = [(part[:, :-1], part[:, 1:]) for part in text.split(8)]
    options = {"batch_fn": lambda batch: (batch, batch[1]), "forward_fn": lambda model, inputs: model(*inputs)}
    probe = Probe(model, **options)
    features = model.body(text[:, :-1]).cumsum(1).detach()
    right = measure(features=features.flatten(0, 1), labels=text[:, 1:].flatten(), weight=model.head.weight)
    assert dict(probe.read(data)) == pytest.approx(dict(right), rel=1e-6)
    with probe.online() as epoch:
        for tokens, labels in epoch.batches(data):
            model(tokens, labels)[1].backward()
    assert dict(epoch.measurement) == pytest.approx(dict(right), rel=1e-6)
    with pytest.raises(ValueError, match="labels are the tokens of the input themselves"):
        Probe(model, **options | {"batch_fn": lambda batch: ((batch[0], batch[0]), batch[0])}).read(data)


# Ways to stop.


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_an_error_inside_of_a_forward_is_the_only_one(kind, monkeypatch):
    model, unseen = made(), []
    probe, before = Probe(model), states(model)[1]
    monkeypatch.setattr(sys, "unraisablehook", unseen.append)

    def run():
        with probe.online() as epoch:
            for i, (x, _) in enumerate(epoch.batches(loader())):
                if i == 1:
                    model.body.register_forward_hook(lambda *_: (_ for _ in ()).throw(kind))
                model(x)

    with pytest.raises(kind):
        run()
    assert not unseen
    model.body._forward_hooks.clear()
    assert states(model)[1] == before


def test_the_last_step_before_a_break_is_checked_too():
    model = made()
    probe = Probe(model)

    def run():
        with probe.online() as epoch:
            for i, (x, _) in enumerate(epoch.batches(loader())):
                if i == 1:
                    model(x.flip(0)[:3])
                    break
                model(x)

    with pytest.raises(ValueError, match="on other inputs than those of the batch"):
        run()


def test_copies_of_a_probe_made_in_a_block():
    model = made()
    probe, copies = Probe(model), []
    with probe.online() as epoch:
        for x, _ in epoch.batches(loader()):
            model(x)
            copies = [copy.deepcopy(probe), pickle.loads(pickle.dumps(probe))]
    assert epoch.measurement.num_samples == N
    for each in copies:
        with each.online() as other:
            for x, _ in other.batches(loader()):
                each._model.module(x)
        assert other.measurement.num_samples == N


# Data with a state of its own.


class Augmented(Dataset):
    """As albumentations: random generators that are not the global ones."""

    def __init__(self):
        self.transform, self.cache = [{"add": self.add}], {}
        self.numpy, self.python = np.random.default_rng(0), random.Random(0)
        self.torch = torch.Generator().manual_seed(0)

    def add(self, x):
        return x + self.numpy.normal() + self.python.random() + torch.randn(5, generator=self.torch)

    def __len__(self):
        return N

    def __getitem__(self, i):
        self.cache[i] = True
        return self.transform[0]["add"](X[i].double()), Y[i]


class Shuffled(IterableDataset):
    def __init__(self):
        self.rng = np.random.RandomState(0)

    def __iter__(self):
        return iter([(X[i].double(), Y[i]) for i in self.rng.permutation(N)])


def scaled():
    rng = random.Random(0)

    def collate(samples):
        images, labels = zip(*samples, strict=True)
        return torch.stack(images).double() * rng.random(), torch.stack(labels)

    return loader(collate_fn=collate)


@pytest.mark.parametrize("make", [lambda: DataLoader(Augmented(), 8), lambda: DataLoader(Shuffled(), 8), scaled])
def test_generators_of_the_data_are_put_back(make):
    def images(read):
        torch.manual_seed(0)
        data, model, seen = make(), made(), []
        probe = Probe(model)
        torch.manual_seed(1)
        for _ in range(2):
            for i, (x, _) in enumerate(data):
                seen.append(x)
                if read and i == 1:
                    probe.read(data)
        assert not isinstance(data.dataset, Augmented) or len(data.dataset.cache) == N
        return torch.cat(seen)

    assert torch.equal(images(True), images(False))


class Repeating(DataLoader):
    """As timm's ``MultiEpochsDataLoader``, which keeps its workers."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.iterator = (batch for _ in iter(int, 1) for batch in super(Repeating, self).__iter__())

    def __iter__(self):
        for _ in range(len(self)):
            yield next(self.iterator)


def test_a_loader_that_goes_on_with_its_iterator_is_refused():
    data, model = Repeating(loader().dataset, 8), made()
    batches = iter(data)
    next(batches)
    for each in (data, {"train": data}):
        with pytest.raises(ValueError, match="Repeating keeps one iterator for all passes, as 'iterator'"):
            Probe(model).read(each)
    assert len([*batches]) == 3
    with Probe(model).online() as epoch:
        for x, _ in epoch.batches(data):
            model(x)
    assert epoch.measurement.num_samples == N
