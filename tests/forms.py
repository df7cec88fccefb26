"""Real forms of heads, outputs and batches: how each is made, and what must come out. Add a case here."""

import dataclasses
import itertools
from collections import namedtuple
from types import SimpleNamespace

import lightning as L
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

K, D, B = 4, 6, 24

CASES = {}


@dataclasses.dataclass
class Case:
    """A model, a batch, the monitor's options, and the pair that is to be measured or the words of the refusal.

    Of an online case the forwards of training are read; ``later`` are batches that follow; ``late`` is the number of
    steps before a refusal.
    """

    model: nn.Module
    batch: object
    pair: object = None
    refused: str = ""
    options: dict = dataclasses.field(default_factory=dict)
    step: object = None
    warns: str = ""
    later: list = dataclasses.field(default_factory=list)
    late: int = 0


def case(make):
    CASES[make.__name__] = make
    return make


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def classes(*shape, count=K):
    return torch.arange(torch.Size(shape).numel()).reshape(shape) % count


def vectors(dtype=torch.float32):
    return draw(B, 5).to(dtype), classes(B)


def images(size=6):
    return draw(B, 3, size, size), classes(B)


class Model(nn.Module):
    """Layers by name, and a forward that is given."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


def body():
    return nn.Sequential(nn.Linear(5, D), nn.Tanh())


def plain(finish, *, refused="", **layers):
    """A body, a head called ``out``, and what is made of its logits ``z`` and features ``h``."""

    def forward(m, x):
        h = m.body(x)
        return finish(m, h)

    model = Model(forward, body=body(), **({"out": nn.Linear(D, K)} | layers))
    return Case(model, vectors(), lambda m, b: (m.body(b[0]), m.out.weight, b[1]), refused)


# What a forward makes of the logits.


@case
def logits():
    return plain(lambda m, h: m.out(h))


@case
def log_softmax():
    return plain(lambda m, h: m.out(h).log_softmax(-1))


@case
def softmax():
    return plain(lambda m, h: m.out(h).softmax(-1))


@case
def sigmoid():
    return plain(lambda m, h: m.out(h).sigmoid())


@case
def softmax_layer_in_a_sequential():
    model = nn.Sequential(nn.Linear(5, D), nn.Tanh(), nn.Linear(D, K), nn.LogSoftmax(1))
    return Case(model, vectors(), lambda m, b: (m[:2](b[0]), m[2].weight, b[1]))


@case
def learned_temperature():
    return plain(lambda m, h: m.out(h) / m.temperature, temperature=nn.Parameter(torch.tensor(0.3)))


@case
def log_softmax_of_a_head_that_starts_at_zero():
    form = plain(lambda m, h: m.out(h).log_softmax(-1), other=nn.Linear(D, K))
    nn.init.zeros_(form.model.out.weight)
    nn.init.zeros_(form.model.out.bias)
    # The monitor is to measure the head after it was trained a little: zero rows have no angles.
    return form


@case
def wide_layer_and_log_softmax_of_the_head():
    return plain(lambda m, h: m.out(m.wide(h)).log_softmax(-1), wide=nn.Linear(D, 32), out=nn.Linear(32, K))


def _of_wide(case_):
    case_.pair = lambda m, b: (m.wide(m.body(b[0])), m.out.weight, b[1])
    return case_


def wide(finish):
    form = plain(lambda m, h: finish(m, m.wide(h)), wide=nn.Linear(D, 32), out=nn.Linear(32, K))
    return _of_wide(form)


CASES["wide_layer_and_log_softmax_of_the_head"] = lambda: wide(lambda m, h: m.out(h).log_softmax(-1))
CASES["wide_layer_and_softmax"] = lambda: wide(lambda m, h: m.out(h).softmax(-1))
CASES["wide_layer_beside_log_softmax"] = lambda: wide(lambda m, h: (m.out(h).log_softmax(-1), h))
CASES["wide_layer_before_logits_in_a_tuple"] = lambda: wide(lambda m, h: (h, m.out(h)))
CASES["wide_layer_in_a_dict"] = lambda: wide(lambda m, h: {"embedding": h, "prediction": m.out(h)})
CASES["logits_in_a_list_in_a_dict"] = lambda: plain(lambda m, h: {"all": [{"z": m.out(h)}]})

Output = namedtuple("Output", ["features", "scores"])


@dataclasses.dataclass
class Result:
    scores: torch.Tensor
    features: torch.Tensor


def with_probabilities(z):
    return z, z.softmax(1)


CASES["namedtuple"] = lambda: plain(lambda m, h: Output(h, m.out(h)))
CASES["dataclass"] = lambda: plain(lambda m, h: Result(m.out(h), h))
CASES["object"] = lambda: plain(lambda m, h: SimpleNamespace(features=h, scores=m.out(h)))
CASES["logits_and_probabilities"] = lambda: plain(lambda m, h: with_probabilities(m.out(h)))
CASES["cast"] = lambda: plain(lambda m, h: m.out(h).double())
CASES["clone_with_an_unused_layer"] = lambda: plain(lambda m, h: m.out(h).clone(), aside=nn.Linear(D, K))
CASES["in_place_temperature"] = lambda: plain(lambda m, h: m.out(h).div_(0.1))


def sorted_by_size(finish, refused="gets the samples in another order than the output.*forward_fn", **options):
    """Rows are sorted before the head, and what is made of its logits is brought back into their order."""

    def forward(m, h):
        order = h.norm(dim=1).argsort()
        return finish(m.out(h[order]))[order.argsort()]

    form = plain(forward, refused=refused)
    form.options = {"head": "net.out"} | options
    return form


CASES["sorted_samples"] = lambda: sorted_by_size(lambda z: z)
CASES["sorted_samples_and_log_softmax"] = lambda: sorted_by_size(lambda z: z.log_softmax(-1))
CASES["sorted_samples_and_softmax"] = lambda: sorted_by_size(lambda z: z.softmax(-1))
CASES["sorted_samples_without_a_name"] = lambda: sorted_by_size(lambda z: z, "was seen to be the head", head=None)
CASES["sorted_samples_by_forward_fn"] = lambda: sorted_by_size(
    lambda z: z, "", forward_fn=lambda m, x: m.net.out(m.net.body(x))
)


@case
def relu_in_place_before_the_head():
    model = nn.Sequential(nn.Linear(5, D), nn.ReLU(inplace=True), nn.Linear(D, K))
    return Case(model, vectors(), lambda m, b: (m[0](b[0]).relu(), m[2].weight, b[1]))


def functional(finish, **options):
    """A head without a layer, ``rows``, on top of a linear layer, and what is made of the output of that."""

    def forward(m, x):
        return F.linear(finish(m, m.linear(x)), m.rows)

    model = Model(forward, linear=nn.Linear(5, D), rows=nn.Parameter(draw(K, D)))
    return Case(model, vectors(), options={"head": lambda m: (m.net.rows, None)}, **options)


CASES["relu_in_place_of_a_function_before_the_head"] = lambda: functional(
    lambda m, h: F.relu(h, inplace=True), refused="no layer of .* has an input or output h .*nn.Identity"
)
CASES["skip_added_in_place_before_the_head"] = lambda: functional(
    lambda m, h: h.add_(1.0), refused="no layer of .* has an input or output h .*nn.Identity"
)


class WritesToItsInput(nn.Linear):
    """As with ``inplace=True`` inside a head."""

    def forward(self, h):
        return super().forward(h.relu_())


@case
def relu_in_place_in_the_head():
    form = plain(lambda m, h: m.out(h), out=WritesToItsInput(D, K), refused="neither as W h")
    form.model.body = nn.Linear(5, D)
    return form


@case
def output_changed_in_place_after_the_head():
    return plain(
        lambda m, h: m.out(h).add_(h @ m.more), more=nn.Parameter(draw(D, K)), refused="was seen to be the head"
    )


# Which of several layers.


@case
def head_beside_another_linear_layer_of_the_output():
    refused = "cannot tell which layer of .*: the outputs of 'net.fc' and 'net.out' are all parts.*Pass head="
    return plain(lambda m, h: (m.fc(h), m.out(h)), fc=nn.Linear(D, 32), refused=refused)


@case
def multi_exit():
    def forward(m, x):
        h = m.body(x)
        return m.early(h), m.out(m.rest(h))

    model = Model(forward, body=body(), early=nn.Linear(D, K), rest=nn.Linear(D, D), out=nn.Linear(D, K))
    return Case(model, vectors(), refused="the outputs of 'net.early' and 'net.out' are all parts")


@case
def multi_exit_with_a_named_head():
    form = multi_exit()
    form.options, form.refused = {"head": "net.out"}, ""
    form.pair = lambda m, b: (m.rest(m.body(b[0])), m.out.weight, b[1])
    return form


@case
def multi_task_of_which_the_labels_fit_one():
    form = plain(lambda m, h: {"rotation": m.rotation(h), "class": m.out(h)}, rotation=nn.Linear(D, 3))
    form.step = lambda model, batch: F.cross_entropy(model(batch[0])["class"], batch[1])
    return form


@case
def multi_task():
    return plain(
        lambda m, h: {"shape": m.shape(h), "colour": m.out(h)}, shape=nn.Linear(D, K), refused="cannot tell which"
    )


@case
def logits_of_a_domain_beside_those_of_classes():
    form = plain(lambda m, h: {"logits": m.domain(h), "class": m.out(h)}, domain=nn.Linear(D, 8))
    form.step = lambda model, batch: F.cross_entropy(model(batch[0])["class"], batch[1])
    form.refused = "the outputs of 'net.(domain|out)' and 'net.(domain|out)' are all parts"
    return form


@case
def domain_with_too_few_outputs_called_logits():
    form = logits_of_a_domain_beside_those_of_classes()
    form.model.domain, form.refused = nn.Linear(D, 3), ""
    return form


@case
def class_head_without_a_layer_beside_a_layer():
    form = plain(
        lambda m, h: (F.linear(h, m.rows, m.bias), m.rotation(h)),
        rotation=nn.Linear(D, 8),
        rows=nn.Parameter(draw(K, D)),
        bias=nn.Parameter(draw(K)),
    )
    form.refused = "a weight that belongs to no layer computes the part '0'"
    return form


@case
def name_of_an_alias():
    form = plain(lambda m, h: m.out(h))
    form.model.classifier, form.options = form.model.out, {"head": "net.classifier"}
    return form


@case
def siamese():
    return plain(lambda m, h: (m.out(h), m.out(-h)), refused="the head 'net.out' of .* ran 2 times .*forward_fn")


@case
def mixture_of_experts():
    return plain(
        lambda m, h: sum(g.unsqueeze(1) * e(h) for g, e in zip(m.gate(h).softmax(1).T, m.experts, strict=True)),
        gate=nn.Linear(D, 2),
        experts=nn.ModuleList([nn.Linear(D, K), nn.Linear(D, K)]),
        out=nn.Identity(),
        refused="no layer of .* was seen to be the head.*'net.experts.1' with output .*Pass head=.*forward_fn",
    )


@case
def mean_of_two_heads():
    return plain(
        lambda m, h: (m.out(h) + m.distilled(h)) / 2, distilled=nn.Linear(D, K), refused="was seen to be the head"
    )


@case
def features_only():
    return plain(
        lambda m, h: h,
        refused=r"no layer of .*'net.body.0' with output \(24, 6\); that did not run: 'net.out'.*forward_fn",
    )


@case
def a_lone_linear_layer_before_a_cosine_without_a_layer():
    model = Model(
        lambda m, x: F.linear(F.normalize(m.body(x)), F.normalize(m.rows)),
        body=body(),
        rows=nn.Parameter(draw(K, D)),
    )
    return Case(model, vectors(), refused="no layer of .*'net.body.0' with output")


@case
def cosine_by_a_function():
    form = a_lone_linear_layer_before_a_cosine_without_a_layer()
    form.refused, form.options = "", {"head": lambda m: (m.net.rows, None)}
    form.pair = lambda m, b: (F.normalize(m.body(b[0])), F.normalize(m.rows), b[1])
    form.warns = "cosine head"
    return form


@case
def norm_after_the_head():
    return plain(lambda m, h: m.norm(m.out(h)), norm=nn.BatchNorm1d(K), refused="was seen to be the head")


@case
def adapter_that_starts_at_zero():
    return plain(
        lambda m, h: m.out(h) + h @ m.more,
        more=nn.Parameter(torch.zeros(D, K)),
        refused="only as long as the parameter 'net.more' keeps its initial value.*Pass head='net.out'",
    )


@case
def scale_of_each_class_that_starts_at_one():
    return plain(
        lambda m, h: m.out(h) * m.scale,
        scale=nn.Parameter(torch.ones(K)),
        refused="'net.scale' keeps its initial value",
    )


@case
def bias_apart_that_starts_at_zero():
    return plain(
        lambda m, h: m.out(h) + m.bias,
        bias=nn.Parameter(torch.zeros(K)),
        refused="'net.bias' keeps its initial value.*Pass head='net.out'",
    )


@case
def bias_apart_added_in_place():
    form = bias_apart_that_starts_at_zero()
    form.model._forward = lambda m, x: m.out(m.body(x)).add_(m.bias)
    return form


@case
def bias_apart_by_name_of_the_head():
    form = bias_apart_that_starts_at_zero()
    form.refused, form.options = "", {"head": "net.out"}
    return form


@case
def second_head_that_starts_at_zero():
    form = plain(
        lambda m, h: m.out(h) + m.second(h), second=nn.Linear(D, K), refused="'net.second.*keeps its initial value"
    )
    nn.init.zeros_(form.model.second.weight)
    nn.init.zeros_(form.model.second.bias)
    return form


@case
def clamped_logits():
    return plain(lambda m, h: m.out(h).clamp(-10, 10), refused="only as long as logits are small.*Pass head='net.out'")


@case
def rows_of_norm_one_at_the_start():
    """What a function forgets to divide by is seen once it is not 1 any more."""
    form = plain(lambda m, h: 30 * F.linear(h, F.normalize(m.rows)), rows=nn.Parameter(F.normalize(draw(K, D))))
    form.options, form.late = {"head": lambda m: (m.net.rows, None)}, 1
    form.refused = "followed from the head .* on the first batch and no longer does"
    return form


@case
def rows_of_norm_one_at_the_start_online():
    form = rows_of_norm_one_at_the_start()
    form.options["source"] = "online"
    return form


@case
def single_output_hint():
    form = plain(lambda m, h: m.out(h), out=nn.Linear(D, 1), refused="has one output")
    form.batch = form.batch[0], classes(B, count=2)
    form.step = lambda model, batch: F.binary_cross_entropy_with_logits(model(batch[0])[:, 0], batch[1].float())
    return form


@case
def more_outputs_than_classes():
    form = plain(lambda m, h: m.out(h), out=nn.Linear(D, 2 * K))
    form.warns = "the head 'net.out' has 8 outputs, and the labels have 4 classes"
    return form


# Kinds of heads.


class Cosine(nn.Module):
    """A cosine head with a scale."""

    def __init__(self):
        super().__init__()
        self.weight, self.scale = nn.Parameter(draw(K, D)), nn.Parameter(torch.tensor(9.0))

    def forward(self, h):
        return self.scale * F.linear(F.normalize(h), F.normalize(self.weight))


def cosine_pair(m, b):
    return F.normalize(m.body(b[0])), F.normalize(m.out.weight), b[1]


@case
def cosine_head():
    return plain(lambda m, h: m.out(h), out=Cosine(), refused="'net.out'.* is a cosine head.*Pass head='net.out'")


@case
def cosine_head_by_name():
    form = plain(lambda m, h: m.out(h), out=Cosine())
    form.options, form.pair, form.warns = {"head": "net.out"}, cosine_pair, "cosine head"
    return form


class ArcFace(nn.Module):
    """A cosine head with a margin at the label."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(draw(K, D))

    def forward(self, h, y=None):
        z = F.linear(F.normalize(h), F.normalize(self.weight))
        return 8 * (z if y is None else torch.where(F.one_hot(y, K).bool(), (z.acos() + 0.3).cos(), z))


class TakesLabels(nn.Module):
    """As ArcFace networks do."""

    def __init__(self):
        super().__init__()
        self.body, self.out = body(), ArcFace()

    def forward(self, x, y):
        return self.out(self.body(x), y)


@case
def labels_in_forward():
    return Case(
        TakesLabels(),
        vectors(),
        refused=r"could not be run on the inputs of the first batch, \(24, 5\) float32: TypeError.*Pass forward_fn=",
        step=lambda model, batch: F.cross_entropy(model.net(*batch), batch[1]),
    )


@case
def labels_in_forward_of_a_mapping():
    form = labels_in_forward()
    x, y = form.batch
    form.batch, form.refused = {"x": x, "y": y}, "is a cosine head|neither as W h"
    form.step = lambda model, batch: F.cross_entropy(model.net(**batch), batch["y"])
    return form


@case
def margin_head_by_name_and_forward_fn():
    form = labels_in_forward()
    form.refused, form.warns = "", "cosine head"
    form.options = {"head": "net.out", "forward_fn": lambda m, x: m.net.out(m.net.body(x))}
    form.pair = cosine_pair
    return form


class Frame(nn.Module):
    """A fixed simplex."""

    def __init__(self, name):
        super().__init__()
        self.name = name
        self.register_buffer(name, (torch.eye(K, D) - torch.ones(K, 1) @ torch.ones(1, D) / K))

    def forward(self, h):
        return h @ getattr(self, self.name).t()


@case
def fixed_frame_as_a_layer():
    return plain(lambda m, h: m.out(h), out=Frame("weight"))


@case
def fixed_frame_under_another_name():
    return plain(lambda m, h: m.out(h), out=Frame("etf"), refused="no layer of .* was seen to be the head")


@case
def fixed_frame_under_another_name_by_module():
    form = plain(lambda m, h: m.out(h), out=Frame("etf"))
    form.options = {"head": form.model.out}
    form.pair = lambda m, b: (m.body(b[0]), m.out.etf, b[1])
    return form


@case
def fixed_frame_in_the_forward():
    form = plain(lambda m, h: 5 * h @ m.out.etf.t(), out=Frame("etf"))
    form.options = {"head": lambda m: (m.net.out.etf, None)}
    form.pair = lambda m, b: (m.body(b[0]), m.out.etf, b[1])
    return form


@case
def features_that_no_layer_holds():
    form = plain(lambda m, h: h.square() @ m.out.etf.t(), out=Frame("etf"))
    form.options, form.refused = {"head": lambda m: (m.net.out.etf, None)}, "returned a weight of shape .*nn.Identity"
    return form


@case
def weight_norm():
    return plain(lambda m, h: m.out(h), out=parametrizations.weight_norm(nn.Linear(D, K)))


@case
def spectral_norm():
    return plain(lambda m, h: m.out(h), out=parametrizations.spectral_norm(nn.Linear(D, K)))


class Lora(nn.Module):
    """A frozen layer and a product of two thin ones, of which one starts at zero."""

    def __init__(self):
        super().__init__()
        self.base, self.a, self.b = nn.Linear(D, K), nn.Linear(D, 2, bias=False), nn.Linear(2, K, bias=False)
        nn.init.zeros_(self.b.weight)
        self.base.requires_grad_(False)

    def forward(self, h):
        return self.base(h) + self.b(self.a(h))


@case
def low_rank_adapter():
    form = plain(lambda m, h: m.out(h), out=Lora())
    form.pair = lambda m, b: (m.body(b[0]), m.out.base.weight + m.out.b.weight @ m.out.a.weight, b[1])
    return form


@case
def low_rank_adapter_before_log_softmax():
    form = low_rank_adapter()
    form.model._forward = lambda m, x: m.out(m.body(x)).log_softmax(1)
    return form


@case
def transposed_weight():
    from transformers.pytorch_utils import Conv1D  # noqa: PLC0415

    form = plain(lambda m, h: m.out(h), out=Conv1D(K, D))
    form.pair = lambda m, b: (m.body(b[0]), m.out.weight.t(), b[1])
    return form


@case
def frozen_backbone():
    form = plain(lambda m, h: m.out(h))
    form.model.body.requires_grad_(False).eval()
    return form


def dtype(kind):
    form = plain(lambda m, h: m.out(h))
    form.model.to(kind)
    form.batch = vectors(kind)
    return form


CASES["float64"] = lambda: dtype(torch.float64)
CASES["bfloat16"] = lambda: dtype(torch.bfloat16)


@case
def mixed_precision():
    return plain(lambda m, h: m.out(h).float().log_softmax(-1))


# Architectures.


class Residual(nn.Module):
    """As in a ResNet."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.conv = nn.Conv2d(3, D, 3), nn.BatchNorm2d(D), nn.Conv2d(D, D, 3, padding=1)
        self.fc = nn.Linear(D, K)

    def features(self, x):
        x = self.norm(self.stem(x)).relu()
        return (x + self.conv(x)).mean((2, 3))

    def forward(self, x):
        return self.fc(self.features(x))


@case
def resnet():
    return Case(Residual(), images(), lambda m, b: (m.features(b[0]), m.fc.weight, b[1]))


class Squeezing(nn.Module):
    """Squeeze and excitation by a lone pair of linear layers, and a convolution as head."""

    def __init__(self, flatten):
        super().__init__()
        self.stem, self.down, self.up = nn.Conv2d(3, D, 3), nn.Linear(D, K), nn.Linear(K, D)
        self.head, self.flatten = nn.Conv2d(D, K, 1), flatten

    def maps(self, x):
        x = self.stem(x)
        return x * self.up(self.down(x.mean((2, 3))).relu()).sigmoid()[:, :, None, None]

    def forward(self, x):
        return self.flatten(self, self.maps(x))


def squeezing(flatten, pooled=lambda maps: maps.mean((2, 3))):
    return Case(Squeezing(flatten), images(), lambda m, b: (pooled(m.maps(b[0])), m.head.weight.flatten(1), b[1]))


CASES["convolution_of_pooled_maps"] = lambda: squeezing(lambda m, x: m.head(x.mean((2, 3), True)).flatten(1))
CASES["convolution_squeezed"] = lambda: squeezing(lambda m, x: m.head(x.mean((2, 3), True)).squeeze(-1).squeeze(-1))
CASES["convolution_before_pooling"] = lambda: squeezing(lambda m, x: m.head(x).mean((2, 3)))


@case
def convolution_and_relu_before_pooling():
    form = squeezing(lambda m, x: m.head(x).relu().mean((2, 3)))
    form.refused = "no layer of .*'net.head' with output"
    return form


@case
def convolution_and_relu_before_pooling_by_name():
    form = squeezing(lambda m, x: m.head(x).relu().mean((2, 3)))
    form.options = {"head": "net.head"}
    form.refused = "neither the mean of its logits over positions.*forward_fn"
    return form


@case
def convolution_of_pooled_maps_and_relu_by_name():
    form = squeezing(lambda m, x: m.head(x.mean((2, 3), True)).relu().flatten(1))
    form.options = {"head": "net.head"}
    return form


@case
def segmentation():
    model = nn.Sequential(nn.Conv2d(3, D, 3, padding=1), nn.Tanh(), nn.Conv2d(D, K, 1))
    batch = draw(6, 3, 4, 4), classes(6, 4, 4)
    return Case(
        model,
        batch,
        lambda m, b: (m[:2](b[0]).movedim(1, -1).reshape(-1, D), m[2].weight.flatten(1), b[1].flatten()),
    )


class Attending(nn.Module):
    """As a vision transformer, with a class token."""

    def __init__(self):
        super().__init__()
        self.embed, self.token = nn.Linear(3, 8), nn.Parameter(draw(1, 1, 8))
        self.blocks = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 1)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, K)

    def features(self, x):
        x = self.embed(x.flatten(2).transpose(1, 2))
        return self.norm(self.blocks(torch.cat([self.token.expand(len(x), 1, 8), x], 1)))[:, 0]

    def forward(self, x):
        return self.head(self.features(x))


@case
def vision_transformer():
    return Case(Attending(), images(4), lambda m, b: (m.features(b[0]), m.head.weight, b[1]))


class Mixing(nn.Module):
    """As an MLP-Mixer: linear layers all over, the head in the middle of the registration."""

    def __init__(self):
        super().__init__()
        self.embed, self.classify = nn.Linear(3, D), nn.Linear(D, K)
        self.tokens, self.channels = nn.Linear(16, 16), nn.Linear(D, D)

    def features(self, x):
        x = self.embed(x.flatten(2).transpose(1, 2))
        x = x + self.tokens(x.transpose(1, 2)).transpose(1, 2)
        return (x + self.channels(x).relu()).mean(1)

    def forward(self, x):
        return self.classify(self.features(x))


@case
def mlp_mixer():
    return Case(Mixing(), images(4), lambda m, b: (m.features(b[0]), m.classify.weight, b[1]))


class Recurrent(nn.Module):
    """The last state of an LSTM."""

    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.LSTM(5, D, batch_first=True), nn.Linear(D, K)

    def forward(self, x):
        return self.out(self.rnn(x)[0][:, -1])


@case
def lstm():
    return Case(Recurrent(), (draw(B, 7, 5), classes(B)), lambda m, b: (m.rnn(b[0])[0][:, -1], m.out.weight, b[1]))


class Tagging(Recurrent):
    """A label for each step."""

    def forward(self, x):
        return self.out(self.rnn(x)[0])


@case
def lstm_tagger():
    return Case(
        Tagging(),
        (draw(B, 7, 5), classes(B, 7)),
        lambda m, b: (m.rnn(b[0])[0].reshape(-1, D), m.out.weight, b[1].flatten()),
        step=lambda model, batch: F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten()),
    )


@case
def logits_of_steps_with_a_label_per_sample():
    return Case(
        Tagging(),
        (draw(B, 7, 5), classes(B)),
        refused=r"one label per feature row, got features of shape \(24, 7, 6\).*batch_fn",
        step=lambda model, batch: F.cross_entropy(model(batch[0]).mean(1), batch[1]),
    )


@case
def mean_of_the_logits_of_steps():
    return Case(
        Model(lambda m, x: m.out(m.rnn(x)[0]).mean(1), rnn=nn.LSTM(5, D, batch_first=True), out=nn.Linear(D, K)),
        (draw(B, 7, 5), classes(B)),
        lambda m, b: (m.rnn(b[0])[0].mean(1), m.out.weight, b[1]),
    )


def steps(finish, position=None, *, refused="", **options):
    """A label per sample, and what is made of the logits ``z`` of steps."""
    form = mean_of_the_logits_of_steps()
    form.model._forward = lambda m, x: finish(m.out(m.rnn(x)[0]))
    form.options, form.refused = options, refused
    if position is not None:
        form.pair = lambda m, b: (m.rnn(b[0])[0][:, position], m.out.weight, b[1])
    return form


NAMED = {"head": "net.out"}
CASES["logits_of_the_last_step"] = lambda: steps(lambda z: z[:, -1], -1)
CASES["logits_of_the_last_step_by_name"] = lambda: steps(lambda z: z[:, -1], -1, **NAMED)
CASES["logits_of_the_last_step_online"] = lambda: still(steps(lambda z: z[:, -1], -1, source="online"))
CASES["log_softmax_of_the_first_step"] = lambda: steps(lambda z: z[:, 0].log_softmax(-1), 0)
CASES["greatest_logits_of_steps_by_name"] = lambda: steps(
    lambda z: z.amax(1), refused="neither the mean of its logits over positions.*forward_fn", **NAMED
)
CASES["masked_mean_of_steps_by_name"] = lambda: steps(
    lambda z: z[:, :5].mean(1), refused="neither the mean of its logits over positions.*forward_fn", **NAMED
)
CASES["time_first_with_as_many_steps_as_samples"] = lambda: as_many_steps(
    steps(lambda z: z.mean(0), refused="neither the mean of its logits over positions", **NAMED)
)


def still(form):
    """Weights that stand still, so that forwards of training are those of its end."""
    form.model.requires_grad_(False)
    form.step = lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]) + 0 * model.anchor
    return form


def as_many_steps(form):
    form.batch = draw(B, B, 5), classes(B)
    return form


@case
def tagger_with_time_first_and_as_many_steps_as_samples():
    form = lstm_tagger()
    form.model = Model(lambda m, x: m.out(m.body(x.transpose(0, 1))), body=body(), out=nn.Linear(D, K))
    form.batch = draw(B, B, 5), classes(B, B)
    form.step = lambda model, batch: F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].t().flatten())
    form.refused = "positions before samples.*transposes the labels"
    return form


@case
def one_hot_integers_of_as_many_positions():
    form = steps(lambda z: z.mean(1), refused="are one-hot rows.*argmax")
    form.batch = draw(B, K, 5), F.one_hot(classes(B), K)
    form.step = lambda model, batch: F.cross_entropy(model(batch[0]), batch[1].argmax(1))
    return form


def lengths(first, later, source):
    """A mean over positions of which some are masked."""

    def forward(m, x):
        z, mask = m.out(m.body(x)), (x[..., 0] > -100).float().unsqueeze(-1)
        return (z * mask).sum(1) / mask.sum(1)

    def padded(lengths):
        x = draw(B, 4, 5)
        x[torch.arange(4) >= lengths.unsqueeze(1)] = -1000.0
        return x, classes(B)

    form = Case(Model(forward, body=body(), out=nn.Linear(D, K)), padded(first), options={"source": source})
    form.later, form.late = [padded(later)], 2
    form.refused = "was the mean over positions of the logits of the head 'net.out' on the first batch.*forward_fn"
    return form


WHOLE, SHORTER = torch.full((B,), 4), classes(B) % 3 + 2
CASES["mask_in_a_later_batch"] = lambda: lengths(WHOLE, SHORTER, "sweep")
CASES["mask_in_a_later_batch_online"] = lambda: lengths(WHOLE, SHORTER, "online")


@case
def one_step_in_the_first_batch():
    form = steps(lambda z: z[:, -1], refused="was the mean over positions.*on the first batch but not on a later")
    form.batch, form.later, form.late = (draw(B, 1, 5), classes(B)), [(draw(B, 7, 5), classes(B))], 2
    return form


@case
def head_chosen_by_the_batch():
    def forward(m, x):
        return (m.one if x[0, 0] > 0 else m.other)(m.body(x))

    model = Model(forward, body=body(), one=nn.Linear(D, K), other=nn.Linear(D, K))
    x, y = vectors()
    form = Case(model, (x.abs(), y), refused="ran on the first batch but not on a later one.*forward_fn")
    form.later, form.late = [(-x.abs(), y)], 2
    return form


class Graph(nn.Module):
    """One graph per batch; nodes are the samples."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(5, D), nn.Linear(D, K)

    def features(self, x, edges):
        return (edges @ self.inner(x)).relu()

    def forward(self, x, edges):
        return self.outer(self.features(x, edges))


@case
def graph_network():
    edges = torch.eye(B) / 2 + torch.ones(B, B) / B
    x, y = vectors()
    return Case(
        Graph(),
        {"x": x, "edges": edges, "y": y},
        lambda m, b: (m.features(b["x"], b["edges"]), m.outer.weight, b["y"]),
        step=lambda model, batch: F.cross_entropy(model.net(batch["x"], batch["edges"]), batch["y"]),
    )


# Batches.


def odd(batch, refused="", **options):
    form = plain(lambda m, h: m.out(h))
    form.batch, form.refused, form.options = batch, refused, options
    form.step = lambda model, _: F.cross_entropy(model(vectors()[0]), vectors()[1])
    form.pair = lambda m, b: (m.body(vectors()[0]), m.out.weight, vectors()[1])
    return form


CASES["with_an_index"] = lambda: odd(
    (*vectors(), torch.arange(B)), r"got a tuple of \(24, 5\) float32, \(24,\) int64, \(24,\) int64. Pass batch_fn="
)
CASES["with_an_index_by_batch_fn"] = lambda: odd((*vectors(), torch.arange(B)), batch_fn=lambda b: (b[0], b[1]))
CASES["two_views"] = lambda: odd(
    ((vectors()[0], vectors()[0]), vectors()[1]), "could not be run on the inputs.*a tuple of .*batch_fn"
)
CASES["two_views_by_batch_fn"] = lambda: odd(
    ((vectors()[0], vectors()[0]), vectors()[1]), batch_fn=lambda b: (b[0][0], b[1])
)
CASES["further_keys"] = lambda: odd(
    {"x": vectors()[0], "index": torch.arange(B), "labels": vectors()[1]}, "TypeError.*batch_fn"
)
CASES["no_labels"] = lambda: odd({"x": vectors()[0]}, "has no labels: expected one of .*Pass batch_fn")
CASES["one_hot"] = lambda: odd((vectors()[0], F.one_hot(vectors()[1], K).float()), "labels must be integers.*batch_fn")
CASES["float_class_numbers"] = lambda: odd((vectors()[0], vectors()[1].float()), r"batch_fn.*labels\.long\(\)")
CASES["bool_class_numbers"] = lambda: odd((vectors()[0], vectors()[1] > 1), r"batch_fn.*labels\.long\(\)")
CASES["two_keys_of_labels"] = lambda: odd(
    {"x": vectors()[0], "y": vectors()[1], "target": vectors()[1] % 2}, "several keys.*'y', 'target'.*batch_fn"
)
CASES["one_hot_integers"] = lambda: odd(
    (vectors()[0], F.one_hot(vectors()[1], K)), "one label per feature row.*batch_fn"
)
CASES["column_of_labels"] = lambda: odd((vectors()[0], vectors()[1].unsqueeze(1).int()))
CASES["labels_of_another_head"] = lambda: odd(
    (vectors()[0], vectors()[1] + 1),
    r"labels must be within 0\.\.3, the outputs of the head 'net.out', got 1\.\.4.*batch_fn",
)
CASES["labels_of_two_heads"] = lambda: odd((vectors()[0], {"a": vectors()[1]}), "got a tuple of .*batch_fn")
CASES["batch_fn_that_returns_no_pair"] = lambda: odd(vectors(), "batch_fn must return", batch_fn=lambda b: b[0])
CASES["unknown_layer"] = lambda: odd(vectors(), "layer 'nothing' does not exist", layers=["nothing"])
CASES["unknown_head"] = lambda: odd(vectors(), "no layer named head='fc' in", head="fc")
CASES["head_of_another_model"] = lambda: odd(vectors(), "that is not a part of", head=nn.Linear(D, K))
CASES["head_that_is_a_number"] = lambda: odd(vectors(), "head must be a dotted name", head=3)
CASES["layer_that_is_no_head"] = lambda: odd(vectors(), "neither as W h", head="net.body.1")


# Hugging Face.


def tiny(name, **options):
    import transformers  # noqa: PLC0415

    config = getattr(transformers, name + "Config")
    return lambda model: getattr(transformers, model)(config(**options))


BERT = {
    "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20,
    "num_labels": K,
}  # fmt: skip


def own_step(model, batch):
    return model.net(**batch).loss


def tokens(*shape):
    return (draw(*shape, seed=3).abs() * 1000).long() % 19 + 1


@case
def bert_classifier():
    model = tiny("Bert", **BERT)("BertForSequenceClassification")
    batch = {"input_ids": tokens(B, 5), "labels": classes(B)}
    return Case(
        model,
        batch,
        lambda m, b: (m.bert(b["input_ids"]).pooler_output, m.classifier.weight, b["labels"]),
        step=own_step,
    )


@case
def token_classification():
    model = tiny("Bert", **BERT)("BertForTokenClassification")
    labels = classes(B, 5).clone()
    labels[:, 0] = -100

    def pair(m, b):
        rows, kept = m.bert(b["input_ids"]).last_hidden_state, b["labels"] >= 0
        return rows[kept], m.classifier.weight, b["labels"][kept]

    return Case(model, {"input_ids": tokens(B, 5), "labels": labels}, pair, step=own_step)


@case
def masked_language_model():
    model = tiny("Bert", **(BERT | {"vocab_size": K + 1}))("BertForMaskedLM")
    ids, labels = classes(B, 5).clone(), torch.full((B, 5), -100)
    labels[:, 2], ids[:, 2] = classes(B), K

    def pair(m, b):
        rows = m.cls.predictions.transform(m.bert(b["input_ids"]).last_hidden_state)
        return rows[:, 2], m.cls.predictions.decoder.weight, b["labels"][:, 2]

    form = Case(model, {"input_ids": ids, "labels": labels}, pair, step=own_step)
    form.warns = "5 outputs, and the labels have 4 classes"
    return form


@case
def vit_classifier():
    model = tiny("ViT", **(BERT | {"image_size": 4, "patch_size": 2}))("ViTForImageClassification")
    x, y = images(4)
    return Case(
        model,
        {"pixel_values": x, "labels": y},
        lambda m, b: (m.vit(b["pixel_values"]).last_hidden_state[:, 0], m.classifier.weight, b["labels"]),
        step=own_step,
    )


GPT = {"n_embd": D, "n_layer": 1, "n_head": 2, "vocab_size": K, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}


def gpt(labels, pair=None, **changes):
    model = tiny("GPT2", **GPT)("GPT2LMHeadModel")

    def own(m, b):
        rows, after = m.transformer(b["input_ids"]).last_hidden_state[:, :-1], b["labels"][:, 1:]
        return rows[after >= 0], m.lm_head.weight, after[after >= 0]

    ids = tokens(B, 7) % K
    form = Case(model, {"input_ids": ids, "labels": labels(ids)}, pair or own, step=own_step)
    return dataclasses.replace(form, **changes)


CASES["causal_language_model"] = lambda: gpt(lambda ids: ids.clone())
CASES["causal_language_model_whose_labels_are_its_input"] = lambda: gpt(lambda ids: ids)
CASES["causal_language_model_with_a_prompt"] = lambda: gpt(lambda ids: torch.where(torch.arange(7) < 3, -100, ids))
CASES["causal_language_model_by_batch_fn"] = lambda: gpt(
    lambda ids: ids.clone(), options={"batch_fn": lambda b: ({"input_ids": b["input_ids"]}, b["labels"])}
)


def shift(b):
    return {"input_ids": b["input_ids"]}, F.pad(b["labels"][:, 1:], (0, 1), value=-100)


CASES["causal_language_model_shifted_by_batch_fn"] = lambda: gpt(lambda ids: ids.clone(), options={"batch_fn": shift})


@case
def causal_language_model_with_a_head_that_starts_at_zero():
    form = gpt(lambda ids: ids.clone())
    form.model.lm_head.weight = nn.Parameter(torch.zeros(K, D))
    return form


class Inside(nn.Module):
    """Calls a causal model without labels; the step calls it with them."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids):
        return self.inner(input_ids=input_ids).logits


@case
def causal_language_model_inside():
    form = gpt(lambda ids: ids.clone())
    pair = form.pair
    form.model, form.pair = Inside(form.model), lambda m, b: pair(m.inner, b)
    form.step = lambda model, batch: model.net.inner(**batch).loss
    return form


@case
def causal_language_model_in_a_pair():
    form = causal_language_model_inside()
    pair, ids = form.pair, form.batch["input_ids"]
    form.batch, form.pair = (ids, ids), lambda m, b: pair(m, {"input_ids": b[0], "labels": b[1]})
    form.step = lambda model, batch: model.net.inner(batch[0], labels=batch[1]).loss
    return form


@case
def causal_language_model_in_half_precision():
    form = gpt(lambda ids: ids.clone())
    form.model.to(torch.bfloat16)
    return form


@case
def causal_language_model_with_padding_left_out():
    form = gpt(lambda ids: torch.where(ids == 0, -100, ids))
    form.options = {"ignore_index": 0}
    form.warns = ""
    pair = form.pair

    def counted(m, b):
        rows, weight, labels = pair(m, b)
        return rows[labels != 0], weight, labels[labels != 0]

    form.pair = counted
    return form


class Logits(nn.Module):
    """A causal model whose loss is made elsewhere."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(K, D), nn.Linear(D, K)

    def features(self, ids):
        return self.embed(ids).cumsum(1)

    def forward(self, input_ids):
        return self.out(self.features(input_ids))


def next_token(model, batch):
    ids = batch["input_ids"] if isinstance(batch, dict) else batch[0]
    return F.cross_entropy(model.net(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@case
def causal_model_without_a_loss():
    ids = tokens(B, 7) % K
    return Case(
        Logits(),
        {"input_ids": ids, "labels": ids.clone()},
        refused="labels are the tokens of the input themselves, and no loss of .*Pass batch_fn",
        step=next_token,
    )


@case
def causal_language_model_with_labels_beyond_its_words():
    form = gpt(lambda ids: ids + 1, refused=r"labels must be within 0\.\.3, the outputs of the head .*, got 1\.\.4")
    form.step = lambda model, batch: model.net(batch["input_ids"]).logits.sum()
    return form


@case
def labels_shifted_by_the_collator():
    ids = tokens(B, 8) % K
    return Case(
        Logits(),
        (ids[:, :-1], ids[:, 1:]),
        lambda m, b: (m.features(b[0]).reshape(-1, D), m.out.weight, b[1].flatten()),
        step=next_token,
    )


@case
def encoder_decoder():
    model = tiny(
        "T5", d_model=D, d_kv=3, d_ff=8, num_layers=1, num_heads=2, vocab_size=K, decoder_start_token_id=0,
        tie_word_embeddings=False,
    )("T5ForConditionalGeneration")  # fmt: skip

    def pair(m, b):
        seen = []
        handle = m.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        m(**b)
        handle.remove()
        return seen[0].reshape(-1, D), m.lm_head.weight, b["labels"].flatten()

    return Case(model, {"input_ids": tokens(B, 5) % K, "labels": tokens(B, 4) % K}, pair, step=own_step)


@case
def prompt_tokens_before_the_text():
    form = labels_shifted_by_the_collator()
    form.model = Model(lambda m, ids: m.inner(torch.cat([ids[:, :2], ids], 1)), inner=Logits())
    form.step = lambda model, batch: F.cross_entropy(model.net(batch[0])[:, 2:].flatten(0, 1), batch[1].flatten())
    form.refused = r"one label per feature row, got features of shape \(24, 9, 6\).*batch_fn"
    return form


def at_the_last_token(ids, **options):
    model = tiny("GPT2", **GPT, num_labels=K, pad_token_id=0)("GPT2ForSequenceClassification")

    def pair(m, b):
        last = (b["input_ids"] != 0).sum(1) - 1
        rows = m.transformer(b["input_ids"]).last_hidden_state
        return rows[torch.arange(B), last], m.score.weight, b["labels"]

    return Case(model, {"input_ids": ids, "labels": classes(B)}, pair, step=own_step, options=options)


def sentences():
    return tokens(B, 5) % (K - 1) + 1


def with_padding():
    return sentences() * (torch.arange(5) <= classes(B, count=3).unsqueeze(1) + 2)


CASES["sequence_classification_at_the_last_token"] = lambda: at_the_last_token(sentences())
CASES["sequence_classification_by_name"] = lambda: at_the_last_token(sentences(), head="net.score")
CASES["sequence_classification_with_padding"] = lambda: at_the_last_token(with_padding())


@case
def sequence_classification_with_padding_in_a_later_batch():
    form = at_the_last_token(sentences())
    form.later, form.late = [{"input_ids": with_padding(), "labels": classes(B)}], 2
    form.refused = "at one position per sample on the first batch, and .* cannot be determined.*forward_fn"
    return form


class Generator(nn.Module):
    """Without a forward."""

    def __init__(self):
        super().__init__()
        self.body, self.judge = body(), nn.Linear(D, K)


@case
def no_forward():
    return Case(
        Generator(),
        vectors(),
        refused="could not be run.*Pass forward_fn",
        step=lambda model, batch: F.cross_entropy(model.net.judge(model.net.body(batch[0])), batch[1]),
    )


@case
def no_forward_by_forward_fn():
    form = no_forward()
    form.refused, form.options = "", {"forward_fn": lambda m, x: m.net.judge(m.net.body(x))}
    form.pair = lambda m, b: (m.body(b[0]), m.judge.weight, b[1])
    return form


assert all(callable(make) for make in itertools.chain(CASES.values()))


class Wrapped(L.LightningModule):
    """A network in a LightningModule that knows nothing of the monitor."""

    def __init__(self, form, rate):
        super().__init__()
        self.net, self.rate = form.model, rate
        self.anchor = nn.Parameter(torch.zeros(()))  # Something to train where the rest stands still.
        self._step = form.step or (lambda model, batch: nn.functional.cross_entropy(first(model(batch[0])), batch[1]))

    def forward(self, *args, **kwargs):
        return self.net(*args, **kwargs)

    def training_step(self, batch, batch_idx):
        self.trainer.steps = batch_idx + 1
        return self._step(self, batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.rate)


def first(output):
    """The first tensor of as many columns as labels need, whatever it means."""
    values = [output]
    while values:
        value = values.pop(0)
        if isinstance(value, torch.Tensor):
            return value.flatten(1) if value.ndim != 4 or value.shape[2] == 1 else value
        values += list(
            value.values()
            if isinstance(value, dict)
            else value
            if isinstance(value, tuple | list)
            else vars(value).values()
        )
    raise AssertionError


def oracle(features, weight, labels):
    """NC1, NC2 and NC3 by the book."""
    h, w, y = (t.detach().double().numpy() if t.is_floating_point() else t.numpy() for t in (features, weight, labels))
    present = np.unique(y)
    means = np.stack([h[y == k].mean(0) for k in present])
    centred, noise = means - means.mean(0), h - means[np.searchsorted(present, y)]
    between = centred.T @ centred / len(present)
    within = noise.T @ noise / len(y)
    nc1 = np.trace(within @ np.linalg.pinv(between, rcond=1e-9)) / len(present)
    etf = (np.eye(len(w)) - 1 / len(w)) / np.sqrt(len(w) - 1)
    gram = w @ w.T
    read = {"nc1": nc1, "nc2": np.linalg.norm(gram / np.linalg.norm(gram) - etf)}
    if len(present) == len(w):
        product = w @ centred.T
        read["nc3"] = np.linalg.norm(product / np.linalg.norm(product) - etf)
    return read
