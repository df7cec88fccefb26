"""NC4 against the network itself and a loop."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nclightning.functional import (
    ClassStatistics,
    class_statistics,
    cosine_margin,
    ncc_accuracy,
    ncc_mismatch,
    nearest_class_centre,
)
from nclightning.metrics import NearestClassCentre
from nclightning.metrics.borrowed import Borrowed

K, D, N = 4, 6, 40


@pytest.fixture
def data(generator):
    labels = torch.randint(K, (N,), generator=generator)
    return torch.randn(K, D, generator=generator)[labels] + torch.randn(N, D, generator=generator), labels


@pytest.fixture
def head():
    torch.manual_seed(1)
    head = nn.Linear(D, K)
    with torch.no_grad():
        head.bias.copy_(torch.tensor([2.0, -1.0, 0.5, 0.0]))  # A bias that decides.
    return head


def by_loop(features, labels, head, stats):
    right = mismatched = ncc = 0
    for h, y in zip(features, labels, strict=True):
        nearest = min(range(K), key=lambda k: float((h.double() - stats.means[k]).norm()))
        decided = int(head(h).argmax())
        ncc, right, mismatched = ncc + (nearest == y), right + (decided == y), mismatched + (decided != nearest)
    return {"ncc_accuracy": int(ncc) / N, "accuracy": int(right) / N, "ncc_mismatch": int(mismatched) / N}


def test_agrees_with_the_network_and_a_loop(head, data):
    stats = class_statistics(*data, K)
    metric = NearestClassCentre(stats, head)
    for h, y in zip(data[0].split(7), data[1].split(7), strict=True):
        metric.update(h, y)
    values, expected = metric.compute(), by_loop(*data, head, stats)
    assert values.keys() == expected.keys() | {"cosine_margin"}
    for name, value in expected.items():
        assert float(values[name]) == pytest.approx(float(value), abs=1e-15)
    assert float(values["ncc_accuracy"]) == float(ncc_accuracy(*data, stats))
    assert float(values["ncc_mismatch"]) == float(ncc_mismatch(data[0], head(data[0]).argmax(1), stats))
    margin = cosine_margin(*data, head.weight, stats.global_mean()).mean()
    assert float(values["cosine_margin"]) == pytest.approx(float(margin))


def test_the_cosine_margin_by_hand():
    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    # cos 45 degrees to both rows; 1 and 0.
    values = cosine_margin(torch.tensor([[1.0, 1.0], [3.0, 0.0]]), torch.tensor([0, 0]), rows)
    torch.testing.assert_close(values, torch.tensor([0.0, 1.0], dtype=torch.float64))


def test_classes_of_the_reference_that_are_absent_are_never_nearest(data):
    stats = class_statistics(data[0], torch.where(data[1] == 0, 1, data[1]), K)
    assert 0 not in nearest_class_centre(torch.zeros(5, D), stats).tolist()


def test_a_large_offset_of_all_features_does_not_matter(data):
    near = nearest_class_centre(data[0].double(), class_statistics(data[0].double(), data[1], K))
    shifted = data[0].double() + 1e6
    assert torch.equal(nearest_class_centre(shifted, class_statistics(shifted, data[1], K)), near)


def test_per_class_and_ignored_labels(head, data):
    stats = class_statistics(*data, K)
    metric = NearestClassCentre(stats, head, ignore_index=-1)
    metric.update(torch.cat([data[0], data[0]]), torch.cat([data[1], torch.full_like(data[1], -1)]))
    values = metric.per_class()
    share = torch.bincount(data[1], minlength=K) / N
    for name, value in metric.compute().items():
        assert float((values[name] * share).sum()) == pytest.approx(float(value))


def test_ranks_add_up(head, data):
    stats = class_statistics(*data, K)
    first, second = NearestClassCentre(stats, head), NearestClassCentre(stats, head)
    first.update(data[0][:9], data[1][:9])
    second.update(data[0][9:], data[1][9:])
    first.merge_state(second)
    whole = NearestClassCentre(stats, head)
    whole.update(*data)
    assert {k: float(v) for k, v in first.compute().items()} == pytest.approx(
        {k: float(v) for k, v in whole.compute().items()}
    )


def test_bad_input_is_refused(head, data):
    stats = class_statistics(*data, K)
    with pytest.raises(ValueError, match="head must have a weight of shape"):
        NearestClassCentre(stats, nn.Linear(D, K + 1))
    metric = NearestClassCentre(stats, head)
    metric.update(data[0], data[1] + 1)
    with pytest.raises(ValueError, match=r"labels were outside 0\.\.3"):
        metric.compute()


def test_plots(head, data):
    metric = NearestClassCentre(class_statistics(*data, K), head)
    metric.update(*data)
    figure, _ = metric.plot()
    figure.clear()


def test_update_makes_no_host_transfer(head, data):
    metric = NearestClassCentre(class_statistics(*data, K).folded, head)
    with FakeTensorMode():
        fake = lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda")  # noqa: E731
        moments = metric.reference.totals
        metric.reference = ClassStatistics(type(moments)(*map(fake, moments)), fake(metric.reference.num_invalid))
        for name in ("samples", "ncc_right", "right", "mismatched", "margin", "num_invalid"):
            setattr(metric, name, fake(getattr(metric, name)))
        metric._head = Borrowed(SimpleNamespace(weight=fake(head.weight), bias=fake(head.bias)))
        metric.update(torch.empty(8, D, device="cuda"), torch.zeros(8, dtype=torch.int64, device="cuda"))
        assert metric.margin.device.type == "cuda"


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_features_that_are_not_finite_are_wrong_and_mismatched(broken, head, data):
    """argmax takes nan for the highest score, which is that of the first class."""
    stats = class_statistics(*data, K)
    features, labels = torch.full((8, D), broken), torch.zeros(8, dtype=torch.int64)
    assert nearest_class_centre(features, stats).tolist() == [-1] * 8
    assert float(ncc_accuracy(features, labels, stats)) == 0
    assert float(ncc_mismatch(features, head(features).argmax(1), stats)) == 1
    metric = NearestClassCentre(stats, head)
    metric.update(features, labels)
    values = {name: float(value) for name, value in metric.compute().items()}
    assert [values[name] for name in ("ncc_accuracy", "ncc_mismatch", "accuracy")] == [0, 1, 0]
    metric.update(*data)  # The finite ones count as before.
    assert float(metric.compute()["ncc_accuracy"]) == pytest.approx(float(ncc_accuracy(*data, stats)) * N / (N + 8))


def test_centres_that_are_not_finite_are_nobodys_nearest(data):
    spoiled = data[0].clone()
    spoiled[0] = torch.nan
    assert set(nearest_class_centre(data[0], class_statistics(spoiled, data[1], K)).tolist()) == {-1}
