"""What one sweep leaves to the next."""

import pytest
import torch
from torch import nn

from nclightning.functional import class_statistics
from nclightning.probe.collectors import Measuring

K, D = 3, 5


def rows(seed, count=40, dim=D):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator), torch.randint(K, (count,), generator=generator)


def collect(collection, samples, **layers):
    collection.add({"": samples[0], **layers}, samples[1])
    return collection.statistics()


@pytest.mark.parametrize("fails", [False, True])
def test_a_collection_that_is_taken_again_starts_from_nothing(fails):
    head, measuring = nn.Linear(D, K), Measuring()
    first = measuring.statistics_collector(head)
    if fails:
        first.add({"": rows(0)[0]}, rows(0)[1])  # A sweep that ended here.
    else:
        before = collect(first, rows(0))[""]
        known = before.means.clone()
    again = measuring.statistics_collector(head, first)
    assert again is first
    read = again.read(collect(again, rows(1)))
    fresh = measuring.statistics_collector(head)
    assert read == fresh.read(collect(fresh, rows(1)))
    if not fails:
        assert torch.equal(before.means, known)  # What was handed out stays.
        expected = class_statistics(*rows(0), K).scatter
        torch.testing.assert_close(before.scatter, expected, rtol=1e-12, atol=1e-12)


def test_further_layers_may_have_another_size_on_another_data_set():
    head, measuring = nn.Linear(D, K), Measuring()
    first = measuring.statistics_collector(head)
    collect(first, rows(0), layer=rows(2, dim=7)[0])
    again = measuring.statistics_collector(head, first)
    assert collect(again, rows(1), layer=rows(3, dim=4)[0])["layer"].means.shape == (K, 4)


@pytest.mark.parametrize("other", [nn.Linear(D, K), nn.Linear(D + 1, K), nn.Linear(D, K, device="meta")], ids=str)
def test_another_head_has_a_collection_of_its_own(other):
    measuring = Measuring()
    first = measuring.statistics_collector(nn.Linear(D, K))
    assert measuring.statistics_collector(other, first) is not first


def test_a_head_that_grew_has_a_collection_of_its_own():
    head, measuring = nn.Linear(D, K), Measuring()
    first = measuring.statistics_collector(head)
    head.weight, head.out_features = nn.Parameter(torch.zeros(K + 1, D)), K + 1
    again = measuring.statistics_collector(head, first)
    assert again is not first
    collect(again, rows(0))
