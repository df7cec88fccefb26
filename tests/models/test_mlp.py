"""The two-layer network."""

import math

import pytest
import torch
from torch import nn

from nclightning.callbacks import NeuralCollapseMonitor, OptimalityMonitor
from nclightning.callbacks.rows import Rows
from nclightning.data import GaussianDataModule
from nclightning.models import TwoLayerBody, TwoLayerMLP
from tests.trainers import quiet_trainer

SIZES = {"num_classes": 3, "samples_per_class": 4, "feature_dim": 5, "input_dim": 30, "hidden_dim": 16}
ACTIVATIONS = {
    "identity": lambda a: a,
    "relu": lambda a: a * (a > 0),
    "leaky_relu": lambda a: torch.where(a > 0, a, 0.01 * a),
    "gelu": lambda a: a * (1 + torch.erf(a / math.sqrt(2))) / 2,
    "tanh": lambda a: 1 - 2 / (torch.exp(2 * a) + 1),
    "sigmoid": lambda a: 1 / (1 + torch.exp(-a)),
}


def mlp(loss="mse", **options):
    torch.manual_seed(0)
    return TwoLayerMLP(**(SIZES | {"loss": loss, "lambda_": 5e-3} | options))


def data():
    module = GaussianDataModule()
    module.adopt(mlp())
    return module.batch()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("loss", ["mse", "ce"])
@pytest.mark.parametrize("penalty", ["features", "weights"])
def test_the_objective_is_the_papers(activation, loss, penalty):
    """Problem (1) and (2) written out sample by sample."""
    model = mlp(loss, activation=activation, feature_activation="tanh", penalty=penalty, init="torch")
    x, labels = data()
    first, second, head = model.backbone[0], model.backbone[2], model.head
    total = 0.0
    for sample, label in zip(x, labels, strict=True):
        hidden = ACTIVATIONS[activation](first.weight @ sample + first.bias)
        feature = torch.tanh(second.weight @ hidden + second.bias)
        if loss == "mse":
            z = head.weight @ feature + head.bias
            total = total + ((z - torch.eye(3, dtype=z.dtype)[label]) ** 2).sum() / 2 / len(x)
        else:
            z = head.weight @ feature
            total = total - (z[label] - torch.log(torch.exp(z).sum())) / len(x)
        if penalty == "features":
            total = total + 5e-3 / 2 * (feature**2).sum()
    total = total + 4 * 5e-3 / 2 * (head.weight**2).sum()
    if penalty == "weights":
        total = total + 5e-3 / 2 * sum((p**2).sum() for layer in (first, second) for p in layer.parameters())
    assert model.evaluate_objective((x, labels)).item() == pytest.approx(total.item(), rel=1e-12)


@pytest.mark.parametrize(
    ("init", "variance", "bias_variance"),
    [("he", 2 / 300, 0.0), ("xavier", 2 / 500, 0.0), ("torch", 1 / 900, 1 / 900)],
)
def test_initial_weights_have_the_stated_variance(init, variance, bias_variance):
    torch.manual_seed(0)
    body = TwoLayerBody(300, 200, 5, "relu", "identity", torch.float64)
    body.reset_parameters(init)
    # 60,000 draws estimate a variance to 0.6 percent (one sigma, normal); 200 biases to 10.
    assert float(body[0].weight.detach().var()) == pytest.approx(variance, rel=0.03)
    assert float(body[0].bias.detach().square().mean()) == pytest.approx(bias_variance, rel=0.4)
    torch.manual_seed(0)
    scaled = TwoLayerBody(300, 200, 5, "relu", "identity", torch.float64)
    scaled.reset_parameters(init, 0.1)
    torch.testing.assert_close(scaled[0].weight, 0.1 * body[0].weight, rtol=1e-14, atol=0)
    assert torch.equal(scaled[2].weight, body[2].weight)


def test_both_dtypes_start_from_the_same_draws():
    double, single = mlp(init="torch"), mlp(init="torch", dtype="float32")
    for p, q in zip(double.parameters(), single.parameters(), strict=True):
        assert torch.equal(p.float(), q)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "swish"}, "activation must be one of identity, relu"),
        ({"feature_activation": "swish"}, "feature_activation must be one of"),
        ({"init": "zeros"}, "init must be one of he, xavier, torch, got 'zeros'"),
        ({"penalty": "both"}, "penalty must be 'features' or 'weights', got 'both'"),
        ({"hidden_dim": 0}, "hidden_dim must be at least 1, got 0"),
        ({"first_layer_scale": -1.0}, "first_layer_scale must be finite and non-negative"),
        ({"dtype": "float16"}, "dtype must be 'float64' or 'float32'"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        mlp(**options)


def test_a_penalty_on_weights_has_no_closed_form(tmp_path):
    model = mlp(penalty="weights")
    with pytest.raises(ValueError, match="penalty='weights' has no closed form"):
        model.problem  # noqa: B018
    with pytest.raises(ValueError, match=r"OptimalityMonitor\(theory=False\)"):
        quiet_trainer(tmp_path, max_steps=1, callbacks=[OptimalityMonitor()]).fit(model, GaussianDataModule())


@pytest.mark.parametrize("penalty", ["features", "weights"])
def test_readings_are_of_what_is_trained(tmp_path, penalty):
    model = mlp(penalty=penalty)
    monitor = OptimalityMonitor(theory=penalty == "features")
    read = monitor.read(model, data())
    value = model.evaluate_objective(data())
    gradients = torch.autograd.grad(value, list(model.parameters()))
    assert float(read["loss"]) == value.item()
    assert float(read["optimality/grad_norm"]) == pytest.approx(float(nn.utils.parameters_to_vector(gradients).norm()))


@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_constant_steps_lower_the_gap_and_collapse_the_features(tmp_path, loss):
    # A small network that can fit its data: 16 hidden units for 12 samples in 30 dimensions.
    model = mlp(loss, optimizer=lambda params: torch.optim.SGD(params, lr=0.05))
    monitors = [OptimalityMonitor(100), NeuralCollapseMonitor(100)]
    trainer = quiet_trainer(tmp_path, max_steps=1500, callbacks=monitors)
    trainer.fit(model, GaussianDataModule())
    last = trainer.callback_metrics
    start = mlp(loss).problem.optimality_gap(*_point(mlp(loss))).item()
    assert 0 < float(last["optimality/gap"]) < 1e-2 * start
    assert float(last["nc/train/nc1"]) < 0.05


def _point(model):
    x, labels = data()
    return model.head.weight, model.backbone(x), labels, model.head.bias


def test_a_step_that_is_too_large_ends_the_run_with_a_word(tmp_path, capsys):
    model = mlp(optimizer=lambda params: torch.optim.SGD(params, lr=1e4))
    monitors = [OptimalityMonitor(1), NeuralCollapseMonitor(1)]
    trainer = quiet_trainer(tmp_path, max_steps=1000, callbacks=monitors)
    trainer.fit(model, GaussianDataModule())
    assert trainer.global_step < 100
    assert "Lower the optimizer's lr" in capsys.readouterr().out
    assert math.isnan(float(trainer.callback_metrics["optimality/distance"]))
    assert not Rows.of(trainer).flush(trainer)
