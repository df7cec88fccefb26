"""What only a GPU can show. Skipped where there is none."""

import pytest
import torch

from nclightning.callbacks import NeuralCollapseMonitor, OptimalityMonitor
from nclightning.data import GaussianDataModule, IndexDataModule
from nclightning.models import UFM, TwoLayerMLP
from tests.trainers import quiet_trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
SIZES = {"num_classes": 4, "samples_per_class": 5, "feature_dim": 7, "lambda_": 5e-3}


def ufm(loss):
    torch.manual_seed(0)
    return UFM(**SIZES, loss=loss), IndexDataModule()


def mlp(loss):
    torch.manual_seed(0)
    return TwoLayerMLP(**SIZES, loss=loss, input_dim=30, hidden_dim=16), GaussianDataModule()


def fit(folder, model, data, accelerator, devices=1, **options):
    monitors = [OptimalityMonitor(), NeuralCollapseMonitor()]
    trainer = quiet_trainer(
        folder, max_steps=50, callbacks=monitors, accelerator=accelerator, devices=devices, **options
    )
    trainer.fit(model, data)
    return model.cpu(), dict(trainer.callback_metrics)


@pytest.mark.parametrize("loss", ["mse", "ce"])
@pytest.mark.parametrize("make", [ufm, mlp])
def test_a_gpu_takes_the_steps_of_the_cpu(make, loss, tmp_path):
    there, read_there = fit(tmp_path, *make(loss), "gpu")
    here, read_here = fit(tmp_path, *make(loss), "cpu")
    for p, q in zip(there.parameters(), here.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-10)  # Sums in another order, over 50 iterations.
    for tag, value in read_here.items():
        torch.testing.assert_close(read_there[tag].cpu(), value, rtol=1e-5, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("make", [ufm, mlp])
def test_two_runs_on_a_gpu_are_equal_bit_for_bit(make, tmp_path):
    torch.use_deterministic_algorithms(True)
    try:
        one, _ = fit(tmp_path, *make("ce"), "gpu")
        other, _ = fit(tmp_path, *make("ce"), "gpu")
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_an_iteration_asks_a_gpu_for_as_many_numbers_as_it_has_trials():
    """One transfer for the value of each trial, one for a slope, one for the norm of the gradient."""
    model, _ = ufm("mse")
    model = model.cuda()
    index = torch.arange(20, device="cuda")
    params = list(model.parameters())
    optimizer, line = model._make_optimizer(params), model.make_closure((index, index // 5), params)
    optimizer.step(line)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step(line)
    transfers = sum(event.count for event in profile.key_averages() if event.key == "aten::_local_scalar_dense")
    assert transfers <= 4 * optimizer.outcome.evaluations


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("make", [ufm, mlp])
def test_two_gpus_take_the_steps_of_one(make, tmp_path):
    one, _ = fit(tmp_path, *make("mse"), "gpu")
    two, _ = fit(tmp_path, *make("mse"), "gpu", devices=2, strategy="ddp_spawn")
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-10)
