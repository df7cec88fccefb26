"""``nclightning.measure`` of networks: right on each form of batch, data set, output and head, or refused."""

import copy
import inspect
import itertools
import random
import subprocess
import sys
import warnings
from collections import UserDict, namedtuple
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from nclightning import measure
from nclightning.callbacks import NeuralCollapseMonitor
from nclightning.metrics import NearestClassCentre, NeuralCollapse
from tests.forms import CASES, Wrapped, oracle
from tests.trainers import quiet_trainer

fsdp = pytest.importorskip("torch.distributed.fsdp")
K, D, N = 4, 6, 24
OPTIONS = set(inspect.signature(measure).parameters)


# Heads, outputs and batches.


class Holder(nn.Module):
    """A network inside another module, called ``net``."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, *args, **kwargs):
        return self.net(*args, **kwargs)


def measured_form(name):
    torch.manual_seed(0)
    form = CASES[name]()
    applies = form.options.keys() <= OPTIONS and "no longer does" not in form.refused
    return form, Holder(form.model) if applies else None


@pytest.mark.parametrize("name", CASES)
def test_each_form_of_head_and_batch_is_right_or_refused(name):
    form, model = measured_form(name)
    if model is None:
        pytest.skip("of training alone")
    batches = [form.batch, *form.later]
    if form.refused:
        with pytest.raises((ValueError, TypeError), match=f"(?s){form.refused}"):
            measure(model, batches, **form.options)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = measure(model, batches, **form.options)
    said = [str(w.message) for w in caught if issubclass(w.category, UserWarning) and "head" in str(w.message)]
    assert [form.warns in each for each in said] == [True] * bool(form.warns)
    form.model.eval()
    with torch.no_grad(), np.errstate(invalid="ignore"):  # Heads that start at zero have no angles.
        expected = oracle(*form.pair(form.model, form.batch))
    exact = not any(p.dtype == torch.bfloat16 for p in model.parameters())
    close = {"rel": 1e-4 if exact else 5e-2, "abs": 1e-6, "nan_ok": True}
    assert {k: found[k] for k in expected} == pytest.approx(expected, **close)


# Data.


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, Y = draw(N, 5), torch.arange(N) % K
SET = TensorDataset(X, Y)


class Net(nn.Module):
    """Something in it remembers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(5, D), nn.BatchNorm1d(D), nn.Tanh(), nn.Dropout(0.5))
        self.out = nn.Linear(D, K)
        with torch.no_grad():
            self.body[1].running_mean += 0.3

    def forward(self, x):
        return self.out(self.body(x))


def right(model=None, rows=slice(None), x=X):
    model = copy.deepcopy(model or Net()).eval()
    with torch.no_grad():
        features = model.body(x)
    metric = NeuralCollapse(K, D, model.out, measures=("all",))
    metric.update(features[rows], Y[rows])
    decisions = NearestClassCentre(metric.statistics, model.out)
    decisions.update(features[rows], Y[rows])
    return {name: float(value) for name, value in (metric.compute() | decisions.compute()).items()}


def batches(size=7):
    return [(X[i : i + size], Y[i : i + size]) for i in range(0, N, size)]


class Endless(IterableDataset):
    def __iter__(self):
        return iter(list(zip(X, Y, strict=True)))


class Own(DataLoader):
    def __iter__(self):
        yield from batches()


class Loop:
    def __iter__(self):
        return iter(batches())


class Encoding(UserDict):
    """As of a tokenizer: a mapping that moves itself."""

    def to(self, device):
        return Encoding({name: value.to(device) for name, value in self.data.items()})


Pair = namedtuple("Pair", ["image", "target"])
SOME = [0, 1, 2, 3, 6, 7, 11]

DATA = {
    "loader": lambda: DataLoader(SET, batch_size=7),
    "loader that shuffles": lambda: DataLoader(SET, batch_size=7, shuffle=True),
    "loader that drops the last": lambda: DataLoader(SET, batch_size=7, drop_last=True),
    "loader with a batch sampler": lambda: DataLoader(
        SET, batch_sampler=BatchSampler(SequentialSampler(SET), 5, False)
    ),
    "loader without batches": lambda: DataLoader(batches(), batch_size=None),
    "loader of a stream": lambda: DataLoader(Endless(), batch_size=7),
    "loader with an iter of its own": lambda: Own(SET),
    "list": batches,
    "tuple": lambda: tuple(batches()),
    "generator": lambda: (batch for batch in batches()),
    "iterator of a loader": lambda: iter(DataLoader(SET, batch_size=7)),
    "map": lambda: map(list, batches()),
    "iterable": Loop,
    "a chain": lambda: itertools.chain(batches()[:2], batches()[2:]),
    "one batch": lambda: [(X, Y)],
    "single samples": lambda: batches(1),
    "lists in a list": lambda: [[x, y] for x, y in batches()],
    "named tuples": lambda: [Pair(*batch) for batch in batches()],
    "mappings": lambda: [{"x": x, "labels": y} for x, y in batches()],
    "encodings": lambda: [Encoding(x=x, label=y) for x, y in batches()],
    "labels as int32": lambda: [(x, y.int()) for x, y in batches()],
    "labels as bytes": lambda: [(x, y.byte()) for x, y in batches()],
    "columns of labels": lambda: [(x, y.unsqueeze(1)) for x, y in batches()],
}
OTHER_ROWS = {
    "subset": (lambda: DataLoader(Subset(SET, SOME), batch_size=4), SOME),
    "subset sampler": (
        lambda: DataLoader(SET, batch_size=4, sampler=SubsetRandomSampler([1, 2, 3, 4, 8])),
        [1, 2, 3, 4, 8],
    ),
    "weighted sampler": (
        lambda: DataLoader(SET, batch_size=4, sampler=WeightedRandomSampler((torch.arange(N) < 9).double(), 50)),
        list(range(9)),
    ),
    "samples left out": (lambda: [(X, torch.where(torch.arange(N) < 8, Y, -100))], list(range(8))),
}


@pytest.mark.parametrize("name", DATA)
def test_each_form_of_data_is_read_once(name):
    model, expected = Net(), right()
    found = measure(model, DATA[name]())
    assert dict(found) == pytest.approx({k: expected[k] for k in ("nc1", "nc2", "nc3")}, rel=1e-5)
    assert (found.num_samples, found.head, found.num_classes, found.feature_dim) == (N, "out", K, D)


@pytest.mark.parametrize("name", OTHER_ROWS)
def test_a_part_of_the_data_stays_a_part(name):
    make, rows = OTHER_ROWS[name]
    found, expected = measure(Net(), make()), right(rows=rows)
    assert dict(found) == pytest.approx({k: expected[k] for k in ("nc1", "nc2", "nc3")}, rel=1e-5)
    assert found.num_samples == len(rows)


def test_batches_of_any_form_are_split_by_batch_fn():
    data = [{"image": x, "class": y, "index": i} for i, (x, y) in enumerate(batches())]
    found = measure(Net(), data, batch_fn=lambda b: (b["image"], b["class"]))
    assert found["nc1"] == pytest.approx(right()["nc1"], rel=1e-5)
    triples = [(*batch, torch.zeros(len(batch[0]))) for batch in batches()]
    assert measure(Net(), triples, batch_fn=lambda b: b[:2]) == found


def used_up():
    once = iter(batches())
    list(once)
    return once


REFUSED = {
    "a pair of tensors": (
        lambda: (X, Y),
        r"data .* one batch, a tuple of \(24, 5\) float32, \(24,\) int64: pass \[batch\]",
    ),
    "a mapping": (lambda: {"x": X, "y": Y}, r"data .* one batch, a dict of x: .*: pass \[batch\]"),
    "a tensor": (lambda: X, r"data must be an iterable of batches.*got \(24, 5\) float32"),
    "a data set": (lambda: SET, r"got the data set TensorDataset: pass torch.utils.data.DataLoader\(data"),
    "nothing": (lambda: None, "data must be an iterable of batches.*got a NoneType"),
    "a path": (lambda: "train.pt", "data must be an iterable of batches.*got a str"),
    "an empty list": (list, "empty"),
    "an iterator that is used up": (used_up, "empty"),
    "inputs alone": (lambda: [X, X, X], "batches .x, y.*batch_fn"),
    "triples": (lambda: [(X, Y, Y)], "batches .x, y.*batch_fn"),
    "samples": (lambda: [(x, int(y)) for x, y in SET], "seems to be one sample. Pass a DataLoader"),
    "mappings without labels": (lambda: [{"x": X}], "has no labels.*batch_fn"),
    "one-hot labels": (lambda: [(X, F.one_hot(Y, K))], "one label per feature row.*batch_fn"),
    "float labels": (lambda: [(X, Y.float())], r"labels must be integers.*labels.long\(\)"),
    "labels from 1": (lambda: [(X, Y + 1)], r"labels must be within 0\.\.3.*got 1\.\.4"),
    "labels beyond in a later batch": (lambda: [(X, Y), (X, Y + 1)], r"6 labels were outside 0\.\.3"),
    "one class": (lambda: [(X, Y * 0)], "the labels of data have only one: pass samples of two classes"),
    "samples left out": (lambda: [(X, Y * 0 - 100)], "the labels of data have none: pass .*another ignore_index"),
    "numpy": (lambda: [(X.numpy(), Y.numpy())], r"batch_fn=.*torch.as_tensor\(b\[1\]\)"),
    "inputs in another precision": (
        lambda: [(X.double(), Y)],
        r"could not be run.*\w\. Inputs are float64 and weights float32: cast the inputs, or the model with "
        r"model.to\(torch.float64\)\. Pass forward_fn=",
    ),
    "inputs of another size": (lambda: [(draw(N, 9), Y)], "could not be run on the inputs.*forward_fn"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_data_are_refused_with_the_repair(name):
    make, words = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=f"(?s){words}"):
        measure(Net(), make())


def test_a_warning_is_of_the_line_of_the_user():
    with pytest.warns(UserWarning, match="has 4 outputs, and the labels have 2 classes") as caught:
        measure(Net(), [(X, Y % 2)])
    assert [each.filename for each in caught] == [__file__]


TWICE = {
    "decisions": {"measures": ("nc1", "accuracy", "ncc_mismatch")},
    "all": {"measures": ("all",)},
    "layers": {"layers": ("body",)},
}


@pytest.mark.parametrize("name", TWICE)
def test_what_can_be_read_once_is_not_read_twice(name):
    needs = "layers" if name == "layers" else "accuracy"
    with pytest.raises(ValueError, match=f"{needs}.* need a second pass over data, and a generator can be read once"):
        measure(Net(), (batch for batch in batches()), **TWICE[name])
    assert measure(Net(), batches(), **TWICE[name])


# Options.


def test_decisions_and_layers_take_a_second_pass():
    calls = []
    data = [(X, Y)]
    model = Net()
    run = lambda m, x: calls.append(1) or m(x)  # noqa: E731
    measure(model, data, forward_fn=run)
    once = len(calls)
    found = measure(model, data, forward_fn=run, measures=("all",), layers=("body.0", "body"))
    assert len(calls) == once + once + 1
    expected = right()
    assert {k: found[k] for k in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    tags = [f"{layer}/{name}" for layer in found.layers for name in ("nc1", "nc1_cdnv", "ncc_accuracy")]
    assert [tag for tag in found if "/" in tag] == tags == list(found)[-6:]
    assert found.layers == ("body.0", "body")
    assert found["body/nc1"] == pytest.approx(found["nc1"], rel=1e-6)
    assert "layer body.0:" in repr(found)
    assert found.per_class("body")["variance"] == pytest.approx(found.per_class()["variance"])
    assert found.per_class()["accuracy"].mean() == pytest.approx(found["accuracy"])


def test_options_are_those_of_the_monitor():
    of_monitor = inspect.signature(NeuralCollapseMonitor).parameters
    shared = OPTIONS - {"model", "data", "device", "features", "labels", "weight", "bias"}
    assert shared <= set(of_monitor)
    defaults = inspect.signature(measure).parameters
    assert all(defaults[name].default == of_monitor[name].default for name in shared)


REFUSED_OPTIONS = {
    "nothing": ({"model": None, "data": None}, "pass measure.model, data."),
    "no model": ({"model": None}, r"model must be a torch.nn.Module, got a NoneType"),
    "a function": ({"model": lambda x: x}, "model must be a torch.nn.Module, got a function"),
    "features by place": ({"model": X}, r"got \(24, 5\) float32: pass features by name"),
    "both": ({"features": X}, r"features cannot go together with model, data: pass measure\(model, data\)"),
    "both with options": (
        {"model": None, "data": None, "features": X, "labels": Y, "head": "out"},
        "features, labels cannot go together with head",
    ),
    "one layer": ({"layers": "body"}, r"layers must be a sequence of names: write \('body',\)"),
    "modules as layers": ({"layers": [nn.Linear(2, 2)]}, "layers must be dotted names, got a Linear"),
    "a layer twice": ({"layers": ("body", "body")}, "layers must be different names"),
    "a layer that is not there": ({"layers": ("neck",)}, "layer 'neck' does not exist in Net; it has: body"),
    "pooling": ({"layer_pooling": "max"}, "layer_pooling must be 'mean' or 'flatten', got 'max'"),
    "a head that is not there": ({"head": "fc"}, "no layer named head='fc' in"),
    "another device": ({"device": "meta"}, r"Net is on 'cpu', and measure does not move it: pass model.to\('meta'\)"),
    "no device": ({"device": "gpu0"}, "device must be one of torch's, such as 'cpu' or 'cuda:0', got 'gpu0'"),
    "an unknown measure": ({"measures": ("nc9",)}, "measures must be different names"),
    "without weights": ({"model": Net().to("meta")}, "Net is on the device 'meta', where weights have no values"),
    "sharded in another way": (
        {"model": type("FullyShardedDataParallel", (Holder,), {})(Net())},
        "no process can read the head: shard with torch.distributed.fsdp.fully_shard",
    ),
    "lazy": ({"model": nn.Sequential(nn.Linear(5, D), nn.LazyLinear(K))}, "lazy layers without weights.*run it"),
}


@pytest.mark.parametrize("name", REFUSED_OPTIONS)
def test_options_are_refused_with_the_repair(name):
    changes, words = REFUSED_OPTIONS[name]
    with pytest.raises((ValueError, TypeError), match=f"(?s){words}"):
        measure(**{"model": Net(), "data": batches()} | changes)


def test_the_device_of_the_model_may_be_named():
    assert measure(Net(), batches(), device="cpu") == measure(Net(), batches(), device=torch.device("cpu"))


# Nothing is left changed.


def states(model):
    return {
        "weights": [
            (p.detach().clone(), p.requires_grad, None if p.grad is None else p.grad.clone())
            for p in model.parameters()
        ],
        "buffers": [b.clone() for b in model.buffers()],
        "modes": [m.training for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
        "names": [sorted(vars(m)) for m in model.modules()],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),
        "python": random.getstate(),
        "gradients": torch.is_grad_enabled(),
    }


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other


def trained():
    model = Net().train()
    model.body[0].eval()
    model.out.bias.requires_grad_(False)
    F.cross_entropy(model(X), Y).backward()
    return model


def test_features_of_another_half_precision_than_that_of_autocast(generator):
    """Under autocast torch joins no float16 with bfloat16 on: features are joined outside of it."""
    model = Net().eval()
    inputs, labels = torch.randn(60, 5, generator=generator), torch.arange(60) % K
    batches = [(inputs[i : i + 16], labels[i : i + 16]) for i in range(0, 60, 16)]
    model.body.register_forward_hook(lambda layer, args, output: output.half())
    with torch.autocast("cpu", torch.bfloat16):
        found = measure(model, batches, measures=("nc1", "nc2_means"))
        features = model.body(inputs)
    assert features.dtype == torch.float16
    expected = measure(features=features, labels=labels, measures=("nc1", "nc2_means"))
    # Batches of another size are rounded otherwise, by eight bits.
    assert dict(found) == pytest.approx(dict(expected), rel=1e-2)


def fails(model, x):
    if len(x) < 7:
        raise RuntimeError("in the last batch")
    return model(x)


@pytest.mark.parametrize(
    "options", [{}, {"measures": ("all",), "layers": ("body.0",)}, {"forward_fn": fails}], ids=["plain", "all", "fails"]
)
def test_leaves_no_trace(options):
    model = trained()
    loader = DataLoader(SET, batch_size=7, shuffle=True)
    before = states(model)
    if "forward_fn" in options:
        with pytest.raises(RuntimeError, match="in the last batch"):
            measure(model, loader, **options)
    else:
        measure(model, loader, **options)
    assert same(states(model), before)
    assert measure(model, loader)["nc1"] == pytest.approx(right(model)["nc1"], rel=1e-5)  # In eval mode.


def test_training_goes_on_as_without():
    weights = []
    for measures in (True, False):
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        torch.manual_seed(1)
        for _ in range(3):
            for x, y in DataLoader(SET, batch_size=8, shuffle=True):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
            if measures:
                measure(model, DataLoader(SET, batch_size=8, shuffle=True), measures=("all",))
        weights.append(model.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


# Models.


def in_bfloat16():
    return Net().to(torch.bfloat16), [(x.bfloat16(), y) for x, y in batches()]


class Fixed(nn.Module):
    """Without parameters and buffers."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Identity()
        self.rows = draw(K, 5, seed=3)

    def forward(self, x):
        return F.linear(self.layer(x), self.rows)


WRAPPED = {
    "data parallel": (nn.DataParallel, "module."),
    "compiled": (torch.compile, "_orig_mod."),
    "both": (lambda model: nn.DataParallel(torch.compile(model)), "module._orig_mod."),
    "averaged": (torch.optim.swa_utils.AveragedModel, "module."),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_models(name):
    wrap, prefix = WRAPPED[name]
    names = ("nc1", "nc3", "accuracy")
    model, expected = wrap(Net()), right()
    found = measure(model, batches(), measures=names)
    assert dict(found) == pytest.approx({k: expected[k] for k in found}, rel=1e-5)
    named = measure(model, batches(), measures=names, head=f"{prefix}out", layers=(f"{prefix}body",))
    assert named.head == found.head
    assert {k: named[k] for k in names} == dict(found)
    assert named.layers == (("module.body",) if name == "averaged" else ("body",))


def test_a_layer_alone_is_a_head():
    layer = nn.Linear(5, K)
    found = measure(layer, batches())
    assert dict(found) == pytest.approx(
        dict(measure(features=X, labels=Y, weight=layer.weight, bias=layer.bias)), rel=1e-12
    )
    assert measure(layer, batches(), head=layer) == found


def test_features_that_are_not_finite_are_said_aloud():
    with pytest.warns(UserWarning, match="features of data at the head 'out' have numbers that are not finite"):
        found = measure(Net(), [(X / 0, Y)])
    assert np.isnan(found["nc1"])
    assert found["nc2"] == pytest.approx(right()["nc2"])


def test_a_compiled_model_that_has_run():
    model = torch.compile(Net(), backend="eager")
    model(X)
    assert measure(model, batches())["nc1"] == pytest.approx(right(model._orig_mod)["nc1"], rel=1e-5)


def test_models_in_half_precision():
    model, data = in_bfloat16()
    found, expected = measure(model, data), right(model.float())
    assert found["nc1"] == pytest.approx(expected["nc1"], rel=0.05)
    assert found["nc2"] == pytest.approx(expected["nc2"], rel=1e-6)


def test_autocast_and_inference_mode_of_the_user():
    model = trained()
    plain = measure(model, batches())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = measure(model, batches())
    assert half["nc1"] == pytest.approx(plain["nc1"], rel=0.1)
    assert half["nc1"] != plain["nc1"]
    assert half["nc2"] == plain["nc2"]
    for context in (torch.inference_mode, torch.no_grad):
        before = states(model)
        with context():
            found = measure(model, batches(), measures=("all",), layers=("body",))
        assert same(states(model), before)
        assert {name: found[name] for name in plain} == dict(plain)
    F.cross_entropy(model(X), Y).backward()  # No weight has become an inference tensor.


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        model = Net()
    assert measure(model, batches())["nc1"] == pytest.approx(right()["nc1"], rel=1e-5)


def test_a_model_without_parameters():
    model = Fixed()
    found = measure(model, batches(), head=lambda m: (m.rows, None))
    metric = NeuralCollapse(K, 5, model.rows)
    metric.update(X, Y)
    assert dict(found) == pytest.approx({k: float(v) for k, v in metric.compute().items()}, rel=1e-6)


def test_more_outputs_than_classes_are_said_aloud():
    with pytest.warns(UserWarning, match="4 outputs, and the labels have 3 classes"):
        found = measure(Net(), [(X[Y < 3], Y[Y < 3])])
    assert found.counts.tolist() == [6, 6, 6, 0]


def on_each(rank, file, results):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2, timeout=timedelta(minutes=1))
    warnings.simplefilter("ignore")
    options = {"measures": ("all",), "layers": ("body",)}
    loader = DataLoader(SET, batch_size=7, shuffle=True)
    parallel = nn.parallel.DistributedDataParallel(Net())
    parallel.module.body[1].running_mean += rank  # That of the first process counts.
    sharded = Net()
    for module in (sharded.body, sharded):
        fsdp.fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    before = [p.to_local().clone() for p in sharded.parameters()]
    try:
        measure(Net(), batches())
    except ValueError as error:
        results[f"refused {rank}"] = str(error)
    found = [measure(parallel, loader, **options), measure(sharded, loader, **options)]
    untouched = all(torch.equal(one, p.to_local()) for one, p in zip(before, sharded.parameters(), strict=True))
    if rank == 0:  # Arrays are those of one process alone.
        found.append(measure(features=X, labels=Y, measures=("ncc_accuracy",)))
    results[rank] = found, untouched, float(parallel.module.body[1].running_mean[0])
    dist.destroy_process_group()


@pytest.mark.skipif(not hasattr(fsdp, "fully_shard"), reason="an older torch keeps it elsewhere")
def test_processes_share_the_samples_and_get_the_same(tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.start_processes(on_each, (tmp_path / "file", results), nprocs=2, start_method="fork")
        ((parallel, sharded, alone), *untouched), ((*others,), *untouched_too) = results[0], results[1]
        assert all("cannot be divided between 2 processes" in results[f"refused {rank}"] for rank in range(2))
    assert others == [parallel, sharded]
    assert (untouched, untouched_too) == ([True, pytest.approx(0.3)], [True, pytest.approx(1.3)])
    expected = right()
    for found in (parallel, sharded):
        assert {k: found[k] for k in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert found.num_samples == N
        assert found.per_class()["accuracy"].mean() == pytest.approx(found["accuracy"])
    assert alone["ncc_accuracy"] > 0


def test_measure_monitor_and_metric_agree(tmp_path):
    form = CASES["logits"]()
    form.model.double()
    form.batch = form.batch[0].double(), form.batch[1]
    model = Wrapped(form, 0.1)
    names = ("nc1", "nc1_cdnv", "nc2", "nc3", "nc_distance", "accuracy", "ncc_accuracy", "cosine_margin")
    monitor = NeuralCollapseMonitor(measures=names, layers=("net.body.0",), stages=("train",))
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[monitor])
    data = DataLoader([form.batch], batch_size=None, collate_fn=lambda batch: batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, data)
    logged = {tag.removeprefix("nc/train/"): float(value) for tag, value in trainer.callback_metrics.items()}
    found = measure(model, data, measures=names, layers=("net.body.0",))
    assert dict(found) == pytest.approx(logged, rel=1e-12, abs=1e-12)
    x, y = form.batch
    with torch.no_grad():
        features = form.model.body(x)
    head = form.model.out
    of_arrays = measure(features=features, labels=y, weight=head.weight, bias=head.bias, measures=names)
    assert dict(of_arrays) == pytest.approx({name: found[name] for name in names}, rel=1e-12, abs=1e-12)
    metric = NeuralCollapse(K, D, head, measures=names[:5])
    metric.update(features, y)
    values = metric.compute()
    assert {k: float(v) for k, v in values.items()} == pytest.approx(
        {k: found[k] for k in values}, rel=1e-12, abs=1e-12
    )


@pytest.mark.slow  # torch, torchmetrics and matplotlib are loaded anew.
def test_loads_no_lightning():
    code = """
import sys, nclightning
assert not {"torch", "numpy", "matplotlib"} & sys.modules.keys()
assert {"measure", "Measurement", "__version__"} <= set(dir(nclightning))
import torch
x, y = torch.randn(24, 5), torch.arange(24) % 4
model = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 4))
found = nclightning.measure(model, [(x, y)], measures=("all",), layers=("0",))
assert isinstance(found, nclightning.Measurement)
repr(found), found._repr_html_(), found.to_json(), found.plot()
loaded = {name.split(".")[0] for name in sys.modules}
assert not {"lightning", "pytorch_lightning", "tensorboard", "pyplot"} & loaded, loaded
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
