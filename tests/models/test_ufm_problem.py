"""The unconstrained feature model of any problem: what it trains, what its checkpoints hold, what it refuses."""

import lightning as L
import pytest
import torch

from nclightning import problems as of
from nclightning.callbacks import LastCheckpoint
from nclightning.cli import main
from nclightning.data import IndexDataModule
from nclightning.models import UFM
from nclightning.optim import ArmijoGD
from tests.trainers import quiet_trainer

PENALTIES = {"lambda_w": 5e-2, "lambda_h": 2e-2}
MEMBERS = {
    "MSE": of.balanced_mse(3, 4, 5, **PENALTIES),
    "CE": of.balanced_ce(3, 4, 5, **PENALTIES),
    "MSE without bias": of.mse_without_bias([6, 3, 1], 5, **PENALTIES),
    "MSE with penalized bias": of.mse_with_penalized_bias([6, 3, 1], 5, **PENALTIES, lambda_b=0.3),
    "unbalanced MSE": of.unbalanced_mse([6, 3, 1], 5, **PENALTIES),
    "unbalanced CE": of.unbalanced_ce([6, 3, 1], 5, **PENALTIES),
    "an absent class": of.unbalanced_ce([6, 0, 3], 5, **PENALTIES),
    "label smoothing": of.label_smoothing([4, 4, 2], 0.1, 5, **PENALTIES),
    "soft labels": of.soft_labels([[0.8, 0.1, 0.1], [0.2, 0.3, 0.5]], [5, 4], 5, **PENALTIES),
    "mixup": of.mixup(3, 3, 2, 5, **PENALTIES, bias="free"),
    "weighted CE": of.weighted_ce([6, 3, 1], "inverse", 5, **PENALTIES),
    "logit adjustment": of.logit_adjusted_ce([6, 3, 1], 5, **PENALTIES),
    "multi-label": of.multi_label_bce([[1, 0, 0], [0, 1, 1], [1, 1, 0], [0, 0, 0]], [3, 3, 2, 1], 5, **PENALTIES),
    "regression": of.regression([[0.0, 1.0], [1.0, -1.0], [2.0, 0.5], [-1.0, 0.3]], 5, **PENALTIES),
}


def ufm(problem, **options):
    torch.manual_seed(0)
    return UFM(problem=problem, iterations_per_step=10, **options)


def point_of(model):
    bias = None if model.head.bias is None else model.head.bias.detach()
    return model.head.weight.detach(), model.features.detach(), model.problem.labels(), bias


@pytest.mark.parametrize("name", MEMBERS)
def test_it_trains_the_problem(name):
    """Value and gradient are those of autograd on the problem's own value."""
    problem, model = MEMBERS[name], ufm(MEMBERS[name])
    assert model.problem is problem
    leaves = [None if t is None else t.clone().requires_grad_() for t in point_of(model)[:2] + point_of(model)[3:]]
    expected = problem.value(leaves[0], leaves[1], problem.labels(), leaves[2])
    free = [leaf for leaf in leaves if leaf is not None]
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(expected, free)])
    batch = torch.arange(problem.num_samples), problem.labels()
    value, norm = model.value_and_grad_norm(batch)
    expected = float(expected.detach())
    # A sum of few hundred numbers, in another order.
    assert float(value) == pytest.approx(expected, rel=1e-14)
    assert float(norm) == pytest.approx(float(gradient.norm()), rel=1e-13)
    assert float(model.evaluate_objective(batch).detach()) == pytest.approx(expected, rel=1e-14)


class StopsAt(L.Callback):
    """Ends a run a hundred iterations after its gap has come to a bound, or later."""

    def __init__(self, gap):
        self.gap, self.there = gap, False

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step % 100 == 0:
            trainer.should_stop = self.there
            self.there = float(pl_module.problem.gap(*point_of(pl_module))) <= self.gap


@pytest.mark.parametrize("name", MEMBERS)
def test_a_fit_comes_to_the_optimum(name, tmp_path):
    problem, model = MEMBERS[name], ufm(MEMBERS[name], optimizer=lambda p: ArmijoGD(p, patience=1))
    bound = 1e-20 * (1 + problem.optimal_value)
    quiet_trainer(tmp_path, max_steps=4000, callbacks=[StopsAt(bound)]).fit(model, datamodule=IndexDataModule())
    assert float(problem.gap(*point_of(model))) <= bound


def test_checkpoints_hold_the_problem_in_plain_values(tmp_path):
    problem = MEMBERS["weighted CE"]
    trainer = quiet_trainer(tmp_path, max_steps=20, callbacks=[LastCheckpoint()], enable_checkpointing=True)
    trainer.fit(ufm(problem), datamodule=IndexDataModule())
    path = next(tmp_path.rglob("last.ckpt"))
    stored = torch.load(path, weights_only=True)["hyper_parameters"]
    assert stored["problem"] == problem.describe()
    again = UFM.load_from_checkpoint(path)
    assert again.problem.describe() == problem.describe()
    assert torch.equal(again.features, trainer.lightning_module.features)


def test_a_run_goes_on_bit_for_bit_and_only_with_its_own_problem(tmp_path):
    problem = MEMBERS["label smoothing"]
    whole = ufm(problem)
    quiet_trainer(tmp_path / "whole", max_steps=40).fit(whole, datamodule=IndexDataModule())
    half = quiet_trainer(tmp_path / "half", max_steps=20, callbacks=[LastCheckpoint()], enable_checkpointing=True)
    half.fit(ufm(problem), datamodule=IndexDataModule())
    path, rest = next(tmp_path.rglob("last.ckpt")), ufm(problem)
    quiet_trainer(tmp_path / "rest", max_steps=40).fit(rest, datamodule=IndexDataModule(), ckpt_path=path)
    assert torch.equal(rest.features, whole.features)
    other = ufm(of.label_smoothing([4, 4, 2], 0.2, 5, **PENALTIES))
    with pytest.raises(ValueError, match=r"belongs to another problem \(problem.targets"):
        quiet_trainer(tmp_path / "other", max_steps=40).fit(other, datamodule=IndexDataModule(), ckpt_path=path)


REFUSED = {
    "nothing": ({}, "num_classes is missing: give num_classes, samples_per_class, feature_dim, loss and the penalties"),
    "no loss": ({"num_classes": 3, "samples_per_class": 2, "feature_dim": 4}, "loss is missing"),
    "no problem": ({"problem": "unbalanced_ce"}, "problem must be a nclightning.problems.Problem, got str"),
    "another size": ({"problem": MEMBERS["CE"], "num_classes": 4}, "num_classes=4 .* problem that has 3"),
    "another penalty": ({"problem": MEMBERS["CE"], "lambda_w": 1.0}, "lambda_w=1.0 .* that has 0.05: leave out"),
    "the single lambda": ({"problem": MEMBERS["CE"], "lambda_": 1e-2}, "lambda_=0.01 .*: leave out lambda,"),
    "a loss": ({"problem": MEMBERS["CE"], "loss": "ce"}, "loss='ce' was given together with a problem: leave out loss"),
    "a description of nothing": (
        {"problem": {"class_path": "torch.eye", "init_args": {"n": 3}}},
        "torch.eye is not a function",
    ),
    "a description without a class": ({"problem": {"counts": [3]}}, "class_path is missing, got counts"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_that_do_not_fit(case):
    arguments, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        UFM(**arguments)


def test_an_objective_that_was_replaced_has_no_known_problem():
    model = ufm(MEMBERS["CE"])
    model.objective = ufm(MEMBERS["unbalanced CE"]).objective
    with pytest.raises(ValueError, match="objective is not that of the problem"):
        model.problem  # noqa: B018


def test_sizes_of_the_data_must_be_those_of_the_problem():
    data = IndexDataModule(samples_per_class=4)
    data.adopt(ufm(MEMBERS["CE"]))
    assert data.batch()[1].tolist() == MEMBERS["CE"].labels().tolist()
    with pytest.raises(ValueError, match=r"samples_per_class=4\) differs from the model's problem"):
        data.adopt(ufm(MEMBERS["unbalanced CE"]))


CONFIG = """
seed_everything: 0
model:
  class_path: nclightning.models.UFM
  init_args:
    problem:
      class_path: nclightning.problems.label_smoothing
      init_args: {counts: [6, 3, 1], smoothing: 0.1, feature_dim: 4, lambda_w: 1.0e-2, lambda_h: 1.0e-3}
data: nclightning.data.IndexDataModule
trainer: {max_steps: 20, accelerator: cpu, devices: 1}
"""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lambda", "1e-3"], "--lambda 0.001: the penalties of a model that has a problem are the problem's"),
        (["--model.init_args.problem.init_args.smoothing", "2"], "smoothing must be from 0 to below 1"),
        (["--model.init_args.problem.init_args.smooth", "0.2"], "no argument 'smooth'.*Did you mean smoothing"),
    ],
)
def test_what_the_command_line_says_of_problems(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text(CONFIG)
    with pytest.raises(SystemExit, match=message):
        main(["fit", "--config", "own.yaml", *words])
    assert [path.name for path in tmp_path.iterdir()] == ["own.yaml"]


def test_the_command_line_overrides_arguments_of_the_problem(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text(CONFIG)
    callback = "--trainer.callbacks=nclightning.callbacks.LastCheckpoint"
    main(["fit", "--config", "own.yaml", "--model.init_args.problem.init_args.smoothing", "0.2", callback])
    model = UFM.load_from_checkpoint(next(tmp_path.rglob("last.ckpt")))
    assert model.problem.targets[0, 1] == pytest.approx(0.2 / 3)


@pytest.mark.parametrize("part", ["objective", "head", "backbone"])
def test_a_part_that_is_replaced_during_a_fit_ends_it(part, tmp_path):
    """The search would go on from the value of the one before, and find no step."""

    class Replace(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == 20:
                setattr(pl_module, part, getattr(ufm(MEMBERS["CE"]), part))

    trainer = quiet_trainer(tmp_path, max_steps=40, callbacks=[Replace()])
    with pytest.raises(ValueError, match=f"{part} was replaced during the fit"):
        trainer.fit(ufm(MEMBERS["CE"]), datamodule=IndexDataModule())
