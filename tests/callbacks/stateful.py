"""Small models whose forward remembers something, one for each way of remembering.

What is remembered changes the features, so that a trace of a measurement shows in the weights.
"""

import array
import collections
import copy
import functools
import itertools
import random
import types
from dataclasses import dataclass, field

import lightning as L
import numpy as np
import torch
from torch import nn
from torchmetrics import MeanMetric

K, D, H = 3, 4, 6


class Remembers(L.LightningModule):
    """Body, what is remembered, head."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(D, H), nn.Linear(H, K)
        self.losses = []

    def change(self, h):
        return h

    def forward(self, x):
        return self.head(self.change(self.body(x)))

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        # What a forward makes is not trained.
        return torch.optim.Adam([*self.body.parameters(), *self.head.parameters()], lr=0.05)


CASES: dict[str, type[Remembers]] = {}


def case(make, change, **more):
    """Add a model: ``make(model)`` gives it a memory, ``change(model, h)`` uses that."""

    def add(name):
        def __init__(self):
            Remembers.__init__(self)
            make(self)

        CASES[name] = type("".join(w.title() for w in name.split()), (Remembers,), {
            "__init__": __init__, "change": change, "__module__": __name__, **more,
        })  # fmt: skip

    return add


def holding(**attributes):
    """Make a memory out of attributes, each made anew by a function."""

    def make(model):
        for name, value in attributes.items():
            setattr(model, name, value())

    return make


def attempt(name, make):
    """Add a model whose ``change`` is the decorated function."""
    return lambda change: case(make, change)(name)


# Plain attributes.


@attempt("an integer", holding(calls=lambda: 0))
def _(self, h):
    self.calls += 1
    return h + 0.01 * self.calls


@attempt("a running mean as a plain tensor", holding(mean=lambda: torch.zeros(H)))
def _(self, h):
    self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
    return h - self.mean


@attempt("a running mean written in place", holding(mean=lambda: torch.zeros(H)))
def _(self, h):
    self.mean.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
    return h - self.mean


@attempt("a tensor behind .data", holding(mean=lambda: torch.zeros(H)))
def _(self, h):
    self.mean.data = 0.9 * self.mean.data + h.detach().mean(0)
    return h - self.mean


@attempt("a tensor that is resized", holding(seen=lambda: torch.zeros(1)))
def _(self, h):
    self.seen.resize_(len(self.seen) + 1).fill_(len(self.seen))
    return h + 0.01 * self.seen.sum()


@attempt("an attribute that the first forward makes", holding())
def _(self, h):
    if not hasattr(self, "first"):
        self.first = h.detach().mean(0)
    return h - self.first


@attempt("an attribute that is deleted", holding(once=lambda: 1.0))
def _(self, h):
    if hasattr(self, "once"):
        del self.once
        return h + 1
    return h


@attempt("a numpy array", holding(mean=lambda: np.zeros(H)))
def _(self, h):
    self.mean[:] = 0.5 * self.mean + h.detach().mean(0).numpy()
    return h - torch.from_numpy(self.mean).float()


@attempt("a string", holding(word=str))
def _(self, h):
    self.word += "a"
    return h + 0.01 * len(self.word)


# Containers.


@attempt("a list", holding(seen=list))
def _(self, h):
    self.seen.append(h.detach().mean())
    return h + 0.01 * sum(self.seen)


@attempt("a queue of a memory bank", holding(queue=lambda: collections.deque(maxlen=4)))
def _(self, h):
    old = torch.stack(list(self.queue)).mean(0) if self.queue else 0
    self.queue.append(h.detach().mean(0))
    return h - old


@attempt("a dictionary as a cache", holding(cache=dict))
def _(self, h):
    self.cache.setdefault(len(h), h.detach().mean(0))
    return h - self.cache[len(h)]


@attempt("nested containers", holding(tree=lambda: {"a": [({"b": [0.0]},)]}))
def _(self, h):
    self.tree["a"][0][0]["b"].append(1.0)
    self.tree["a"].append(None)
    return h + 0.01 * sum(self.tree["a"][0][0]["b"]) * len(self.tree["a"])


@attempt("a set", holding(seen=set))
def _(self, h):
    self.seen.add(round(float(h.detach().sum()), 3))
    return h + 0.01 * len(self.seen)


@attempt("a counter", holding(seen=collections.Counter))
def _(self, h):
    self.seen[len(h)] += 1
    return h + 0.01 * self.seen[len(h)]


@attempt("a default dictionary", holding(seen=lambda: collections.defaultdict(list)))
def _(self, h):
    self.seen["x"].append(1)
    return h + 0.01 * len(self.seen["x"])


@attempt("an ordered dictionary that is turned", holding(order=lambda: collections.OrderedDict(a=1, b=2, c=3)))
def _(self, h):
    self.order.move_to_end(next(iter(self.order)))
    return h + 0.1 * next(iter(self.order.values()))


@attempt("an array and bytes", holding(counts=lambda: array.array("d", [0.0]), raw=lambda: bytearray(b"\0")))
def _(self, h):
    self.counts[0] += 1
    self.raw[0] = (self.raw[0] + 1) % 7
    return h + 0.01 * self.counts[0] + 0.1 * self.raw[0]


@attempt("a cache of keys and values", holding(cache=lambda: [(torch.zeros(1, H), torch.zeros(1, H))]))
def _(self, h):
    keys, values = self.cache[-1]
    step = h.detach().mean(0, keepdim=True)
    self.cache[-1] = torch.cat([keys, step])[-8:], torch.cat([values, 2 * step])[-8:]
    return h + 0.1 * torch.softmax(h @ self.cache[-1][0].T, 1) @ self.cache[-1][1]


# Objects.


@dataclass
class Scale:
    """As a gradient scaler keeps."""

    scale: float = 1.0
    growth: torch.Tensor = field(default_factory=lambda: torch.zeros(()))

    def step(self):
        self.scale *= 1.1
        self.growth += 1


class Slotted:
    """Without a dictionary of attributes."""

    __slots__ = ("calls", "never")

    def __init__(self):
        self.calls = 0


@attempt("an object", holding(scaler=Scale))
def _(self, h):
    self.scaler.step()
    return h * self.scaler.scale + 0.01 * self.scaler.growth


@attempt("an object with slots", holding(state=Slotted))
def _(self, h):
    self.state.calls += 1
    return h + 0.01 * self.state.calls


@attempt("a namespace in a namespace", holding(state=lambda: types.SimpleNamespace(a=types.SimpleNamespace(n=0))))
def _(self, h):
    self.state.a.n += 1
    return h + 0.01 * self.state.a.n


@attempt("a module in a list", holding(hidden=lambda: [nn.BatchNorm1d(H)]))
def _(self, h):
    return self.hidden[0](h)


class OwnDict(collections.UserDict):
    """A dictionary of the user's own."""


@attempt("a user's dictionary", holding(state=OwnDict))
def _(self, h):
    self.state["n"] = self.state.get("n", 0) + 1
    return h + 0.01 * self.state["n"]


# Random generators and iterators.


@attempt("a generator of torch", holding(random=lambda: torch.Generator().manual_seed(1)))
def _(self, h):
    return h + 0.1 * torch.randn(h.shape, generator=self.random)


@attempt("a generator of numpy", holding(random=lambda: np.random.default_rng(1)))
def _(self, h):
    return h + 0.1 * float(self.random.normal())


@attempt("a random state of numpy", holding(random=lambda: np.random.RandomState(1)))
def _(self, h):
    return h + 0.1 * self.random.normal()


@attempt("a generator of Python", holding(random=lambda: random.Random(1)))
def _(self, h):
    return h + 0.1 * self.random.gauss(0, 1)


@attempt("the global generators in eval mode, too", holding())
def _(self, h):
    return h + 0.1 * (torch.randn(H) + random.random() + np.random.rand())


@attempt("itertools.count", holding(steps=itertools.count))
def _(self, h):
    return h + 0.01 * next(self.steps)


@attempt("an iterator over a list", holding(steps=lambda: iter(list(range(10_000)))))
def _(self, h):
    return h + 0.01 * next(self.steps)


# Parameters and buffers.


def momentum(model):
    model.target = copy.deepcopy(model.body).requires_grad_(False)


@attempt("a momentum encoder", momentum)
def _(self, h):
    with torch.no_grad():
        for mine, theirs in zip(self.target.parameters(), self.body.parameters(), strict=True):
            mine.mul_(0.9).add_(theirs, alpha=0.1)
    return h - 0.1 * self.target.bias


@attempt("a momentum encoder behind .data", momentum)
def _(self, h):
    for mine, theirs in zip(self.target.parameters(), self.body.parameters(), strict=True):
        mine.data = mine.data * 0.9 + theirs.data * 0.1
    return h - 0.1 * self.target.bias


@attempt("a momentum encoder behind .data in place", momentum)
def _(self, h):
    for mine, theirs in zip(self.target.parameters(), self.body.parameters(), strict=True):
        mine.data.lerp_(theirs.data, 0.1)
    return h - 0.1 * self.target.bias


@attempt("weights that each forward renormalises", holding())
def _(self, h):
    with torch.no_grad():
        self.body.weight.mul_(0.99)
    return h


@attempt("a parameter that is replaced", holding(scale=lambda: nn.Parameter(torch.ones(H))))
def _(self, h):
    self.scale = nn.Parameter(self.scale.detach() * 1.05)
    return h * self.scale


@attempt("a parameter that is frozen by a forward", holding(steps=lambda: nn.Parameter(torch.zeros(H))))
def _(self, h):
    h = h + 0.1 * float(self.steps.requires_grad)
    self.steps.requires_grad_(False)
    return h


def buffer(persistent):
    return lambda model: model.register_buffer("mean", torch.zeros(H), persistent=persistent)


for persistent in (True, False):

    @attempt(f"a buffer, persistent: {persistent}", buffer(persistent))
    def _(self, h):
        self.mean = 0.9 * self.mean + h.detach().mean(0)
        return h - self.mean


@attempt("a buffer that the forward registers", holding())
def _(self, h):
    if "late" not in self._buffers:
        self.register_buffer("late", h.detach().mean(0))
    return h - self.late


@attempt("a buffer of zeros with signs", lambda model: model.register_buffer("zero", torch.zeros(H)))
def _(self, h):
    self.zero.neg_()
    return h + 0.1 * torch.copysign(torch.ones(H), self.zero)


@attempt("data-dependent initialisation", lambda m: m.register_buffer("known", torch.tensor(False)))
def _(self, h):  # As ActNorm does.
    if not self.known:
        with torch.no_grad():
            self.body.bias -= h.mean(0)
        self.known.fill_(True)
    return h


@attempt("a code book", lambda m: m.register_buffer("codes", torch.randn(5, H)))
def _(self, h):
    nearest = torch.cdist(h.detach(), self.codes).argmin(1)
    self.codes.index_add_(0, nearest, 0.1 * (h.detach() - self.codes[nearest]))
    return h + (self.codes[nearest] - h).detach() * 0.1


@attempt("a centre", lambda m: m.register_buffer("centre", torch.zeros(1, H)))
def _(self, h):  # As DINO has, with a reduction in place.
    self.centre.lerp_(h.detach().mean(0, keepdim=True), 0.1)
    return h - self.centre


@attempt("hidden state carried between batches", holding(cell=lambda: nn.GRUCell(H, H), hidden=lambda: None))
def _(self, h):
    state = torch.zeros(H) if self.hidden is None else self.hidden
    new = self.cell(h.detach(), state.expand(len(h), H))
    self.hidden = new.detach().mean(0)
    return h + new.detach()


# Layers.


@attempt("batch norm with a plain average", holding(norm=lambda: nn.BatchNorm1d(H, momentum=None)))
def _(self, h):
    return self.norm(h)


@attempt("batch norm that is trained in eval mode", holding(norm=lambda: nn.BatchNorm1d(H)))
def _(self, h):
    self.norm.training = True
    return self.norm(h)


@attempt("spectral norm", lambda m: setattr(m, "norm", nn.utils.parametrizations.spectral_norm(nn.Linear(H, H))))
def _(self, h):
    return self.norm(h)


@attempt("an observer of ranges", lambda m: m.register_buffer("range", torch.tensor([])))
def _(self, h):
    if not self.range.numel():
        self.range.resize_(2).copy_(torch.tensor([0.0, 1.0]))
    self.range[1] = max(float(self.range[1]), float(h.detach().max()))
    return h / self.range[1]


@attempt("a metric", holding(mean=MeanMetric, others=lambda: [MeanMetric()]))
def _(self, h):
    self.mean.update(h.detach().sum())
    self.others[0].update(1.0)
    return h + 0.01 * self.mean.update_count + 0.01 * self.others[0].update_count


def hooked(model):
    model.calls = 0

    def count(*_):
        model.calls += 1

    model.body.register_forward_hook(count)


@attempt("a hook that counts", hooked)
def _(self, h):
    return h + 0.01 * self.calls


def hooked_by_variable(model):
    calls = 0

    def count(module, args, output):
        nonlocal calls
        calls += 1
        return output + 0.01 * calls

    model.body.register_forward_hook(count)


@attempt("a hook with a variable of its own", hooked_by_variable)
def _(self, h):
    return h


@attempt("a hook that a forward registers", holding())
def _(self, h):
    self.body.register_forward_hook(lambda module, args, output: output + 0.01)
    return h


class Dropped(nn.Module):
    """Leaves out each third call, as LayerDrop with a counter."""

    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(H, H).requires_grad_(False), 0

    def forward(self, h):
        self.calls += 1
        return h if self.calls % 3 == 0 else h + self.layer(h)


@attempt("a dropped layer", holding(layer=Dropped))
def _(self, h):
    return self.layer(h)


# Functions and classes.


class CachedMethod(Remembers):
    """A table that the first forward makes, by chance."""

    @functools.lru_cache  # noqa: B019 - as users do
    def table(self, width):
        return torch.randn(width)

    def change(self, h):
        return h + 0.1 * self.table(h.shape[1])


class CachedProperty(Remembers):
    """The same as a property."""

    @functools.cached_property
    def table(self):
        return torch.randn(H)

    def change(self, h):
        return h + 0.1 * self.table


class OfClass(Remembers):
    """Counts in an attribute of the class."""

    calls = 0

    def change(self, h):
        type(self).calls += 1
        return h + 0.01 * type(self).calls


_CALLS = 0
_SEEN: list[int] = []


class OfModule(Remembers):
    """Counts in variables of the module."""

    def change(self, h):
        global _CALLS  # noqa: PLW0603 - as users do
        _CALLS += 1
        _SEEN.append(1)
        return h + 0.01 * _CALLS + 0.01 * len(_SEEN)


class ByDefault(Remembers):
    """Remembers in a default, and in an attribute of a function."""

    def change(self, h, seen=[]):  # noqa: B006 - as users do
        seen.append(1)
        noted.calls += 1
        return h + 0.01 * len(seen) + 0.01 * noted.calls


def noted():
    pass


noted.calls = 0


def partial_of(model):
    def shift(seen, h):
        seen.append(1)
        return h + 0.01 * len(seen)

    model.shift = functools.partial(shift, [])


@attempt("a partial function", partial_of)
def _(self, h):
    return self.shift(h)


def closure(model):
    calls = 0

    def shift(h):
        nonlocal calls
        calls += 1
        return h + 0.01 * calls

    model.shift = shift


@attempt("a closure", closure)
def _(self, h):
    return self.shift(h)


# What a forward makes.


@attempt("a lazy layer", holding(lazy=lambda: nn.LazyLinear(H)))
def _(self, h):
    return h + nn.functional.dropout(h, 0.5, self.training) + self.lazy(h)


class LazyHead(Remembers):
    """The head is lazy."""

    def __init__(self):
        super().__init__()
        self.head, self.drop = nn.LazyLinear(K), nn.Dropout(0.5)

    def change(self, h):
        return self.drop(h)


class MadeHead(Remembers):
    """The first forward makes the head."""

    def __init__(self):
        super().__init__()
        self.head = None

    def forward(self, x):
        h = nn.functional.dropout(self.body(x), 0.5, self.training)
        if self.head is None:
            self.head = nn.Linear(H, K)
        return self.head(h)

    def configure_optimizers(self):
        return torch.optim.Adam(self.body.parameters(), lr=0.05)


@attempt("a layer that a forward makes", holding(made=nn.ModuleList))
def _(self, h):
    if not len(self.made):
        self.made.append(nn.Linear(H, H))
    return h + self.made[0](h)


class Adapts(Remembers):
    """Adapts itself in each forward by an optimizer of its own, as TENT does."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(H))
        self.own = torch.optim.SGD([self.shift], lr=0.1, momentum=0.9)

    def change(self, h):
        with torch.enable_grad():
            entropy = (h.detach() + self.shift).softmax(1).log().mean()
            self.shift.grad = torch.autograd.grad(entropy, self.shift)[0]
            self.own.step()
        return h + self.shift.detach()


def numbers():
    value = 0
    while True:
        value += 1
        yield value


class Generates(Remembers):
    """Goes through a generator function, which nothing can rewind."""

    def __init__(self):
        super().__init__()
        self.steps = numbers()

    def change(self, h):
        return h + 0.01 * next(self.steps)


class Accumulates(Remembers):
    """Adds to a gradient in each forward."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(H))
        self.shift.grad = torch.zeros(H)

    def change(self, h):
        with torch.enable_grad():
            (self.shift * h.detach().mean(0)).sum().backward()
        return h + 0.01 * self.shift.grad


CASES |= {
    "a cached method": CachedMethod, "a cached property": CachedProperty, "a class": OfClass, "variables": OfModule,
    "a default": ByDefault, "a lazy head": LazyHead, "a head that a forward makes": MadeHead,
    "an optimizer of its own": Adapts,
}  # fmt: skip
# Of these a sweep refuses to go on.
REFUSED = {"a generator function": Generates, "a gradient": Accumulates}
