"""Finding a head and capturing what enters it."""

import pytest
import torch
from torch import nn

from nclightning.probe.features import FeatureHooks, call_model, capture_features, pair_rows, split_batch


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


def test_sequences_of_features_are_refused(net):
    with pytest.raises(ValueError, match=r"one feature row per sample, got shape \(5, 2, 4\)"):
        capture_features(net, net.head, torch.randn(5, 2, 3))


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


def test_split_batch():
    x, y = torch.ones(3, 2), torch.zeros(3, dtype=torch.int64)
    assert split_batch((x, y)) == (x, y)
    assert split_batch([x, y]) == (x, y)
    inputs, labels = split_batch({"pixel_values": x, "mask": x, "labels": y})
    assert list(inputs) == ["pixel_values", "mask"]
    assert labels is y
    with pytest.raises(ValueError, match=r"keys \['a', 'b'\] has no labels: expected one of labels"):
        split_batch({"a": x, "b": y})
    with pytest.raises(
        ValueError, match=r"expected batches \(x, y\) .*, got a list of \(3, 2\) float32, .* Pass batch_fn="
    ):
        split_batch([x, y, y])


@pytest.mark.parametrize("inference", [False, True])
def test_taps_copy_what_a_model_goes_on_writing_to(inference):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    with FeatureHooks(model[2], {"first": model[0]}) as hooks, torch.inference_mode(inference), torch.no_grad():
        hidden = model[0](torch.randn(5, 3, generator=torch.Generator().manual_seed(0)))
        before, used = hidden.clone(), model[1](hidden).clone()
        model[2](hidden)
        hidden.data.zero_()
        kept = hooks.take()
        assert torch.equal(kept["first"], before)
        assert torch.equal(kept[""], used)
        assert not torch.equal(before, used)
        with pytest.raises(ValueError, match="the head did not run here"):
            hooks.take()
    assert not model[2]._forward_pre_hooks


def test_layers_without_a_tensor_are_refused():
    class Odd(nn.Module):
        def forward(self, x):
            return "text"

    model = nn.Sequential(nn.Linear(3, 2))
    odd = Odd()
    with FeatureHooks(model[0], {"odd": odd}) as hooks:
        odd(torch.ones(1))  # The forward itself is the user's and goes on.
        with pytest.raises(ValueError, match="layer 'odd' returns no tensor"):
            hooks.take()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.ones(3), "labels must be integers, got torch.float32"),
        (torch.ones(2, dtype=torch.int64), "one label per"),
    ],
)
def test_labels_that_do_not_pair(labels, message):
    with pytest.raises((TypeError, ValueError), match=message):
        pair_rows(torch.ones(3, 2), labels)


def test_labels_of_any_integer_type_and_of_one_column():
    for labels in (torch.arange(3, dtype=torch.int32), torch.arange(3).unsqueeze(1)):
        features, paired = pair_rows(torch.ones(3, 2), labels)
        assert paired.dtype == torch.int64
        assert paired.tolist() == [0, 1, 2]
        assert features.shape == (3, 2)


class TakesKeywords(nn.Module):
    def forward(self, x, mask=None):
        return x if mask is None else x * mask


class TakesAll(nn.Module):
    def forward(self, **batch):
        return batch["x"] + 1


class TakesTheMapping(nn.Module):
    def forward(self, batch):
        return batch["x"] + 2 if isinstance(batch, dict) else batch + 3


@pytest.mark.parametrize(
    ("module", "inputs", "value"),
    [
        (TakesKeywords(), 1.0, 1.0),
        (TakesKeywords(), {"x": 1.0}, 1.0),
        (TakesKeywords(), {"x": 1.0, "mask": 0.0}, 0.0),
        (TakesAll(), {"x": 1.0, "y": 5.0}, 2.0),
        (TakesTheMapping(), {"x": 1.0, "y": 5.0}, 3.0),
        (TakesTheMapping(), {"x": 1.0}, 4.0),  # What is left of a batch without its labels.
    ],
)
def test_how_a_module_is_called(module, inputs, value):
    assert call_model(module, inputs) == value


def test_names_that_a_module_does_not_know_are_its_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'index'"):
        call_model(TakesKeywords(), {"x": 1.0, "index": 3})
