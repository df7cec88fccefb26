"""The predicted decay beside the measured gap."""

import math

import numpy as np
import pytest
import torch

from nclightning.callbacks import LastCheckpoint, NeuralCollapseMonitor, OptimalityMonitor
from nclightning.data import GaussianDataModule, IndexDataModule
from nclightning.figures import read_readings, summarize
from nclightning.loggers import RunLogger
from nclightning.models import UFM, TwoLayerMLP
from nclightning.optim import ArmijoLBFGS, HeavyBall, Nesterov
from tests.trainers import quiet_trainer

GAP, DECAY, STEP = "optimality/gap", "optimality/predicted_decay", "line_search/step_size"


def ufm(loss="ce", **options):
    torch.manual_seed(0)
    return UFM(4, 3, 6, loss, **({"lambda_": 2e-2, "iterations_per_step": 10} | options))


def fit(folder, model, *callbacks, data=None, max_steps=3000, save=False, **options):
    callbacks = [OptimalityMonitor(1, stop_distance=1e-12, stop_at_floor=True), *callbacks]
    logger = RunLogger(str(folder))
    trainer = quiet_trainer(folder, max_steps=max_steps, callbacks=callbacks, logger=logger, enable_checkpointing=save)
    trainer.fit(model, datamodule=IndexDataModule() if data is None else data, **options)
    return read_readings(trainer.log_dir)


def fall(readings, tag, high=1e-8, low=1e-20):
    """Decades that a quantity falls by while the gap goes from high to low."""
    gap = readings.values[GAP]
    start, end = int(np.argmax(gap <= high)), int(np.argmax(gap <= low))
    assert 0 < start < end
    return math.log10(readings.values[tag][start] / readings.values[tag][end])


@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_the_gap_of_a_line_search_falls_as_the_steps_taken_predict(loss, tmp_path):
    readings = fit(tmp_path, ufm(loss))
    steps = readings.values[STEP][1:]
    assert steps.max() > 2 * steps.min()  # No constant step: the slowest mode feels each one.
    # Over twelve decades. For MSE the next eigenvalue is 6% above mu, and the mixture of both is between the two; for
    # CE it is half as much again and has died out.
    assert fall(readings, DECAY) == pytest.approx(fall(readings, GAP), rel=0.06 if loss == "mse" else 0.01)


def test_decay_of_a_constant_step_is_geometric(tmp_path):
    step = 3.0
    model = ufm(optimizer=lambda params: torch.optim.SGD(params, lr=step))
    readings = fit(tmp_path, model)
    expected = (1 - step * model.problem.mu) ** (2 * readings.iterations)
    np.testing.assert_allclose(readings.values[DECAY], expected, rtol=1e-10)  # A thousand products.
    assert fall(readings, DECAY) == pytest.approx(fall(readings, GAP), rel=1e-2)


def test_the_decay_of_gradient_descent_is_not_that_of_another_direction(tmp_path):
    readings = fit(tmp_path, ufm(optimizer=ArmijoLBFGS), max_steps=20)
    assert DECAY not in readings.values
    assert readings.values[STEP][-1] == 1.0


def test_a_resumed_run_goes_on(tmp_path):
    whole = fit(tmp_path / "whole", ufm(), max_steps=40)
    fit(tmp_path / "parts", ufm(), LastCheckpoint(20), max_steps=20, save=True)
    checkpoint = tmp_path / "parts" / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt"
    rest = fit(tmp_path / "rest", ufm(), max_steps=40, ckpt_path=checkpoint)
    assert rest.iterations[0] == 20
    np.testing.assert_array_equal(rest.values[DECAY], whole.values[DECAY][20:])


def test_a_second_fit_starts_over(tmp_path):
    monitor = OptimalityMonitor(1)
    for name in "ab":
        trainer = quiet_trainer(
            tmp_path, max_steps=5, callbacks=[monitor], logger=RunLogger(str(tmp_path), version=name)
        )
        trainer.fit(ufm(), datamodule=IndexDataModule())
        assert read_readings(trainer.log_dir).values[DECAY][0] == 1.0


def test_a_checkpoint_without_a_decay_leaves_it_open():
    monitor = OptimalityMonitor().at_iterates()
    monitor.load_state_dict({"smallest": 1.0, "smallest_at": 3})
    assert math.isnan(monitor.state_dict()["decay"])


def sgd(**options):
    return lambda params: torch.optim.SGD(params, **options)


FIXED = {
    "plain": sgd(lr=3.0),
    "stiff modes last": sgd(lr=9.8),
    "stiff modes last, nesterov": sgd(lr=7.2, momentum=0.5, nesterov=True),
    "momentum": sgd(lr=1.0, momentum=0.7),
    "dampened": sgd(lr=5.0, momentum=0.6, dampening=0.6),
    "oscillating": sgd(lr=2.0, momentum=0.9),
    "nesterov": sgd(lr=2.0, momentum=0.7, nesterov=True),
    "HeavyBall": HeavyBall,
    "Nesterov": Nesterov,
}


@pytest.mark.parametrize("name", FIXED)
def test_the_gap_falls_as_the_options_of_sgd_predict(name, tmp_path):
    readings = fit(tmp_path, near_the_optimum(FIXED[name]))
    # Over eighteen decades. Modes of almost the same speed, of which there are many under a momentum, beat.
    measured = fall(readings, GAP, 1e-6, 1e-24)
    assert fall(readings, DECAY, 1e-6, 1e-24) == pytest.approx(measured, rel=0.05)
    summary = summarize(readings)
    assert summary.predicted.slope == pytest.approx(summary.fits[GAP].slope, rel=0.05)


def near_the_optimum(optimizer, loss="ce"):
    model = ufm(loss, optimizer=optimizer)
    optimum = model.problem.random_optimum(torch.Generator().manual_seed(1))
    with torch.no_grad():
        for p, best in ((model.head.weight, optimum.weight), (model.features, optimum.features)):
            p.copy_(best + 0.05 * p)
    return model


def test_a_schedule_is_followed_step_by_step(tmp_path):
    class Scheduled(UFM):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)]

    torch.manual_seed(0)
    model = Scheduled(4, 3, 6, "ce", lambda_=2e-2, iterations_per_step=10, optimizer=sgd(lr=3.0))
    readings = fit(tmp_path, model, max_steps=12)
    steps = 3.0 * 0.5 ** (np.arange(12) // 3)
    expected = np.cumprod([1.0, *(1 - steps * model.problem.mu) ** 2])
    np.testing.assert_allclose(readings.values[DECAY], expected, rtol=1e-13)


def test_a_resumed_run_with_momentum_goes_on(tmp_path):
    whole = fit(tmp_path / "whole", ufm(optimizer=Nesterov), max_steps=40)
    fit(tmp_path / "parts", ufm(optimizer=Nesterov), LastCheckpoint(20), max_steps=20, save=True)
    checkpoint = tmp_path / "parts" / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt"
    rest = fit(tmp_path / "rest", ufm(optimizer=Nesterov), max_steps=40, ckpt_path=checkpoint)
    for tag in (DECAY, GAP, "loss"):
        np.testing.assert_array_equal(rest.values[tag], whole.values[tag][20:])


def test_a_checkpoint_of_before_momentum_was_predicted_goes_on():
    monitor = OptimalityMonitor().at_iterates()
    monitor.load_state_dict({"smallest": 1.0, "smallest_at": 3, "decay": 0.25, "followed": 7})
    assert monitor.state_dict()["decay"] == 0.25


def in_two_groups(lr):
    def make(params):
        features, *head = params
        return torch.optim.SGD([{"params": features}, {"params": head, "lr": lr}], lr=0.1, momentum=0.5)

    return make


def test_groups_with_the_same_step_are_one(tmp_path):
    decays = [fit(tmp_path / str(i), ufm(optimizer=make), max_steps=20).values[DECAY]
              for i, make in enumerate((in_two_groups(0.1), sgd(lr=0.1, momentum=0.5)))]  # fmt: skip
    np.testing.assert_array_equal(*decays)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda params: torch.optim.Adam(params, lr=1e-2),
        lambda params: torch.optim.RMSprop(params, lr=1e-3),
        sgd(lr=1e-3, momentum=1.0),
        in_two_groups(0.2),
        type("Own", (torch.optim.SGD,), {}),
    ],
)
def test_what_has_no_law_has_no_prediction(optimizer, tmp_path):
    assert DECAY not in fit(tmp_path, ufm(optimizer=optimizer), max_steps=20).values


def test_a_network_has_no_prediction(tmp_path):
    model = TwoLayerMLP(4, 3, 6, input_dim=20, hidden_dim=16, loss="ce", lambda_=2e-2)
    readings = fit(tmp_path, model, NeuralCollapseMonitor(1), data=GaussianDataModule(), max_steps=10)
    assert GAP in readings.values
    assert DECAY not in readings.values


def test_at_the_threshold_nothing_decays(tmp_path):
    """K = 4, n = 4, lambda_w lambda_h = 1/64 exactly."""
    torch.manual_seed(0)
    model = UFM(4, 4, 6, "ce", lambda_w=0.125, lambda_h=0.125)
    assert model.problem.slack == 0
    assert set(fit(tmp_path, model, max_steps=20).values[DECAY]) == {1.0}


def test_a_validation_has_no_steps(tmp_path):
    model = ufm()
    trainer = quiet_trainer(tmp_path, max_steps=20, callbacks=[OptimalityMonitor()])
    trainer.fit(model, datamodule=IndexDataModule())
    values = quiet_trainer(tmp_path, callbacks=[OptimalityMonitor()]).validate(model, datamodule=IndexDataModule())
    assert GAP in values[0]
    assert DECAY not in values[0]
