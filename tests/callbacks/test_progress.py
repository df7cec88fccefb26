"""The progress bar counts iterations."""

import torch

from nclightning.callbacks import IterationProgressBar, OptimalityMonitor
from nclightning.data import IndexDataModule
from nclightning.models import UFM
from tests.trainers import quiet_trainer


def fit(folder, *others):
    seen = []

    class Watch(IterationProgressBar):
        def _update(self, progress_bar_id, current, *options, **more):
            seen.append((current, self.total_train_batches, self.get_metrics(self.trainer, self.trainer.model)))
            super()._update(progress_bar_id, current, *options, **more)

    torch.manual_seed(0)
    model = UFM(4, 3, 6, "mse", lambda_=5e-3, iterations_per_step=10)
    trainer = quiet_trainer(folder, max_steps=125, callbacks=[*others, Watch()], enable_progress_bar=True)
    trainer.fit(model, datamodule=IndexDataModule())
    return seen


def test_bar_goes_from_step_to_step_up_to_max_steps(tmp_path, capsys):
    seen = fit(tmp_path)
    # More than one epoch of ten steps: one bar goes on.
    assert [current for current, *_ in seen] == [*range(10, 121, 10), 125]
    assert {total for _, total, _ in seen} == {125}
    assert "Iterations" in capsys.readouterr().out


def test_bar_shows_the_distance_or_else_the_objective(tmp_path):
    assert all(list(metrics) == ["distance"] for *_, metrics in fit(tmp_path, OptimalityMonitor(5)))
    assert all(list(metrics) == ["F"] for *_, metrics in fit(tmp_path, OptimalityMonitor(5, theory=False)))
    assert all(metrics == {} for *_, metrics in fit(tmp_path))
