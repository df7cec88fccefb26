"""What is put back after a look at a model: odd objects, odd tensors, and what cannot be."""

import collections
import contextlib
import types

import numpy as np
import pytest
import torch
from torch import nn

from nclightning.probe.sweep import TraceError, frozen, snapshot


class Holder(nn.Module):
    """Holds something."""

    def __init__(self, held=None):
        super().__init__()
        self.linear, self.held = nn.Linear(3, 2), held


def bits(tensor):
    return tensor.detach().clone().contiguous().reshape(-1).view(torch.uint8).tolist()


ODD = {
    "complex": lambda: torch.randn(3, dtype=torch.complex64),
    "bool": lambda: torch.tensor([True, False]),
    "float8": lambda: torch.randn(4).to(torch.float8_e4m3fn),
    "bfloat16": lambda: torch.randn(4).bfloat16(),
    "not a number": lambda: torch.tensor([float("nan"), -0.0, 1.0]),
    "no elements": lambda: torch.zeros(0, 3),
    "a scalar": lambda: torch.tensor(3),
    "strided": lambda: torch.randn(4, 6)[::2, 1::2].T,
    "expanded": lambda: torch.randn(3, 1).expand(3, 4),
}


@pytest.mark.parametrize("make", ODD.values(), ids=ODD)
def test_odd_tensors(make):
    model = Holder(make())
    before = bits(model.held)
    own, address = model.held, model.held.data_ptr()
    with frozen(model):
        if own.numel() and own.stride() != (1, 0):
            own.copy_(torch.zeros_like(own))
        model.held.data = torch.zeros_like(own)
    assert model.held is own
    assert own.data_ptr() == address
    assert bits(own) == before


def test_a_sparse_tensor():
    model = Holder(torch.eye(3).to_sparse())
    with frozen(model):
        model.held.mul_(2)
    assert torch.equal(model.held.to_dense(), torch.eye(3))


def test_tensors_of_inference_mode():
    model = Holder()
    with torch.inference_mode():
        model.held = torch.zeros(3)
        with frozen(model):
            model.held.add_(1)
            model.cache = torch.ones(3)
    assert torch.equal(model.held, torch.zeros(3))
    assert not hasattr(model, "cache")
    with frozen(model), torch.inference_mode():
        model.held.add_(1)
    assert torch.equal(model.held, torch.zeros(3))


def test_what_autograd_waits_for_is_not_written_to():
    model = Holder()
    model.register_buffer("scale", torch.ones(2))
    loss = (model.linear(torch.ones(1, 3)) * model.scale).square().sum()
    with frozen(model):
        model.linear(torch.zeros(1, 3))
    loss.backward()
    assert model.linear.weight.grad is not None


def test_gradients_and_their_absence():
    model = Holder()
    with frozen(model):
        model.linear.weight.grad = torch.ones(2, 3)
    assert model.linear.weight.grad is None
    model.linear.weight.grad = own = torch.ones(2, 3)
    with frozen(model):
        model.linear.weight.grad = None
    assert model.linear.weight.grad is own


class Refers:
    """Refers to itself, has a property that fails, and answers for every attribute."""

    def __init__(self):
        self.me, self.count = self, 0

    @property
    def broken(self):
        raise RuntimeError("not to be read")

    def __getattr__(self, name):
        raise AttributeError(name)


class Guarded(dict):
    """Counts what is written to it, and cannot be updated."""

    def update(self, *_):
        raise TypeError("no")


def test_odd_objects():
    deep = []
    for _ in range(5000):
        deep = [deep]
    model = Holder(
        [Refers(), deep, Guarded(a=1), types.SimpleNamespace(n=1), type("Local", (), {"n": 1}), np.float64(1)]
    )
    refers, _, guarded, space, local, _ = model.held
    with frozen(model):
        refers.count += 1
        refers.new = 1
        guarded["a"] = 2
        space.n = 2
        local.n, local.more = 2, 3
    assert (refers.count, hasattr(refers, "new"), guarded["a"], space.n, local.n) == (0, False, 1, 1, 1)
    assert not hasattr(local, "more")


class Lazy(collections.OrderedDict):
    """Shows more than it holds, as the maps of transformers from names to classes do."""

    def __iter__(self):
        yield from [*super().__iter__(), "shown"]

    def keys(self):
        return list(self)

    def values(self):
        return [*super().values(), None]

    def items(self):
        return list(zip(self.keys(), self.values(), strict=True))

    def __len__(self):
        return 7


def test_mappings_are_put_back_by_what_they_hold():
    """In their own order, which is not the one in which they were filled."""
    held, moved = Lazy(a=0), collections.OrderedDict(a=1, b=2)
    moved.move_to_end("a")
    model = Holder([held, moved])
    with frozen(model):
        pass
    with frozen(model):
        held["a"] = moved["b"] = 3
    assert dict(collections.OrderedDict.items(held)) == {"a": 0}
    assert list(moved.items()) == [("b", 2), ("a", 1)]


def test_long_containers_are_put_back_as_they_are():
    model = Holder(list(range(100_000)))
    with frozen(model):
        model.held.append(1)
        model.held[0] = 5
    assert model.held == list(range(100_000))


def test_arrays():
    model = Holder({"a": np.arange(3.0), "objects": np.array([None, []], dtype=object), "constant": np.arange(2)})
    model.held["constant"].flags.writeable = False
    with frozen(model):
        model.held["a"] *= np.nan
        model.held["objects"][0] = 1
    assert model.held["a"].tolist() == [0, 1, 2]
    assert model.held["objects"][0] is None


def test_iterators_go_on_where_they_were():
    model = Holder([iter([1, 2, 3]), zip([1, 2], [3, 4], strict=True), enumerate("ab")])
    with frozen(model):
        assert [next(each) for each in model.held] == [1, (1, 3), (0, "a")]
    assert [next(each) for each in model.held] == [1, (1, 3), (0, "a")]


def test_a_generator_that_is_left_alone_is_no_reason():
    model = Holder(each for each in range(3))
    with frozen(model):
        pass
    with (
        pytest.raises(TraceError, match=r"^a forward of Holder changes 'held', and a generator cannot be rewound"),
        frozen(model),
    ):
        next(model.held)


def test_everything_is_put_back_after_an_exception_which_stays():
    model = Holder(each for each in range(3))
    model.count = 0

    def fail():
        next(model.held)
        model.count += 1
        raise KeyError

    with pytest.raises(KeyError), frozen(model):
        fail()
    assert model.count == 0
    assert model.training


def test_tensors_that_are_too_large_to_copy_are_watched(monkeypatch):
    monkeypatch.setattr(snapshot, "_COPIED_BYTES", 24)  # The weight alone, of which none is left for the rest.
    model = Holder(torch.zeros(2))
    with frozen(model):
        model.held.add_(1)  # Trained weights come last.
    assert torch.equal(model.held, torch.zeros(2))
    with frozen(model):
        pass
    with (
        pytest.raises(TraceError, match=r"changes 'linear.weight', and with more than .* GiB of tensors"),
        frozen(model),
    ):
        model.linear.weight.add_(1)


def test_classes_and_variables_of_libraries_are_left_alone():
    model = Holder(collections.OrderedDict)
    try:
        with frozen(model):
            nn.Linear.nclightning_test = 1
        assert nn.Linear.nclightning_test == 1
    finally:
        with contextlib.suppress(AttributeError):
            del nn.Linear.nclightning_test
