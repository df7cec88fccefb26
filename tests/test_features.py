"""Finding a head and capturing what enters it."""

import pytest
import torch
from torch import nn

from nclightning.features import capture_features, find_head


class Net(nn.Module):
    def __init__(self, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.head(torch.relu(self.body(x)))


@pytest.fixture
def net():
    return Net(body=nn.Linear(3, 4), head=nn.Linear(4, 2))


def test_head_by_attribute_by_name_and_alone(net):
    assert find_head(net) is net.head
    assert find_head(net, "body") is net.body
    assert find_head(nn.Sequential(nn.ReLU(), nn.Linear(3, 2))).out_features == 2


def test_missing_head_lists_the_candidates(net):
    with pytest.raises(ValueError, match=r"no nn.Linear named 'fc' in Net; linear layers are: 'body', 'head'"):
        find_head(net, "fc")
    with pytest.raises(ValueError, match="linear layers are: none"):
        find_head(nn.ReLU())


def test_capture_returns_the_input_of_the_head_with_its_graph(net):
    x = torch.randn(5, 3)
    features = capture_features(net, net.head, x)
    torch.testing.assert_close(features, torch.relu(net.body(x)))
    assert features.requires_grad


def test_no_hook_is_left_after_success_or_failure(net):
    capture_features(net, net.head, torch.randn(5, 3))
    with pytest.raises(RuntimeError):
        capture_features(net, net.head, torch.randn(5, 7))
    assert not net.head._forward_pre_hooks


def test_a_head_that_does_not_run_once_is_refused(net):
    with pytest.raises(ValueError, match="ran 0 times"):
        capture_features(net, nn.Linear(4, 2), torch.randn(5, 3))
