"""Weight and bias of heads, read as they are and without a trace."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

from nclightning.functional import class_statistics
from nclightning.heads import read_head, weight_shape
from nclightning.metrics import NearestClassCentre, NeuralCollapse

K, D = 3, 5
LAYERS = {
    "linear": lambda: nn.Linear(D, K),
    "without a bias": lambda: nn.Linear(D, K, bias=False),
    "convolution": lambda: nn.Conv2d(D, K, 1),
    "convolution in one dimension": lambda: nn.Conv1d(D, K, 1, bias=False),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(D, K)),
    "weight norm of columns": lambda: parametrizations.weight_norm(nn.Linear(D, K), dim=1),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(D, K)),
    "spectral norm of a convolution": lambda: parametrizations.spectral_norm(nn.Conv2d(D, K, 1)),
    "old weight norm": lambda: old_weight_norm(nn.Linear(D, K)),
    "old weight norm of all": lambda: old_weight_norm(nn.Linear(D, K), dim=None),
    "old weight norm of columns": lambda: old_weight_norm(nn.Linear(D, K), dim=1),
    "old spectral norm": lambda: old_spectral_norm(nn.Linear(D, K)),
    "pruned": lambda: prune.random_unstructured(nn.Linear(D, K), "weight", amount=3),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.nn.utils.*norm.* is deprecated")


def moved(name):
    """A layer in training mode whose parameters have changed since its last forward."""
    torch.manual_seed(0)
    layer = LAYERS[name]()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter))
    return layer


def applied(layer, rows):
    """What the layer makes of rows in eval mode."""
    with torch.no_grad():
        made = layer.eval()(rows.reshape(*rows.shape, *[1] * (layer.weight.ndim - 2))).flatten(1)
    layer.train()
    return made


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_read_is_what_the_layer_applies(name):
    layer = moved(name)
    head, rows = read_head(layer), torch.randn(7, D)  # Before the layer runs, as hooks may make its weight.
    torch.testing.assert_close(nn.functional.linear(rows, head.weight, head.bias), applied(layer, rows))
    assert weight_shape(layer) == (K, D) == (head.out_features, head.in_features)
    assert not head.weight.requires_grad


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kind", ["NeuralCollapse", "NearestClassCentre"])
def test_metrics_leave_the_layer_as_it_is(name, kind):
    """Reading the weight under spectral norm in training mode would run a power iteration."""
    layer = moved(name)
    rows, labels = torch.randn(20, D), torch.arange(20) % K
    before, random = copy.deepcopy(layer.state_dict()), torch.get_rng_state()
    if kind == "NeuralCollapse":
        metric = NeuralCollapse(K, D, layer, measures=("all",))
    else:
        metric = NearestClassCentre(class_statistics(rows, labels, K), layer)
    metric.update(rows, labels)
    read = metric.compute()
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert torch.equal(random, torch.get_rng_state())
    assert all(module.training for module in layer.modules())
    if kind == "NearestClassCentre":
        right = applied(layer, rows).argmax(dim=1) == labels
        assert float(read["accuracy"]) == pytest.approx(float(right.double().mean()))


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (nn.Conv2d(D, K, 3), "only convolutions with kernels of size 1"),
        (nn.ReLU(), "ReLU has no weight"),
        (nn.Linear(D + 1, K), r"head must have a weight of shape \(3, 5\), got \(3, 6\)"),
        ("fc", "head must be a module with a weight"),
    ],
    ids=str,
)
def test_what_is_no_head(head, message):
    with pytest.raises((ValueError, TypeError), match=message):
        NeuralCollapse(K, D, head)


def test_a_pair_and_a_weight():
    weight, bias = torch.randn(K, D), torch.randn(K)
    rows, labels = torch.randn(20, D), torch.arange(20) % K
    layer = nn.Linear(D, K)
    layer.load_state_dict({"weight": weight, "bias": bias})
    read = []
    for head in (layer, (weight, bias)):
        metric = NeuralCollapse(K, D, head, measures=("nc3", "bias_collapse"))
        metric.update(rows, labels)
        read.append(metric.compute())
    assert read[0] == read[1]
