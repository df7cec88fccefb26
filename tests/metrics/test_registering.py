"""Measures of users, from outside of the package."""

import math

import pytest
import torch
from torch import nn

import nclightning
from nclightning.metrics import MEASURES, NeuralCollapse, register_measure
from nclightning.quantities import QUANTITIES

FEATURES, LABELS = torch.tensor([[2.0, 0.0], [2.0, 1.0], [-2.0, 0.0]]), torch.tensor([0, 0, 1])


@pytest.fixture(autouse=True)
def _forget():
    registries = MEASURES, QUANTITIES
    before = [dict(each) for each in registries]
    yield
    for each, entries in zip(registries, before, strict=True):
        each.clear()
        each.update(entries)


def twice_the_samples(**options):
    @register_measure("twice", "twice the number of samples", **options)
    def twice(reading):
        return 2 * reading.stats.counts.sum()

    return twice


def test_it_is_evaluated_wherever_measures_are_chosen():
    twice_the_samples(at_collapse=lambda num_classes, feature_dim: num_classes * feature_dim)
    found = nclightning.measure(features=FEATURES, labels=LABELS, measures=("twice", "nc1"))
    assert found["twice"] == 6.0
    assert "twice the number of samples" in str(found)
    assert "twice" in nclightning.measure(features=FEATURES, labels=LABELS, measures=("all",))
    metric = NeuralCollapse(2, 2, measures=("twice",))
    metric.update(FEATURES, LABELS)
    assert metric.compute()["twice"].dtype == torch.float64
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    probe = nclightning.Probe(model, measures=("twice",))
    assert probe.read([(FEATURES, LABELS)])["twice"] == 6.0


def test_what_it_needs_is_asked_for():
    register_measure("of_head", "sum of the bias", needs_head=True)(lambda reading: reading.bias.sum())
    register_measure("of_scatter", "spread", needs_scatter=True)(lambda reading: reading.stats.root.square().sum())
    arguments = {"features": FEATURES, "labels": LABELS}
    with pytest.raises(ValueError, match=r"of_head.* need the head"):
        nclightning.measure(**arguments, measures=("of_head",))
    assert "of_head" not in nclightning.measure(**arguments, measures=("all",))
    found = nclightning.measure(
        **arguments, weight=torch.eye(2), bias=torch.ones(2), measures=("of_head", "of_scatter")
    )
    assert found["of_head"] == 2.0
    assert found["of_scatter"] == pytest.approx(0.5)
    assert NeuralCollapse(2, 2, measures=("of_scatter",)).keeps_scatter
    assert not NeuralCollapse(2, 2, torch.eye(2), measures=("of_head",)).keeps_scatter


def test_labels_of_groups_leave_out_what_takes_them_for_classes():
    twice_the_samples()
    with pytest.raises(ValueError, match="twice"):
        NeuralCollapse(3, 2, measures=("twice",), groups=True)
    twice_the_samples(needs_classes=False)  # Once more under the same name.
    assert NeuralCollapse(3, 2, measures=("twice",), groups=True).measures == ("twice",)


@pytest.mark.parametrize("name", ["nc1", "accuracy", "nc5"])
def test_names_of_the_package_are_kept(name):
    before = MEASURES.get(name)
    with pytest.raises(ValueError, match=f"name='{name}' is a measure of the package"):
        register_measure(name, "mine")
    assert MEASURES.get(name) is before


def test_a_name_is_an_identifier():
    with pytest.raises(ValueError, match=r"name must be an identifier such as .*, got 'val/mine'"):
        register_measure("val/mine", "mine")


@pytest.mark.parametrize(("value", "got"), [(torch.zeros(2), r"shape \(2,\)"), (None, "None"), ({"a": 1}, "{'a': 1}")])
def test_one_number_is_returned(value, got):
    register_measure("mine", "mine")(lambda reading: value)
    with pytest.raises(TypeError, match=f"the function of the measure 'mine' must return one number, got .*{got}"):
        nclightning.measure(features=FEATURES, labels=LABELS, measures=("mine",))


def test_numbers_of_python_will_do():
    register_measure("mine", "mine")(lambda reading: math.inf)
    assert nclightning.measure(features=FEATURES, labels=LABELS, measures=("mine",))["mine"] == math.inf
