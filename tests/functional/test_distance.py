"""Distance to collapse with fitted scales."""

import math

import pytest
import torch

from nclightning.functional import class_statistics, distance_to_collapse
from tests.functional.inputs import draw, etf


def measure(features, labels, weight):
    return distance_to_collapse(class_statistics(features, labels, len(weight), scatter=False), weight)


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (1e-6, 1e3), (7.0, 1e-5)])
@pytest.mark.parametrize("unbalanced", [False, True])
def test_vanishes_at_collapse_of_any_size_orientation_and_shift(a, b, unbalanced):
    frame = etf(4, 6)
    labels = torch.tensor([0, 1, 2, 3] * 3 + [0] * 7 * unbalanced)
    found = measure(b * (frame[labels] + draw(6)), labels, a * frame)
    assert float(found.distance) <= 1e-14
    assert float(found.head_scale) == pytest.approx(a, rel=1e-13)
    assert float(found.feature_scale) == pytest.approx(b, rel=1e-13)


@pytest.mark.parametrize("step", [1e-2, 1e-5, 1e-8])
def test_grows_linearly_from_collapse(step):
    """Within-class noise of relative size ``step`` is that distance, up to what its class means take."""
    frame, labels = etf(4, 6), torch.arange(4000) % 4
    noise = draw(4000, 6)
    found = measure(frame[labels] + step * noise, labels, frame)
    expected = step * float(noise.norm()) / float(frame[labels].norm())
    assert float(found.features) == pytest.approx(expected, rel=5e-3 + 2 * expected)
    # sqrt(1/2) of the part of the features, for the head's is small.
    assert float(found.distance) == pytest.approx(float(found.features) / math.sqrt(2), rel=1e-2)


def test_no_other_frame_is_closer_to_the_normalised_pair():
    """The frame maximises its inner product with head and means, each divided by its norm."""
    weight, labels = draw(4, 6), torch.arange(40) % 4
    features = draw(4, 6, seed=1)[labels] + 0.1 * draw(40, 6, seed=2)
    means = class_statistics(features, labels, 4).centred_means
    direction = weight / weight.norm() + means / means.norm()
    frame_value = float(torch.linalg.svdvals(direction - direction.mean(0)).sum())
    others = [float((direction * etf(4, 6, seed=seed)).sum()) for seed in range(200)]
    assert max(others) <= frame_value
    found = measure(features, labels, weight)
    assert 0 < float(found.distance) <= 1
    assert float(found.distance) == pytest.approx(math.hypot(found.head, found.features) / math.sqrt(2), rel=1e-12)


def test_absent_classes_are_left_out():
    weight = draw(4, 6)
    weight[[0, 1, 3]] = etf(3, 6)
    found = measure(weight[[0, 1, 3]], torch.tensor([0, 1, 3]), weight)
    assert float(found.distance) <= 1e-14


def test_fewer_dimensions_than_an_etf_needs():
    rows = torch.linalg.qr(draw(5, 2) - draw(5, 2).mean(0)).Q
    labels = torch.arange(10) % 5
    assert float(measure(rows[labels], labels, 3 * rows).distance) <= 1e-14


@pytest.mark.parametrize(
    ("features", "weight"),
    [(draw(6, 3), torch.zeros(2, 3)), (torch.ones(6, 3), torch.eye(3)[:2]), (draw(6, 3) / 0, torch.eye(3)[:2])],
)
def test_undefined_is_nan(features, weight):
    assert measure(features.double(), torch.arange(6) % 2, weight.double()).distance.isnan()


def test_bad_shapes():
    with pytest.raises(ValueError, match=r"weight must have shape \(2, 3\)"):
        distance_to_collapse(class_statistics(draw(6, 3), torch.arange(6) % 2, 2), draw(2, 4))
