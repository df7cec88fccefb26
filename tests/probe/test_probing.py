"""``nclightning.Probe`` in loops of the user's own: the numbers of the monitor, no trace, and no misuse unnoticed."""

import copy
import itertools
import random
import warnings

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from nclightning import Probe, measure
from nclightning.callbacks import NeuralCollapseMonitor
from tests.probe.loops import EXACT, D, K, N, Net, Wrapped, X, Y, loader, made, sgd, states, step
from tests.trainers import quiet_trainer

FAR = torch.randn(12, 5, generator=torch.Generator().manual_seed(1)) + 3


# The numbers of the monitor.


NAMES = ("nc1", "nc1_cdnv", "nc2", "nc3", "nc_distance")
DECIDED = (*NAMES, "accuracy", "ncc_accuracy", "ncc_mismatch", "cosine_margin")


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """What monitors log in two epochs, and the weights then."""
    kept, module = [], Wrapped(made())

    class Keep(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            kept.append({tag: float(value) for tag, value in trainer.callback_metrics.items()})

    sets = {"further": loader(slice(12), shuffle=False), "far": [(FAR.double(), torch.zeros(12, dtype=torch.long))]}
    monitors = [
        NeuralCollapseMonitor(measures=NAMES, source="online", stages=("train",), layers=("net.body.0",)),
        NeuralCollapseMonitor(measures=("accuracy", "cosine_margin"), stages=("val",)),
    ]
    sweep = NeuralCollapseMonitor(measures=DECIDED, stages=("train",), datasets=sets, ood=("far",))
    results = {}
    for name, callbacks in {"online": monitors, "sweep": [sweep]}.items():
        kept.clear()
        module = Wrapped(made())
        torch.manual_seed(1)
        trainer = quiet_trainer(tmp_path_factory.mktemp(name), max_epochs=2, callbacks=[*callbacks, Keep()])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(module, loader(), DataLoader(TensorDataset(X[:12].double(), Y[:12]), batch_size=5))
        results[name] = [dict(each) for each in kept], module.net.state_dict()
    return results


def under(tags, prefix):
    return {tag.removeprefix(prefix): value for tag, value in tags.items() if tag.startswith(prefix)}


def test_online_is_what_the_monitor_logs(logged):
    values, weights = logged["online"]
    model = made()
    probe = Probe(model, measures=NAMES, layers=("body.0",))
    optimizer, data = sgd(model), loader()
    torch.manual_seed(1)
    for expected in values:
        with probe.online() as epoch:
            for x, y in epoch.batches(data):
                step(model, optimizer, x, y)
        # The monitor's validation loader takes a number of the random generator at the start of its epoch.
        assert {name.replace("body.0", "net.body.0"): value for name, value in epoch.measurement.items()} == (
            pytest.approx(under(expected, "nc/train/"), **EXACT)
        )
        torch.empty((), dtype=torch.int64).random_()
    assert epoch.measurement.num_samples == N
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in weights.items())


def test_sets_are_read_as_the_monitor_does(logged):
    values, weights = logged["sweep"]
    model = made()
    model.load_state_dict(weights)
    probe = Probe(model, measures=DECIDED)
    sets = {"far": [(FAR.double(), torch.zeros(12, dtype=torch.long))], "train": loader(), "further": loader(slice(12))}
    found = probe.read(sets, ood=("far",))
    assert list(found) == list(sets)
    tagged = {tag: value for name, each in found.items() for tag, value in each.tagged(f"nc/{name}").items()}
    assert tagged == pytest.approx(values[-1], **EXACT)
    assert found["train"] == probe.read(loader()) == measure(model, loader(), measures=DECIDED)
    by_itself = probe.read(loader(slice(12)))
    assert found["further"]["accuracy"] == by_itself["accuracy"]
    assert found["further"]["cosine_margin"] != by_itself["cosine_margin"]  # By class means of its own.
    assert found["far"].num_samples == 12
    for each in found.values():
        repr(each), each._repr_html_(), each.to_json(), each.plot(), each.per_class()


# No trace.


def trained(with_probe):
    model, random_states = made(), []
    probe, optimizer = Probe(model, measures=("all",), layers=("body",)), sgd(model)
    online = Probe(model)
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    data = loader()
    for _ in range(2):
        if not with_probe:
            for x, y in data:
                step(model, optimizer, x, y)
        else:
            with online.online() as epoch:
                for i, (x, y) in enumerate(epoch.batches(data)):
                    step(model, optimizer, x, y)
                    if i == 1:
                        probe.read({"train": data, "val": loader(slice(12))})
            assert epoch.measurement["nc1"] > 0
            probe.read(data)
        random_states.append(states(model))
    return random_states


def test_training_goes_on_as_without():
    assert trained(True) == trained(False)


# Loops of others.


class Tuples(Net):
    def forward(self, x):
        features = self.body(x)
        return {"logits": self.out(features)}, [features]


def frozen_backbone():
    model = made()
    model.body.requires_grad_(False)
    return model


def in_two_parts():
    model = made()
    return nn.Sequential(model.body, model.out)


def loops():
    """By name: what runs an epoch with a model on batches, and what makes the model."""

    def plain(model, batches):
        optimizer = sgd(model)
        for x, y in batches:
            step(model, optimizer, x, y)

    def accumulated(model, batches):
        optimizer = sgd(model)
        for i, (x, y) in enumerate(batches):
            (F.cross_entropy(model(x), y) / 2).backward()
            if i % 2:
                optimizer.step()
                optimizer.zero_grad()

    def tuples(model, batches):
        optimizer = sgd(model)
        for x, y in batches:
            F.cross_entropy(model(x)[0]["logits"], y).backward()
            optimizer.step()

    def generative(model, batches):
        other = nn.Linear(5, 5).double()
        for x, y in batches:
            fake = other(torch.randn_like(x))
            (model(fake.detach()).logsumexp(1).mean() + F.cross_entropy(model(x), y)).backward()
            model(fake).sum().backward()

    def parts(model, batches):
        body, head = model
        optimizer = sgd(model)
        for x, y in batches:
            F.cross_entropy(head(body(x)), y).backward()
            optimizer.step()

    def functional(model, batches):
        for x, y in batches:
            values = {name: p.detach() * 0.9 for name, p in model.named_parameters()}
            F.cross_entropy(torch.func.functional_call(model, values, (x,)), y)

    def closure(model, batches):
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
        for x, y in batches:

            def again(x=x, y=y):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                return loss

            optimizer.step(again)

    def validating(model, batches):
        optimizer = sgd(model)
        for x, y in batches:
            model.eval()
            model(torch.randn(8, 5, dtype=x.dtype)), model(X.double())
            model.train()
            step(model, optimizer, x, y)
            model(X[:8].double())

    def averaged(model, batches):
        average, optimizer = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)), sgd(model)
        for x, y in batches:
            step(model, optimizer, x, y)
            average.update_parameters(model)
            average(x)

    def copied(model, batches):
        optimizer = sgd(model)
        for x, y in batches:
            step(model, optimizer, x.clone(), y)

    return {
        "plain": (plain, made),
        "accumulated gradients": (accumulated, made),
        "tuples": (tuples, lambda: Tuples().double()),
        "two models": (generative, made),
        "two parts": (parts, in_two_parts),
        "functional_call": (functional, made),
        "closure": (closure, made),
        "validation in the middle": (validating, made),
        "average of weights": (averaged, made),
        "frozen parts": (plain, frozen_backbone),
        "copies of batches": (copied, made),
    }


@pytest.mark.parametrize("name", loops())
def test_loops_of_others(name):
    run, make = loops()[name]
    torch.manual_seed(1)
    model = make()
    body, head = (model[0], model[1]) if name == "two parts" else (model.body, model.out)
    seen, expected = [], []

    def keep(layer, args):
        seen.append(args[0].detach().clone())

    class Batches:
        """Notes which forward of the head is the first on the batch itself."""

        def __iter__(self):
            for x, y in loader(shuffle=False):
                seen.clear()
                inputs.clear()
                yield x, y
                at = next(i for i, each in enumerate(inputs) if each.shape == x.shape and torch.equal(each, x))
                expected.append((seen[at], y))

    inputs = []
    handles = [
        head.register_forward_pre_hook(keep),
        body.register_forward_pre_hook(lambda layer, args: inputs.append(args[0].detach().clone())),
    ]
    probe = Probe(model)
    with probe.online() as epoch:
        run(model, epoch.batches(Batches()))
    for handle in handles:
        handle.remove()
    rows, labels = (torch.cat(parts) for parts in zip(*expected, strict=True))
    right = measure(features=rows, labels=labels, weight=head.weight, bias=head.bias)
    assert dict(epoch.measurement) == pytest.approx(dict(right), **EXACT)
    if name != "tuples":
        state = states(model)
        expected_now = measure(copy.deepcopy(model), loader())
        assert probe.read(loader()) == expected_now
        assert states(model) == state


def test_an_infinite_loader_by_next():
    model = made()
    probe, optimizer = Probe(model), sgd(model)
    endless = itertools.chain.from_iterable(itertools.repeat(loader()))
    for _ in range(2):
        with probe.online() as epoch:
            batches = epoch.batches(endless)
            for _ in range(5):
                x, y = next(batches)
                step(model, optimizer, x, y)
        assert epoch.measurement.num_samples == len(range(N)) + 8
    assert next(endless)[0].shape == (8, 5)  # It goes on where the loop was.


def test_a_break_ends_the_epoch_there():
    model = made()
    probe = Probe(model)
    for at_the_end in (False, True):
        with probe.online() as epoch:
            for i, (x, y) in enumerate(epoch.batches(loader())):
                if i == 2 and not at_the_end:
                    break
                step(model, sgd(model), x, y)
                if i == 2:
                    break
        assert epoch.measurement.num_samples == 16 + 8 * at_the_end


def test_a_batch_that_is_skipped_is_left_out_aloud():
    model = made()
    probe = Probe(model)

    def run():
        with probe.online() as epoch:
            for i, (x, y) in enumerate(epoch.batches(loader())):
                if i != 1:
                    step(model, sgd(model), x, y)
        return epoch

    with pytest.warns(UserWarning, match="Net ran on 3 batches of the epoch, .* not on 1,"):
        epoch = run()
    assert epoch.measurement.num_samples == N - 8


@pytest.mark.parametrize("shape", ["one-hot", "column"])
def test_labels_of_other_shapes(shape):
    labels = F.one_hot(Y, K) if shape == "one-hot" else Y[:, None]
    data, model = [(X.double(), labels)], made()
    if shape == "column":
        assert dict(Probe(model).read(data)) == pytest.approx(dict(measure(model, loader())), **EXACT)
        return
    with pytest.raises(ValueError, match="batch_fn"):
        Probe(model).read(data)
    epoch = Probe(model).online().__enter__()
    batches = epoch.batches(data)
    with pytest.raises(ValueError, match="batch_fn"):
        next(batches)


def test_precision_of_the_step():
    model = made().float()
    right, half = measure(model, loader(dtype=torch.float32)), copy.deepcopy(model).to(torch.bfloat16)
    found = Probe(half, forward_fn=lambda m, x: m(x.bfloat16())).read(loader(dtype=torch.float32))
    assert found["nc1"] == pytest.approx(right["nc1"], rel=0.1)
    with Probe(half, forward_fn=lambda m, x: m(x.bfloat16())).online() as epoch:
        for x, _ in epoch.batches(loader(dtype=torch.float32)):
            half(x.bfloat16())
    assert epoch.measurement.num_samples == N
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(X)
        found = Probe(model).read(loader(dtype=torch.float32))
        loss = F.cross_entropy(model(X), Y)  # Not with copies of the weights that were made without gradients.
    loss.backward()
    assert found["nc1"] == pytest.approx(right["nc1"], rel=0.1)
    assert all(p.grad is not None for p in model.parameters())
    right = measure(model, loader(dtype=torch.float32))
    with torch.inference_mode():
        assert Probe(model).read(loader(dtype=torch.float32)) == right


def test_weights_that_change_under_autocast():
    """Autocast keeps copies of weights in lower precision until it ends, also of what they were before a swap."""
    model = made().float().eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(X)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(-1.5)
        found = measure(model, loader(dtype=torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert found == measure(copy.deepcopy(model), loader(dtype=torch.float32))


@pytest.mark.parametrize("swap", ["in place", "by data"])
def test_weights_that_are_swapped_between_reads(swap):
    model = made()
    probe, before = Probe(model, measures=DECIDED), copy.deepcopy(model.state_dict())
    first = probe.read(loader())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.8) if swap == "in place" else setattr(parameter, "data", parameter * 0.8)
    assert probe.read(loader()) == measure(copy.deepcopy(model), loader(), measures=DECIDED) != first
    model.load_state_dict(before)
    assert probe.read(loader()) == first
    model.out = nn.Linear(D, K).double()
    assert probe.read(loader()) == measure(model, loader(), measures=DECIDED)


def test_layout_of_memory():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, D, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(D, K)
    ).double()
    images = torch.randn(N, 3, 6, 6, dtype=torch.float64)
    data = DataLoader(TensorDataset(images, Y), batch_size=8)
    right = measure(model, data)
    model = model.to(memory_format=torch.channels_last)
    assert dict(Probe(model).read(data)) == pytest.approx(dict(right), rel=1e-9)
    with Probe(model).online() as epoch:
        for x, _ in epoch.batches(data):
            model(x.to(memory_format=torch.channels_last))
    assert dict(epoch.measurement) == pytest.approx(dict(right), rel=1e-9)


# Misuse.


def in_a_block(*lines):
    def run():
        model = made()
        probe = Probe(model)
        scope = {"model": model, "probe": probe, "loader": loader(), "torch": torch, "copy": copy, "Probe": Probe}
        exec("\n".join(["with probe.online() as epoch:", *(f"    {line}" for line in lines)]), scope)

    return run


MISUSES = {
    "no batches": (["model(torch.randn(8, 5).double())"], "it yielded no batch"),
    "read before the end": (["for x, y in epoch.batches(loader): model(x)", "epoch.measurement"], "after the block"),
    "two passes": (["for _ in range(2):", "    for x, y in epoch.batches(loader): model(x)"], "called twice"),
    "nested": (["with probe.online() as other: pass"], "is already measuring an epoch"),
    "entered again": (["pass", "with epoch: pass"], "call probe.online\\(\\) again"),
    "a copy": (["for x, y in epoch.batches(loader): copy.deepcopy(model)(x)"], "did not run on any of 4 batches"),
    "mixed": (["for x, y in epoch.batches(loader): model(0.5 * x + 0.5 * x.flip(0))"], "on other inputs than"),
    "in another order": (["for x, y in epoch.batches(loader): model(x.flip(0))"], "on other inputs than"),
    "part of a batch": (["for x, y in epoch.batches(loader): model(x[:4])"], "on other inputs than"),
    "head left out": (["for x, y in epoch.batches(loader): model.body(x)"], "the head did not run here"),
}


@pytest.mark.parametrize("name", MISUSES)
def test_misuse_is_refused(name):
    lines, words = MISUSES[name]
    with pytest.raises(ValueError, match=words):
        in_a_block(*lines)()


def test_an_error_in_the_loop_leaves_nothing():
    model = made()
    probe, before = Probe(model), states(model)[:2]
    epoch, kept = probe.online(), []

    def run():
        with epoch:
            kept.append(epoch.batches(loader()))
            for x, _ in kept[0]:
                model(x)
                raise KeyError

    with pytest.raises(KeyError):
        run()
    assert states(model)[:2] == before
    with pytest.raises(ValueError, match="only if no error ended"):
        epoch.measurement  # noqa: B018
    with pytest.raises(ValueError, match="inside the block"):
        next(kept[0])
    with pytest.raises(ValueError, match="inside the block"):
        epoch.batches(loader())
    with probe.online() as again:
        for x, _ in again.batches(loader()):
            model(x)
    assert again.measurement.num_samples == N


def test_what_cannot_be_read_online():
    with pytest.raises(ValueError, match=r"need fixed class means: use Probe\.read"):
        Probe(made(), measures=("accuracy",)).online()
    with pytest.raises(ValueError, match="compiled"):
        Probe(torch.compile(made(), backend="eager")).online()


def test_a_data_set_of_one_class_is_named():
    with pytest.raises(ValueError, match="the labels of the data set 'val' have only one: pass samples of two classes"):
        Probe(made()).read({"train": loader(), "val": loader(slice(0, N, K))})


@pytest.mark.parametrize(
    ("data", "options", "words"),
    [
        ({"val": 0}, {"measures": ("accuracy",)}, "accuracy of several data sets need .*'train'"),
        ({"val": 0, "far": 0}, {"ood": ("far",)}, "nc5 of several data sets need .*'train'"),
        ({"train": 0, "far": 0}, {"ood": "far"}, r"write \('far',\)"),
        ({"train": 0}, {"ood": ("far",)}, r"among \['train'\], got \['far'\]"),
        ({}, {}, "an empty mapping"),
        (0, {"ood": ("far",)}, "pass them by name"),
        ({"x": X, "y": Y}, {}, "seems to be one batch"),
    ],
)
def test_sets_that_mean_nothing(data, options, words):
    filled = data if data and "x" in data else {name: loader() for name in data} if data != 0 else loader()
    probe = Probe(made(), measures=options.pop("measures", None))
    with pytest.raises((ValueError, TypeError), match=words):
        probe.read(filled, **options)
