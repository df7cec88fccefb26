"""The comparison of optimizers: claims on curves whose numbers are known, and runs of one loss from start to report."""

import re
import subprocess

import matplotlib.image
import numpy as np
import pytest
import torch

from nclightning.commands import reproduce as command
from nclightning.figures import read_readings
from nclightning.reproduction import optimizers, reproduce
from nclightning.reproduction.experiments import experiments
from nclightning.reproduction.optimizers import (
    METHODS,
    check_optimizers,
    optimizer_experiments,
    optimizer_section,
    problem_of,
    read_optimizers,
)
from tests.forked import Forked
from tests.recorded import record

GAP, DISTANCE, NC0 = "optimality/gap", "optimality/distance", "nc/train/nc0"
RATES, VANISHES, STAYS, FEWER_MSE, FEWER_CE = range(5)
GOOD = {
    "adamw": {"nc0": (1.0, 2.0, 3.0)},
    "armijo_gd": {"per_evaluation": 1.5},
    "armijo_lbfgs": {"per_decade": 10.0, "per_evaluation": 1.5, "predicted": None},
    "adam": {"predicted": None},
}


def curves(per_decade=50.0, predicted=50.0, nc0=(1.0, 1e-6, 1e-12), decades=24.0, per_evaluation=None):
    """Readings of a run whose gap falls by that many decades, and whose NC0 passes through three values."""
    iterations = np.arange(0, round(per_decade * decades) + 1, 5.0)
    half = iterations[-1] / 2
    found = {
        GAP: 10.0 ** (-iterations / per_decade),
        DISTANCE: 10.0 ** (-iterations / (2 * per_decade)),
        NC0: 10.0 ** np.interp(iterations, (0, half, 2 * half), np.log10(nc0)),
    }
    found |= {f"nc/train/nc{i}": found[GAP] for i in (1, 2, 3)}
    if predicted:
        found["optimality/predicted_decay"] = 10.0 ** (-iterations / predicted)
    if per_evaluation:
        found["line_search/evaluations"] = per_evaluation * iterations
    return {tag: (iterations, values) for tag, values in found.items()}


def recorded(folder, changes):
    """Runs of all optimizers, of which some are changed, by loss and name."""
    for loss in ("mse", "ce"):
        for name, method in METHODS.items():
            own = curves(**GOOD.get(name, {}) | changes.get((loss, name), {}))
            if not method.is_coupled:
                own = {tag: values for tag, values in own.items() if not tag.startswith("optimality/")}
            record(folder / "runs" / f"optimizers_{loss}_{name}", own, loss=loss, lambda_w=5e-3, lambda_h=5e-3)
    return read_optimizers(folder)


@pytest.mark.parametrize(
    ("changes", "failing"),
    [
        ({}, set()),
        ({("ce", "heavy_ball"): {"per_decade": 52.0}}, set()),
        ({("ce", "heavy_ball"): {"per_decade": 53.0}}, {RATES}),
        ({("mse", "nesterov"): {"per_decade": 47.0}}, {RATES}),
        ({("mse", "gradient_descent"): {"predicted": None}}, {RATES}),
        # Nothing is claimed of the rate of a line search.
        ({("mse", "armijo_gd"): {"predicted": 60.0}}, set()),
        ({("mse", "adam"): {"nc0": (1.0, 1e-3, 2e-10)}}, {VANISHES}),
        ({("mse", "armijo_gd"): {"nc0": (1.0, 1e-3, np.nan)}}, {VANISHES}),
        ({("ce", "adamw"): {"nc0": (1.0, 1e-3, 9e-4)}}, {STAYS}),
        ({("ce", "adamw"): {"nc0": (1.0, 1.1e-3, 1.1e-3)}}, set()),
        ({("mse", "adamw"): {"nc0": (10.0, 10.0, 4.9)}}, {STAYS}),
        ({("mse", "armijo_lbfgs"): {"per_decade": 19.0}}, set()),
        ({("mse", "armijo_lbfgs"): {"per_decade": 21.0}}, {FEWER_MSE}),
        ({("ce", "armijo_lbfgs"): {"per_evaluation": 4.0}}, {FEWER_CE}),
        ({("ce", "armijo_lbfgs"): {"decades": 19.0}}, {FEWER_CE}),  # It never comes near enough.
        ({("mse", "armijo_gd"): {"decades": 19.0}}, {FEWER_MSE}),
    ],
)
def test_claims_follow_the_rules(tmp_path, changes, failing):
    claims = check_optimizers(recorded(tmp_path, changes))
    assert {i for i, claim in enumerate(claims) if not claim.held} == failing
    assert len(claims) == 5


def test_claims_and_table_state_their_numbers(tmp_path):
    runs = recorded(tmp_path, {("ce", "heavy_ball"): {"per_decade": 60.0}})
    claims = check_optimizers(runs)
    assert "CE: gradient descent 1.000, Nesterov 1.000, heavy ball 1.200" in claims[RATES].evidence
    assert claims[VANISHES].evidence == "12 runs, NC0 at most 1.0e-12 at the end"
    assert claims[STAYS].evidence == "MSE: 2 at half of the run, 3 at its end; CE: 2 at half of the run, 3 at its end"
    # A distance of 1e-10 is where the gap has fallen by 20 decades.
    assert claims[FEWER_CE].evidence == f"300 of 1500: {0.2:.2f}"
    rows = [line for line in optimizer_section(runs) if line.startswith(("| MSE |", "| CE |"))]
    assert len(rows) == 14
    assert "| CE | heavy ball | 60 | 50 | 1440 | 1200 | 1.0e-12 | 1.0e-24 | 1.0e-24 | 1.0e-24 |" in rows
    assert "| CE | ArmijoLBFGS | 10 | - | 240 | 300 | 1.0e-12 | 1.0e-24 | 1.0e-24 | 1.0e-24 |" in rows
    assert "| MSE | AdamW | - | - | 1200 | - | 3.0e+00 | 1.0e-24 | 1.0e-24 | 1.0e-24 |" in rows


def words_of(experiment, option):
    """Value of an option, given once."""
    (place,) = [i for i, word in enumerate(experiment.words) if word.endswith(option)]
    return experiment.words[place + 1]


def test_all_optimizers_have_one_problem_and_one_start():
    listed = optimizer_experiments()
    assert len({each.name for each in listed}) == len(listed) == 14
    for each in listed:
        loss = re.fullmatch(r"optimizers_(mse|ce)_\w+", each.name).group(1)
        assert words_of(each, "--config") == f"ufm_{loss}"  # Which has the sizes, and the seed.
        assert words_of(each, "init_scale") == "0.1"
        penalties = {words_of(each, option) for option in (".lambda_w", ".lambda_h")}
        if each.name.endswith("adamw"):
            assert (penalties, words_of(each, "weight_decay")) == ({"0"}, "0.005")
        else:
            assert penalties == {"0.005"}
            assert not any("weight_decay" in word for word in each.words)
        if each.name.endswith("gradient_descent"):
            assert float(words_of(each, "init_args.lr")) == pytest.approx(problem_of(loss).best_step, rel=1e-5)


def test_the_comparison_is_run_only_when_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(command, "reproduce", lambda figures, *_: asked.append(figures))
    command.reproduce_figures([])
    command.reproduce_figures(["--figures", "optimizers"])
    assert asked == [[1, 2, 3, 4, "error_bound"], ["optimizers"]]
    names = {each.name for each in optimizer_experiments()}
    assert not names & {each.name for each in experiments()}


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_runs_from_start_to_report(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", Forked)
    monkeypatch.setattr(optimizers, "_LOSSES", ("ce",))
    report = reproduce(["optimizers"], out=tmp_path, quick=True)
    text = report.read_text()
    assert text.count("**held**") + text.count("**did not hold**") == 4
    runs = read_optimizers(tmp_path)
    assert list(runs) == [("ce", name) for name in METHODS]
    starts = {tuple(run.readings.values[tag][0] for tag in ("nc/train/nc0", "nc/train/nc1")) for run in runs.values()}
    assert len(starts) == 1  # Bit for bit.
    problem = problem_of("ce")
    for name, expected in (
        ("gradient_descent", problem.iterations_per_decade()),
        ("nesterov", problem.nesterov().iterations_per_decade),
        ("heavy_ball", problem.heavy_ball().iterations_per_decade),
    ):
        # A double root adds a factor of k^2 to the gap, 7 % of the slope over these few iterations at most.
        assert runs["ce", name].summary.predicted.iterations_per_decade == pytest.approx(expected, rel=0.07)
    for (_, name), run in runs.items():
        state = torch.load(run.folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        weight = state["head.weight"]
        # The sum of ten numbers up to 4 rounds by 1e-15 each.
        assert run.readings.values[NC0][-1] == pytest.approx(float(weight.sum(0).norm()), rel=1e-9, abs=1e-13)
        assert (float(weight.sum(0).norm()) < 1e-10) == METHODS[name].is_coupled
    # Matplotlib before 3.11 rounds sizes down.
    assert matplotlib.image.imread(tmp_path / "optimizers.png").shape[1] == pytest.approx(920, abs=1)
    rows = {name: read_readings(tmp_path / "runs" / f"optimizers_ce_{name}").iterations for name in METHODS}
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("something was run"))
    assert reproduce(["optimizers"], out=tmp_path, quick=True).read_text() == text
    assert rows["heavy_ball"][-1] < rows["nesterov"][-1] < rows["gradient_descent"][-1]
