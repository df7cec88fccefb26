"""What must not change the measures, whatever the data."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nclightning.metrics import MEASURES, NeuralCollapse

# Those of the squared error and of the bias see the scale of the logits.
SCALE_FREE = tuple(n for n in MEASURES if not n.startswith("mse") and n not in ("bias_collapse", "nc0"))
WELL_POSED = tuple(n for n in MEASURES if not n.startswith("mse"))
cases = st.tuples(
    st.integers(0, 10**6), st.integers(2, 7), st.integers(1, 9), st.integers(2, 6), st.sampled_from([1.0, 1e-2, 1e-4])
)


def draw(case):
    """Features, labels, head and generator; every class at least twice, unbalanced."""
    seed, K, d, n, noise = case
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    labels = torch.cat([torch.arange(K).repeat(2), torch.randint(K, (n * K,), generator=generator)])
    head = nn.Linear(d, K, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(normal(K, d))
        head.bias.copy_(normal(K))
    return normal(K, d)[labels] + noise * normal(len(labels), d), labels, head, generator


def changed(head, weight, bias=None):
    new = nn.Linear(weight.shape[1], len(weight), dtype=torch.float64)
    with torch.no_grad():
        new.weight.copy_(weight)
        new.bias.copy_(head.bias if bias is None else bias)
    return new


def read(features, labels, head, measures):
    metric = NeuralCollapse(head.out_features, head.in_features, head, measures)
    metric.update(features, labels)
    return {name: float(value) for name, value in metric.compute().items()}


def close(values, reference):
    # Drawn means may nearly coincide along a direction: NC1 then amplifies rounding by their condition number. Those of
    # the squared error solve with the second moments, whose own goes with the inverse square of the noise.
    return all(
        values[name] == pytest.approx(each, rel=1e-4 if name.startswith("mse") else 1e-6, abs=1e-9, nan_ok=True)
        for name, each in reference.items()
    )


@settings(max_examples=40, deadline=None)
@given(cases)
def test_rotation_order_and_relabelling(case):
    features, labels, head, generator = draw(case)
    # Regression on features that hardly spread has no digits to compare.
    measures = ("all",) if case[-1] > 1e-4 else WELL_POSED
    expected = read(features, labels, head, measures)
    width = features.shape[1]
    Q = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator)).Q
    assert close(read(features @ Q, labels, changed(head, head.weight @ Q), measures), expected)
    order = torch.randperm(len(labels), generator=generator)
    assert close(read(features[order], labels[order], head, measures), expected)
    classes = torch.randperm(head.out_features, generator=generator)
    back = torch.argsort(classes)
    assert close(read(features, classes[labels], changed(head, head.weight[back], head.bias[back]), measures), expected)


@settings(max_examples=40, deadline=None)
@given(cases, st.sampled_from([1e-5, 1e-2, 1e3]), st.sampled_from([0.0, 1.0, 100.0]))
def test_scale_and_shift(case, scale, shift):
    features, labels, head, _ = draw(case)
    expected = read(features, labels, head, SCALE_FREE)
    weight = changed(head, 3 * head.weight)
    assert close(read(scale * (features + shift), labels, weight, SCALE_FREE), expected)


@settings(max_examples=40, deadline=None)
@given(cases, st.lists(st.integers(0, 60), max_size=5), st.integers(1, 4))
def test_split_over_batches_and_ranks(case, cuts, num_ranks):
    features, labels, head, generator = draw(case)
    expected = read(features, labels, head, ("all",))
    bounds = sorted({0, len(labels), *(min(cut, len(labels)) for cut in cuts)})
    ranks = [NeuralCollapse(head.out_features, head.in_features, head, ("all",)) for _ in range(num_ranks)]
    for start, end in itertools.pairwise(bounds):
        rank = int(torch.randint(num_ranks, (), generator=generator))  # Some may get no batch.
        ranks[rank].update(features[start:end], labels[start:end])
    gathered = NeuralCollapse(head.out_features, head.in_features, head, ("all",))
    for metric in ranks:
        metric._fold()
    for name in set(gathered._names) - {"kept"}:
        setattr(gathered, name, torch.stack([getattr(metric, name) for metric in ranks]))
    assert close({name: float(v) for name, v in gathered.read(gathered.statistics).items()}, expected)
