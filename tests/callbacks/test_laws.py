"""OptimizerLaws leaves no trace, goes on after a resume, and reaches loggers."""

import csv
import random

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nclightning.callbacks import NeuralCollapseMonitor, OptimizerLaws
from nclightning.errors import UserError
from nclightning.loggers import RunLogger
from tests.callbacks.law_runs import LINEAR, data, fit, hooks_of, loss_of, made, sgd

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


@pytest.mark.parametrize("sharp", [False, True])
@pytest.mark.parametrize("name", ["momentum", "groups"])
def test_a_run_is_the_same_without_it(name, sharp, tmp_path):
    class Ends(L.Callback):
        def on_train_end(self, trainer, pl_module):
            self.state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
            self.modes = [child.training for child in pl_module.modules()]
            self.grads = [p.grad for p in pl_module.parameters()]

    runs, loader = [], data()
    options = {"sharpness_every_n_steps": 2, "data": loader, "loss_fn": loss_of} if sharp else {}
    for laws in (None, OptimizerLaws(every_n_steps=1, **options)):
        ends = Ends()
        model = made(LINEAR[name], schedule=True)
        rows, trainer = fit(tmp_path, laws, model, loader, callbacks=[ends], max_epochs=3)
        runs.append((model.state_dict(), trainer.optimizers[0].state_dict(), ends, hooks_of(trainer)))
    assert ("laws/sharpness_over_limit" in rows[-1]) is sharp
    (bare, bare_state, bare_ends, _), (read, read_state, read_ends, hooks) = runs
    assert all(torch.equal(a, b) for a, b in zip(bare.values(), read.values(), strict=True))
    assert bare_state["param_groups"] == read_state["param_groups"]
    for key, state in bare_state["state"].items():
        assert all(torch.equal(v, read_state["state"][key][each]) for each, v in state.items())
    assert all(torch.equal(a, b) for a, b in zip(bare_ends.grads, read_ends.grads, strict=True))
    assert torch.equal(bare_ends.state[0], read_ends.state[0])
    assert bare_ends.state[1:] == read_ends.state[1:]
    assert bare_ends.modes == read_ends.modes
    assert hooks == 0


def test_no_hook_is_left_by_an_error(tmp_path):
    class Fail(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.trainer = trainer
            assert hooks_of(trainer)
            raise RuntimeError("of the user")

    fail = Fail()
    with pytest.raises(RuntimeError, match="of the user"):
        fit(tmp_path, OptimizerLaws(), made(sgd()), callbacks=[fail])
    assert hooks_of(fail.trainer) == 0


def test_a_resumed_run_predicts_from_the_start(tmp_path):
    class Write(L.Callback):
        """Without a write what is predicted from the start would be what is predicted from the resume."""

        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 3:
                with torch.no_grad():
                    pl_module.last.weight[0] += 1.0

    def run(model, **options):
        laws = OptimizerLaws(every_n_steps=1)
        return fit(tmp_path, laws, model, data(shuffle=False), callbacks=[Write()], **options)

    make = LINEAR["momentum"]
    whole, _ = run(made(make, schedule=True))
    _, trainer = run(made(make, schedule=True), max_epochs=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    rows, _ = run(made(make, seed=5, schedule=True), ckpt_path=tmp_path / "half.ckpt")
    own, expected = rows[0], whole[len(whole) - len(rows)]
    # Dropout of the second half draws other masks, and the law does not depend on them.
    assert own["laws/nc0_predicted"] == pytest.approx(expected["laws/nc0_predicted"], rel=1e-12)
    assert own["laws/nc0_norm"] == pytest.approx(expected["laws/nc0_norm"], rel=1e-11)
    assert abs(own["laws/nc0_norm"] - own["laws/nc0_predicted"]) > 1e-3
    assert max(row["laws/nc0_residual"] for row in rows) < 1e-13


def test_values_reach_the_loggers_at_their_steps(tmp_path):
    loggers = [CSVLogger(tmp_path, name="csv"), RunLogger(str(tmp_path))]
    fit(tmp_path, OptimizerLaws(every_n_steps=5), made(sgd()), logger=loggers, max_epochs=2)
    with (tmp_path / "csv/version_0/metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["laws/nc0_norm"]]
    assert [int(row["step"]) for row in rows] == [0, 5, 10, 14]  # Seven batches an epoch, and the last state.
    assert all(float(row["laws/nc0_residual"]) < 1e-13 for row in rows)
    events = EventAccumulator(str(tmp_path / "lightning_logs/version_0")).Reload().Scalars("laws/nc0_norm")
    assert [(event.step, event.value) for event in events] == [
        (int(row["step"]), pytest.approx(float(row["laws/nc0_norm"]), rel=1e-6)) for row in rows
    ]


def test_beside_another_monitor(tmp_path):
    rows, trainer = fit(
        tmp_path, OptimizerLaws(every_n_steps=1), made(sgd()), callbacks=[NeuralCollapseMonitor(measures=("nc0",))]
    )
    assert rows[-1]["laws/nc0_norm"] == pytest.approx(float(trainer.callback_metrics["nc/train/nc0"]), rel=1e-6)


def test_two_of_them_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"both log 'laws/nc0_norm'.*: leave one of them out\.$"):
        fit(tmp_path, OptimizerLaws(), made(sgd()), callbacks=[OptimizerLaws(every_n_steps=7)])


def test_arguments_are_checked():
    for arguments, words in (
        ({"every_n_steps": 0}, "every_n_steps must be at least 1"),
        ({"every_n_steps": "3"}, "every_n_steps must be an integer, got '3'"),
        ({"step_fn": 3}, "step_fn must be a function .*, or None, got 3"),
        ({"sharpness_every_n_steps": 0}, "sharpness_every_n_steps must be at least 1"),
        ({"penalty": -1.0}, "penalty must be finite and non-negative"),
        ({"data": [1]}, "loss_fn is missing"),
        ({"loss_fn": loss_of}, "data is missing"),
        ({"data": [1], "loss_fn": loss_of}, "set sharpness_every_n_steps"),
    ):
        with pytest.raises(UserError, match=words):
            OptimizerLaws(**arguments)


def test_sharded_weights_are_refused(tmp_path):
    class Sharded(torch.nn.Linear):
        """Looks like what fully_shard makes."""

        def set_reshard_after_forward(self, value):
            pass

        def reshard(self):
            pass

    with pytest.raises(UserError, match="fully_shard shares them out"):
        fit(tmp_path, OptimizerLaws(), made(sgd(), head=Sharded(6, 4)))
