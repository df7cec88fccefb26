"""Optimizers that take mu and L from the problem of a module."""

import pytest
import torch

from nclightning.cli import main
from nclightning.data import IndexDataModule
from nclightning.models import UFM, RegularizedClassifier, TwoLayerMLP
from nclightning.models.backbones import FeatureTable
from nclightning.objective import Objective
from nclightning.optim import HeavyBall, Nesterov
from nclightning.problems import unbalanced_ce
from tests.trainers import quiet_trainer

PROBLEM = unbalanced_ce([6, 3, 1], 4, 0.01, 0.02)


@pytest.mark.parametrize("kind", [HeavyBall, Nesterov])
@pytest.mark.parametrize(
    "model",
    [
        lambda kind: UFM(4, 3, 6, "ce", lambda_=2e-2, optimizer=kind),
        lambda kind: UFM(4, 3, 6, "mse", lambda_=2e-2, optimizer=kind, dtype="float32"),
        lambda kind: UFM(problem=PROBLEM, optimizer=kind),
    ],
)
def test_a_model_gives_what_its_problem_says(model, kind):
    model = model(kind)
    group = model.configure_optimizers().param_groups[0]
    best = model.problem.heavy_ball() if kind is HeavyBall else model.problem.nesterov()
    assert (group["lr"], group["momentum"], group["nesterov"]) == (best.step, best.momentum, best.nesterov)


def test_what_is_given_is_kept():
    model = UFM(problem=PROBLEM, optimizer=lambda params: HeavyBall(params, 0.5, 2.0))
    assert model.configure_optimizers().param_groups[0]["lr"] == HeavyBall(model.parameters(), 0.5, 2.0).defaults["lr"]


def frozen():
    model = UFM(problem=PROBLEM, optimizer=HeavyBall)
    model.head.weight.requires_grad_(False)
    return model


def without_penalty():
    return RegularizedClassifier(
        FeatureTable(6, 4, torch.float64),
        torch.nn.Linear(4, 3, bias=False, dtype=torch.float64),
        Objective("ce", 0.0, 0.1),
        6,
        optimizer=HeavyBall,
    )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: TwoLayerMLP(4, 3, 6, input_dim=20, hidden_dim=16, loss="ce", lambda_=2e-2, optimizer=HeavyBall),
            "HeavyBall without mu and smoothness uses those of the unconstrained .* give HeavyBall mu and smoothness",
        ),
        (frozen, r"head.weight is not trained \(requires_grad=False\).* Or give HeavyBall mu"),
        (without_penalty, "HeavyBall takes mu and L from the problem, which has none: lambda_w"),
        (lambda: UFM(problem=unbalanced_ce([5, 4, 3, 2], 2, 1e-3, 1e-3), optimizer=HeavyBall), "below the rank"),
        (lambda: UFM(4, 4, 6, "ce", lambda_w=0.125, lambda_h=0.125, optimizer=Nesterov), "mu is 0: at a threshold"),
    ],
)
def test_what_has_no_constants_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        model().configure_optimizers()


def test_a_fit_from_the_command_line(tmp_path, monkeypatch, capsys, no_pictures):
    monkeypatch.chdir(tmp_path)
    sizes = ["--model.init_args.num_classes", "3", "--model.init_args.samples_per_class", "3"]
    optimizer = ["--model.init_args.optimizer", "nclightning.optim.Nesterov", "--model.init_args.init_scale", "0.1"]
    steps = ["--trainer.max_steps", "60", "--trainer.enable_progress_bar", "false"]
    main(["fit", "--config", "ufm_mse", *sizes, "--model.init_args.lambda", "0.05", *optimizer, *steps])
    assert "theory" in capsys.readouterr().out.partition("gap F - F*")[2].splitlines()[1]
    content = torch.load(next(tmp_path.rglob("last.ckpt")), weights_only=False)
    group = content["optimizer_states"][0]["param_groups"][0]
    assert group["nesterov"]
    assert group["lr"] > 0
    # A finished run is not begun anew: its report makes the optimizer once more.
    main(
        [
            "fit",
            "--config",
            str(next(tmp_path.rglob("config.yaml"))),
            "--ckpt_path",
            str(next(tmp_path.rglob("last.ckpt"))),
        ]
    )
    assert "The run is finished" in capsys.readouterr().out


def test_divergence_ends_a_fit_in_words(tmp_path, capsys):
    torch.manual_seed(0)
    model = UFM(4, 3, 6, "mse", lambda_=2e-2, init_scale=30.0, optimizer=HeavyBall)
    quiet_trainer(tmp_path, max_steps=3000).fit(model, datamodule=IndexDataModule())
    assert "not finite any more: HeavyBall has diverged" in capsys.readouterr().out
