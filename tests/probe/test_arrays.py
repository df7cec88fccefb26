"""Features, labels and heads as arrays: measured right in every form, or refused with the repair."""

import numpy as np
import pytest
import torch
from torch import nn

from nclightning import measure
from nclightning.metrics import MEASURES, NearestClassCentre, NeuralCollapse

K, D, N = 4, 6, 24


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


Y = torch.arange(N) % K
MEANS = draw(K, D, seed=1)
X = MEANS[Y] + 0.1 * draw(N, D)
W, B = MEANS - MEANS.mean(0), draw(K, seed=2)
PAIR = {"features": X, "labels": Y, "weight": W, "bias": B}
RIGHT = measure(**PAIR)


def big_endian(array):
    return array.astype(array.dtype.newbyteorder(">"))


def locked(array):
    array = array.copy()
    array.flags.writeable = False
    return array


class Frame:
    """As a data frame or an array of another library is."""

    def __init__(self, array):
        self._array = array

    def __array__(self, dtype=None, copy=None):
        return self._array


SAME = {
    "numpy": {"features": X.numpy(), "labels": Y.numpy(), "weight": W.numpy(), "bias": B.numpy()},
    "lists": {"features": X.tolist(), "labels": Y.tolist(), "weight": W.tolist(), "bias": B.tolist()},
    "tuples": {"features": tuple(map(tuple, X.tolist())), "labels": tuple(Y.tolist())},
    "list of feature vectors": {"features": list(X), "labels": list(Y)},
    "list of numpy rows": {"features": list(X.numpy()), "labels": list(Y.numpy())},
    "float64": {"features": X.double(), "weight": W.double()},
    "longdouble": {"features": X.numpy().astype(np.longdouble)},
    "read only": {"features": locked(X.numpy()), "labels": locked(Y.numpy())},
    "big endian": {"features": big_endian(X.numpy()), "labels": big_endian(Y.numpy())},
    "negative strides": {"features": X.flip(0).numpy()[::-1], "labels": Y.flip(0).numpy()[::-1]},
    "transposed memory": {"features": X.t().contiguous().t(), "weight": W.t().contiguous().t()},
    "array interface": {"features": Frame(X.numpy()), "labels": Frame(Y.numpy())},
    "parameters": {"features": X.clone().requires_grad_(), "weight": nn.Parameter(W), "bias": nn.Parameter(B)},
    "a column of labels": {"labels": Y.unsqueeze(1)},
    "positions": {"features": X.reshape(4, 6, D), "labels": Y.reshape(4, 6)},
    "kernels of size 1": {"weight": W[:, :, None, None]},
    "ignored samples": {
        "features": torch.cat([X, torch.full((3, D), torch.nan)]),
        "labels": torch.cat([Y, torch.full((3,), -100)]),
    },
    "another order": {"features": X.flip(0), "labels": Y.flip(0)},
} | {f"labels in {dtype}": {"labels": Y.numpy().astype(dtype)} for dtype in ("i1", "u1", "i2", "u2", "i4", "u4", "u8")}


@pytest.mark.parametrize("name", SAME)
def test_the_same_in_every_form(name):
    found = measure(**PAIR | SAME[name])
    assert dict(found) == pytest.approx(dict(RIGHT), rel=1e-12)
    assert found.counts.tolist() == [6] * K


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_measured_as_it_is(dtype):
    found = measure(features=X.to(dtype), labels=Y, weight=W.to(dtype))
    assert dict(found) == pytest.approx(
        dict(measure(features=X.to(dtype).double(), labels=Y, weight=W.to(dtype).double()))
    )
    assert dict(found) == pytest.approx(dict(RIGHT), rel=0.1)


@pytest.mark.filterwarnings("error")
def test_memory_maps_are_read_without_a_warning(tmp_path):
    np.save(tmp_path / "x.npy", X.numpy())
    assert dict(measure(**PAIR | {"features": np.load(tmp_path / "x.npy", mmap_mode="r")})) == dict(RIGHT)


def test_is_what_the_metrics_say():
    found = measure(**PAIR, measures=("all",))
    metric = NeuralCollapse(K, D, (W, B), measures=("all",))
    decisions = NearestClassCentre(metric.statistics, (W, B))
    for i in range(0, N, 5):
        metric.update(X[i : i + 5], Y[i : i + 5])
    decisions.reference = metric.statistics
    decisions.update(X, Y)
    right = {name: float(value) for name, value in (metric.compute() | decisions.compute()).items()}
    assert dict(found) == pytest.approx(right, rel=1e-12, abs=1e-12)
    assert found.rank == right["nc1_rank"]
    table = found.per_class()
    for name, column in (metric.per_class() | decisions.per_class()).items():
        assert table[name] == pytest.approx(column.numpy(), rel=1e-12), name


def test_names_choose_values_in_their_order():
    names = ("accuracy", "nc3", "nc1_cdnv", "ncc_accuracy")
    assert tuple(measure(**PAIR, measures=names)) == names
    assert tuple(measure(**PAIR, measures=iter(names))) == names
    assert tuple(measure(**PAIR, measures=["cosine_margin"])) == ("cosine_margin",)


def test_conventions_are_those_of_the_metric():
    kept = slice(0, N - 3)
    options = {"global_mean": "sample", "between_weights": "count"}
    found = measure(features=X[kept], labels=Y[kept], measures=("nc1",), **options)
    metric = NeuralCollapse(K, D, measures=("nc1",), **options)
    metric.update(X[kept], Y[kept])
    assert found["nc1"] == pytest.approx(float(metric.compute()["nc1"]), rel=1e-12)
    assert found["nc1"] != measure(features=X[kept], labels=Y[kept])["nc1"]


def test_without_a_head_only_what_needs_none():
    plain = {"features": X, "labels": Y}
    found = measure(**plain)
    assert (list(found), found.left_out, found.head) == (["nc1"], ("nc2", "nc3"), None)
    every = measure(**plain, measures=("all",))
    assert set(every) == {name for name in MEASURES if not MEASURES[name].needs_head} | {"ncc_accuracy"}
    assert set(every) | set(every.left_out) == {*MEASURES, "ncc_accuracy", "ncc_mismatch", "accuracy", "cosine_margin"}
    assert "head_norm" not in every.per_class()


def test_classes_of_the_head_without_samples_are_left_out():
    kept = Y != 1
    found = measure(features=X[kept], labels=Y[kept], weight=W)
    assert (found.num_classes, found.counts.tolist()) == (4, [6, 0, 6, 6])
    assert np.isnan(found.per_class()["variance"]).tolist() == [False, True, False, False]


def test_labels_from_1_belong_to_a_head_with_a_row_for_class_0():
    found = measure(features=X, labels=Y + 1, weight=torch.cat([W[:1], W]))
    assert found.counts.tolist() == [0, 6, 6, 6, 6]
    assert found["nc1"] == pytest.approx(RIGHT["nc1"], rel=1e-12)


def test_what_surrounds_the_call_changes_nothing():
    with torch.inference_mode():
        assert dict(measure(**PAIR)) == dict(RIGHT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert dict(measure(**PAIR)) == dict(RIGHT)
    torch.set_default_dtype(torch.float64)
    try:
        assert dict(measure(**PAIR)) == dict(RIGHT)
    finally:
        torch.set_default_dtype(torch.float32)


def test_arguments_are_left_as_they_are():
    given = {name: value.clone().requires_grad_(value.is_floating_point()) for name, value in PAIR.items()}
    before, state = {name: value.detach().clone() for name, value in given.items()}, torch.get_rng_state()
    measure(**given, measures=("all",)).plot()
    assert all(torch.equal(given[name], before[name]) and given[name].grad is None for name in given)
    assert torch.equal(state, torch.get_rng_state())


def hot():
    return nn.functional.one_hot(Y, K)


def with_nan():
    return torch.where(torch.arange(N).unsqueeze(1) == 3, torch.nan, X)


REFUSED = {
    "transposed weight": ({"weight": W.T}, r"weight must have shape \(K, 6\).*got \(6, 4\): pass weight.T"),
    "weight of another layer": ({"weight": draw(K, 9)}, r"weight must have shape \(K, 6\).*got \(4, 9\)"),
    "integer weight": ({"weight": W.long()}, "weight must be floating"),
    "a layer for weight": ({"weight": nn.Linear(D, K)}, "weight must be a tensor.*got a Linear: pass layer.weight"),
    "weight with nan": ({"weight": W / 0}, "weight has numbers that are not finite"),
    "bias of another head": ({"bias": draw(K + 1)}, r"bias must be floating of shape \(4,\).*got \(5,\) float32"),
    "bias alone": ({"weight": None}, "bias was given without weight: pass weight="),
    "one-hot labels": (
        {"labels": hot()},
        r"labels must be class numbers.*got \(24, 4\) int64: pass labels.argmax\(-1\)",
    ),
    "soft labels": ({"labels": hot().float()}, r"labels must be class numbers.*argmax"),
    "float labels": ({"labels": Y.float()}, r"labels must be integers, got \(24,\) float32: pass labels.long\(\)"),
    "bool labels": ({"labels": (Y > 1).numpy()}, r"labels must be integers.*labels.astype\(int\)"),
    "names as labels": (
        {"labels": ["cat", "dog"] * 12},
        r"labels must be numbers.*unique\(labels, return_inverse=True",
    ),
    "labels from 1": (
        {"labels": Y + 1},
        r"labels must be within 0..3, since weight has 4 rows, got 1..4: pass labels - 1",
    ),
    "labels of another head": ({"labels": Y + 7}, r"within 0..3.*got 7..10: pass the weight of the head"),
    "labels from 1 without a head": (
        {"labels": Y + 1, "weight": None, "bias": None},
        r"labels must number the classes from 0 on, got 1..4: pass labels - 1, or weight=",
    ),
    "numbers of samples as labels": (
        {"labels": torch.arange(N) * 10**6, "weight": None, "bias": None},
        r"24 labels go up to 23000000: pass torch.unique\(labels, return_inverse=True\)\[1\]",
    ),
    "negative labels": ({"labels": Y - 1}, r"labels must be within 0..K-1, got -1..2: pass ignore_index=-1"),
    "labels all left out": ({"labels": torch.full((N,), -100)}, "all labels are -100, which ignore_index leaves out"),
    "features with nan": ({"features": with_nan()}, r"not finite in 1 of 24 rows: pass features\[ok\]"),
    "integer features": ({"features": (X * 10).long()}, "features must be floating, got .* int64"),
    "features as bytes": ({"features": (X * 10).byte().numpy()}, "features must be floating, got .* uint8"),
    "complex features": ({"features": X.cfloat()}, "features must be floating, got .* complex64"),
    "transposed features": ({"features": X.T}, r"features of shape \(6, 24\).*pass features.T"),
    "maps": ({"features": draw(N, D, 2, 2)}, r"features of shape \(24, 6, 2, 2\).*flatten\(2\).mean\(2\)"),
    "positions without labels": ({"features": draw(N, 3, D)}, r"features.mean\(1\).*or labels of shape \(24, 3\)"),
    "other numbers of rows": ({"labels": Y[:-1]}, r"labels of shape \(23,\): pass labels of shape \(24,\)"),
    "a single feature": ({"features": X[:, 0]}, r"pass features of shape \(N, d\).*reshape\(-1, 1\)"),
    "batches in a list": ({"features": [X[:12], X[12:]]}, r"got a list of tensors: pass torch.cat\(features\)"),
    "batches of numpy in a list": ({"features": [X[:11].numpy(), X[11:].numpy()]}, r"numpy.concatenate\(features\)"),
    "batches of labels in a list": ({"labels": [Y[:12], Y[12:]]}, r"got a list of tensors: pass torch.cat\(labels\)"),
    "a mapping": ({"features": {"a": X}}, "features must be a tensor.*got a dict"),
    "sparse": ({"features": X.to_sparse()}, r"features must be a dense tensor.*to_dense"),
    "masked": ({"features": np.ma.masked_array(X.numpy(), X.numpy() > 0)}, "features must not be masked"),
    "without values": ({"features": X.to("meta")}, "features must be a dense tensor with values"),
    "objects": ({"features": X.numpy().astype(object)}, r"features must be numbers.*astype\(numpy.float32\)"),
    "empty": (
        {"features": X[:0], "labels": Y[:0]},
        r"features and labels must not be empty, got shapes \(0, 6\) and \(0,\)",
    ),
    "without columns": ({"features": X[:, :0]}, r"must not be empty, got shapes \(24, 0\)"),
    "empty lists": ({"features": [], "labels": []}, "must not be empty"),
    "one class": ({"labels": Y * 0, "weight": None, "bias": None}, "compares classes, and there is only one"),
    "a head of one class": (
        {"labels": Y * 0, "weight": W[:1], "bias": None},
        "there is only one.*a weight with a row for",
    ),
    "a head's measure without a head": (
        {"weight": None, "bias": None, "measures": ("nc1", "nc2")},
        r"measures \['nc2'\] need the head: pass weight=",
    ),
    "an unknown measure": ({"measures": ("nc9",)}, "measures must be different names.*Further names are ncc_accuracy"),
    "a measure twice": ({"measures": ("nc1", "nc1")}, "measures must be different names"),
    "no measures": ({"measures": ()}, "measures must be different names"),
    "a string of measures": ({"measures": "nc1"}, r"got the string 'nc1'; write \('nc1',\)"),
    "no labels": ({"labels": None}, "labels"),
    "an unknown convention": ({"global_mean": "median"}, "global_mean must be 'class' or 'sample'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_repair(name):
    changes, words = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=f"(?s){words}") as caught:
        measure(**PAIR | changes)
    assert "\n" not in str(caught.value)
    assert str(caught.value).rstrip(".").count(". ") <= 2
