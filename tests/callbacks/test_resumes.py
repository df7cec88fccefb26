"""Runs that are resumed in Python, from any checkpoint: they go on, or end again, to the last bit."""

import copy

import lightning as L
import pytest
import torch

from nclightning.callbacks import LastCheckpoint, NeuralCollapseMonitor, OptimalityMonitor
from nclightning.data import IndexDataModule
from nclightning.errors import UserError
from nclightning.loggers import RunLogger
from nclightning.models import UFM
from tests.trainers import quiet_trainer

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


def monitors(**options):
    return [OptimalityMonitor(5, **options), NeuralCollapseMonitor(7)]


def fit(folder, callbacks, max_steps=500, ckpt_path=None, run=None, **options):
    torch.manual_seed(0)
    model = UFM(4, 3, 6, "ce", **({"lambda_": 5e-3, "iterations_per_step": 10} | options))
    logger = RunLogger(str(folder))
    if run is not None:
        logger.continue_run(run, torch.load(ckpt_path, weights_only=True)["global_step"])
    trainer = quiet_trainer(
        folder,
        max_steps=max_steps,
        callbacks=callbacks,
        logger=logger,
        enable_checkpointing=any(isinstance(each, LastCheckpoint) for each in callbacks),
    )
    trainer.fit(model, datamodule=IndexDataModule(), ckpt_path=ckpt_path)
    return trainer, model


def run_of(folder):
    return folder / "lightning_logs" / "version_0"


def rows(folder):
    return (run_of(folder) / "readings.csv").read_bytes()


class SaveAt(L.Callback):
    """Saves at the end of each Lightning step, as somebody's own callback may."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, *_):
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


@pytest.mark.parametrize("ended_by", ["distance", "floor", "search"])
def test_a_run_resumed_where_it_stopped_takes_no_further_iteration(ended_by, tmp_path, capsys):
    rule = {"distance": {"stop_distance": 1e-2}, "floor": {"stop_at_floor": True}, "search": {}}[ended_by]
    options = {} if ended_by == "distance" else {"dtype": "float32", "lambda_": 2e-2}
    trainer, model = fit(tmp_path, [*monitors(**rule), SaveAt(tmp_path)], 5000, **options)
    stopped = trainer.global_step
    assert stopped < 5000
    before, said = rows(tmp_path), capsys.readouterr().out
    # Of the end of the last Lightning step, before the last readings.
    again, same = fit(tmp_path, monitors(**rule), 5000, tmp_path / f"{stopped}.ckpt", run_of(tmp_path), **options)
    assert again.global_step == stopped
    assert rows(tmp_path) == before
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    assert capsys.readouterr().out.strip().splitlines()[-1] == said.strip().splitlines()[-1]


def test_another_cadence_does_not_move_a_run_that_stopped(tmp_path):
    trainer, _ = fit(tmp_path, [*monitors(stop_distance=1e-2), SaveAt(tmp_path)])
    stopped = trainer.global_step
    other = OptimalityMonitor(stopped + 1, stop_distance=1e-2)
    again, _ = fit(tmp_path / "other", [other], ckpt_path=tmp_path / f"{stopped}.ckpt")
    assert again.global_step == stopped


def test_a_diverged_run_is_resumed_to_its_own_words(tmp_path, capsys):
    options = {"optimizer": lambda params: torch.optim.SGD(params, lr=1e6)}
    trainer, _ = fit(tmp_path, [*monitors(), LastCheckpoint(10)], **options)
    said = capsys.readouterr().out.strip()
    assert "The objective is not finite any more: the step is too large" in said
    checkpoint = run_of(tmp_path) / "checkpoints" / "last.ckpt"
    again, _ = fit(tmp_path / "other", monitors(theory=False), ckpt_path=checkpoint, **options)
    assert capsys.readouterr().out.strip() == said
    assert again.global_step == trainer.global_step


@pytest.mark.parametrize("first", [True, False])
def test_an_error_between_a_step_and_its_readings_is_made_up(first, tmp_path):
    """The checkpoint on an error is of an iterate that not all callbacks have heard of."""

    class Fail(L.Callback):
        def on_iteration_end(self, trainer, pl_module, batch, iteration):
            if iteration == 18:
                raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        fit(tmp_path, [*([Fail(), *monitors()] if first else [*monitors(), Fail()]), LastCheckpoint(10)], 30)
    checkpoint = run_of(tmp_path) / "checkpoints" / "last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 18
    fit(tmp_path, [*monitors(), LastCheckpoint(10)], 30, checkpoint, run_of(tmp_path))
    whole = tmp_path / "whole"
    fit(whole, [*monitors(), LastCheckpoint(10)], 30)
    assert rows(tmp_path) == rows(whole)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    fit(folder, [*monitors(), LastCheckpoint(10)], 20)
    return torch.load(run_of(folder) / "checkpoints" / "last.ckpt", weights_only=True)


def without(*names):
    return lambda content: [content.pop(name) for name in names]


def edit(name, value):
    return lambda content: content.update({name: value})


def drop_progress(content):
    del content["loops"]["fit_loop"]["epoch_loop.manual_optimization.optim_step_progress"]


EDITS = {
    "weights only": (without("optimizer_states", "callbacks", "lr_schedulers"), "no callbacks, optimizer_states, lr_"),
    "no optimizer": (without("optimizer_states"), "no optimizer_states"),
    "no optimizer's state": (edit("optimizer_states", []), "no optimizer_states"),
    "no callbacks": (without("callbacks"), "no callbacks"),
    "no schedulers": (without("lr_schedulers"), "no lr_schedulers"),
    "no loops": (without("loops"), "no loops"),
    "no progress": (drop_progress, "its loops have no 'epoch_loop.manual"),
    "another count": (edit("global_step", 10), "at global_step 10 and has done 20 iterations"),
    "two optimizers": (lambda c: c["optimizer_states"].append(c["optimizer_states"][0]), "has 2 optimizers"),
    "two groups": (
        lambda c: c["optimizer_states"][0]["param_groups"].append(c["optimizer_states"][0]["param_groups"][0]),
        "2 groups of parameters",
    ),
    "no search": (lambda c: c["optimizer_states"][0].pop("search"), "no entry 'search'"),
    "a weight less": (lambda c: c["state_dict"].pop("head.weight"), "weights .*head.weight"),
    "a weight more": (lambda c: c["state_dict"].update(more=torch.ones(2)), "weights .*more"),
    "another shape": (lambda c: c["state_dict"].update({"head.weight": torch.ones(2, 2)}), "weights .*head.weight"),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_checkpoint_that_lacks_something_is_refused_in_a_sentence(name, checkpoint, tmp_path):
    change, message = EDITS[name]
    content = copy.deepcopy(checkpoint)
    change(content)
    torch.save(content, tmp_path / "edited.ckpt")
    with pytest.raises(UserError, match=message) as error:
        fit(tmp_path, monitors(), 30, tmp_path / "edited.ckpt")
    assert "\n" not in str(error.value)
    assert not (run_of(tmp_path) / "readings.csv").exists()


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_weights_alone_can_be_looked_at(stage, checkpoint, tmp_path):
    content = copy.deepcopy(checkpoint)
    without("optimizer_states", "callbacks", "lr_schedulers")(content)
    torch.save(content, tmp_path / "weights.ckpt")
    trainer = quiet_trainer(tmp_path, callbacks=monitors())
    model = UFM(4, 3, 6, "ce", lambda_=5e-3)
    (values,) = getattr(trainer, stage)(model, datamodule=IndexDataModule(), ckpt_path=tmp_path / "weights.ckpt")
    assert 0 < values["optimality/gap"] < 10
