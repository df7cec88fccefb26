"""OptimalityMonitor on modules that know nothing of it."""

import pytest
import torch
from torch import nn

from nclightning.callbacks import OptimalityMonitor
from nclightning.functional import class_statistics, distance_to_collapse
from nclightning.objective import Objective
from nclightning.theory import UFMProblem
from tests.callbacks.test_attach import K, Net, fit, hooks_of, loader

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training"),
]
N_PER_CLASS = 16


@pytest.fixture
def samples():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N_PER_CLASS * K, 5, generator=generator), torch.arange(N_PER_CLASS * K) % K


def read(trainer):
    return {k.removeprefix("optimality/"): float(v) for k, v in trainer.callback_metrics.items()}


@pytest.mark.parametrize("loss", ["ce", "mse"])
def test_with_the_penalties_given(loss, tmp_path, samples):
    monitor = OptimalityMonitor(loss=loss, lambda_w=1e-2, lambda_h=1e-3)
    model, trainer = fit(tmp_path, [monitor], loader(samples))
    model.eval()
    with torch.no_grad():
        features = model.body(samples[0])
    problem = UFMProblem(loss, K, N_PER_CLASS, 8, 1e-2, 1e-3)
    weight, bias = model.last.weight.detach().double(), model.last.bias.detach().double()
    objective = Objective(loss, 1e-2, 1e-3)(weight, features.double(), samples[1], bias)
    values = read(trainer)
    assert values.keys() == {"gap", "distance", "relative_distance"}
    # Features are float32 in batches of another size: their own rounding.
    assert values["gap"] == pytest.approx(float(objective) - problem.optimal_value, rel=1e-5)
    assert values["relative_distance"] == pytest.approx(values["distance"] / problem.optimum_norm, rel=1e-6)
    if loss == "mse":
        expected = float(problem.distance(weight, features, samples[1], bias))
        assert values["distance"] == pytest.approx(expected, rel=1e-5)
    assert hooks_of(model) == 0


def test_with_the_penalties_fitted_to_the_scales(tmp_path, samples):
    model, trainer = fit(tmp_path, [OptimalityMonitor(loss="ce")], loader(samples))
    model.eval()
    with torch.no_grad():
        stats = class_statistics(model.body(samples[0]), samples[1], K)
    fitted, values = distance_to_collapse(stats, model.last.weight), read(trainer)
    problem = UFMProblem("ce", K, N_PER_CLASS, 8, values["lambda_w"], values["lambda_h"])
    assert problem.weight_scale == pytest.approx(float(fitted.head_scale), rel=1e-5)
    assert problem.feature_scale == pytest.approx(float(fitted.feature_scale), rel=1e-5)


def test_unbalanced_data_are_refused(tmp_path, samples):
    data = samples[0], torch.where(samples[1] == 2, 0, samples[1])
    with pytest.raises(ValueError, match="every class must come exactly 32 times, got between 0 and 32"):
        fit(tmp_path, [OptimalityMonitor(loss="ce", lambda_w=1e-2, lambda_h=1e-3)], loader(data))


def test_without_a_loss_other_modules_are_refused(tmp_path, samples):
    with pytest.raises(ValueError, match=r"OptimalityMonitor\(loss=...\) gap and distance"):
        fit(tmp_path, [OptimalityMonitor()], loader(samples))


@pytest.mark.parametrize("options", [{"loss": "bce"}, {"lambda_w": 1.0}, {"every_n_epochs": 0}], ids=str)
def test_bad_options(options):
    with pytest.raises(ValueError, match="loss must be 'mse' or 'ce', lambda_w and lambda_h come both"):
        OptimalityMonitor(**options)


def test_mse_needs_a_bias(tmp_path, samples):
    model = Net()
    model.last = nn.Linear(8, K, bias=False)
    with pytest.raises(ValueError, match="head must have a bias for loss='mse'"):
        fit(
            tmp_path, [OptimalityMonitor(loss="mse", lambda_w=1e-2, lambda_h=1e-3, head="last")], loader(samples), model
        )
