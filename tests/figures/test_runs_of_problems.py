"""Runs of any problem: how they are named, drawn, and compared with theory; hyperparameters of strangers."""

import sys

import matplotlib.image
import pytest
import torch
import yaml
from rich.console import Console

from nclightning import problems as of
from nclightning.figures import draw_collapse, draw_convergence, draw_gaps, group_runs, read_run
from nclightning.figures.tables import rates_table, settings_table
from tests.problems.cases import CASES
from tests.recorded import NC, geometric, record

GAP = "optimality/gap"
CURVES = {GAP: geometric(40, 20), **{tag: geometric(50, 20) for tag in NC}}


def run_of(problem, folder, curves=CURVES):
    """A run folder as a fit of the problem leaves it."""
    run = record(folder, curves)
    own = {"num_classes": problem.num_classes, "feature_dim": problem.feature_dim, "loss": None}
    own |= {"lambda_w": problem.lambda_w, "lambda_h": problem.lambda_h, "problem": problem.describe()}
    (folder / "hparams.yaml").write_text(yaml.safe_dump(own))
    return read_run(run.folder)


@pytest.mark.parametrize("name", list(CASES))
def test_the_problem_comes_back(name, tmp_path):
    problem = CASES[name]()
    run = run_of(problem, tmp_path / "run")
    assert run.problem.describe() == problem.describe()
    assert run.strength == (problem.lambda_h, problem.lambda_w)
    assert "$K = " in run.sizes
    assert run.loss


NAMES = {
    "hard labels": (of.unbalanced_ce([9, 4, 1], 5, 1e-2, 1e-3), "ce", "$n = 1$ to $9$, $N = 14$, $d = 5$, no bias"),
    "free bias": (of.unbalanced_mse([9, 4, 1], 5, 1e-2, 1e-3), "mse", "$N = 14$, $d = 5$, free bias"),
    "penalized bias": (of.mse_with_penalized_bias([3, 3], 5, 1e-2, 1e-3, 0.5), "mse", "$K = 2$, $n = 3$, $d = 5$"),
    "smoothing": (of.label_smoothing([3, 3], 0.1, 5, 1e-2, 1e-3), "CE loss, label smoothing 0.1", "$n = 3$, $d = 5$"),
    "labels": (
        of.multi_label_bce([[1, 1], [1, 0], [0, 0]], [1] * 3, 5, 1e-2, 1e-3),
        "BCE loss, binary targets",
        "$M = 3$",
    ),
}


@pytest.mark.parametrize(("problem", "loss", "sizes"), NAMES.values(), ids=list(NAMES))
def test_names(problem, loss, sizes, tmp_path):
    run = run_of(problem, tmp_path / "run")
    assert run.loss == loss
    assert sizes in run.sizes
    assert r"\lambda_W = 1 \times 10^{-2}" in run.penalties
    assert (r"\lambda_b = 5 \times 10^{-1}" in run.penalties) == (problem.bias == 0.5)


def test_figures_put_equal_losses_into_one_panel(tmp_path):
    problems = [problem for problem, _, _ in NAMES.values()]
    runs = [run_of(problem, tmp_path / str(i)) for i, problem in enumerate([*problems, problems[0]])]
    runs.append(record(tmp_path / "paper", CURVES, loss="ce", lambda_w=1e-2, lambda_h=1e-3))
    png, _ = draw_gaps(runs, tmp_path / "gap")
    assert matplotlib.image.imread(png).shape[1] == pytest.approx(2 * 920, abs=1)  # Four losses, two in a row.
    assert len(dict.fromkeys(run.loss for run in runs)) == 4
    draw_collapse(runs, tmp_path / "collapse")
    assert len(group_runs(runs)) == 6
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(settings_table(group_runs(runs)))
    console.file.close()
    assert "CE loss, label smoothing 0.1" in console.export_text()


def test_many_runs_of_problems_share_panels(tmp_path):
    runs = [run_of(of.label_smoothing([3, 3], 0.01 * i, 5, 1e-2, 1e-3), tmp_path / str(i)) for i in range(1, 26)]
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nclightning.figures.many.save", lambda figure, _: drawn.append(figure) or [])
        draw_gaps(runs, tmp_path / "gap")
    assert len(drawn[0].axes) == len(group_runs(runs)) <= 24


def constants(problem):
    """What the table says of kappa."""
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    summary = type("Summary", (), {"iteration": 1, "last": {}, "fits": {}, "kappa": 2.0, "predicted": None})
    console.print(rates_table(summary, problem=problem))
    console.file.close()
    lines = console.export_text().splitlines()
    return [line.split("│")[2].strip() for line in lines if "theory" in line]


def test_the_table_has_the_constant_of_theory_where_it_is_known():
    problem = of.unbalanced_ce([9, 4, 1], 5, 1e-2, 1e-3)
    assert constants(problem) == [f"{problem.rates.error_bound_constant:.6g}"]
    assert constants(problem.replace(feature_dim=1)) == []  # No optimum is known.
    large = of.unbalanced_ce(range(1, 61), 100, 1e-3, 1e-4)
    assert constants(large) == []
    assert "convex_optimum" not in vars(large)  # It is not solved for nothing.


def test_the_certified_gap_takes_the_place_of_one_that_is_not_known(tmp_path):
    problem = of.unbalanced_ce([9, 4, 1], 1, 1e-2, 1e-3)
    bound = run_of(problem, tmp_path / "bound", {"optimality/certified_gap": geometric(40, 20)})
    exact = run_of(problem.replace(feature_dim=3), tmp_path / "exact")
    for runs in ([bound], [bound, exact], [bound, exact] * 12):
        png, _ = draw_gaps(runs, tmp_path / "gap")
        assert matplotlib.image.imread(png)[..., :3].std() > 0.03
    assert bound.summary.fits["optimality/certified_gap"].iterations_per_decade == pytest.approx(40, rel=1e-6)
    assert draw_convergence(bound.folder).is_file()


STRANGE = {
    "text": "classification",
    "number": 3,
    "list": ["a"],
    "empty": {},
    "other class": {"class_path": "os.system", "init_args": {"command": "touch ran"}},
    "function of ours": {"class_path": "nclightning.problems.balanced_ce", "init_args": {"num_classes": 3}},
    "nothing inside": {"class_path": "nclightning.problems.Problem", "init_args": None},
    "no loss": {"class_path": "nclightning.problems.Problem", "init_args": {"counts": [3]}},
    "loss is text": {"class_path": "nclightning.problems.Problem", "init_args": {"loss": "ce"}},
    "path is a number": {"class_path": "nclightning.problems.Problem", "init_args": {"loss": {"class_path": 3}}},
    "no Loss": {"class_path": "nclightning.problems.Problem", "init_args": {"loss": {"class_path": "nclightning.cli"}}},
    "code": {"class_path": "nclightning.problems.Problem", "init_args": {"loss": {"class_path": "ran.on_import.Loss"}}},
}


def test_what_others_call_a_problem_is_no_error_and_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "ran").mkdir()
    (tmp_path / "ran" / "on_import.py").write_text("raise SystemExit('imported')")
    runs = [record(tmp_path / name, CURVES, loss="hinge", problem=problem) for name, problem in STRANGE.items()]
    for run, name in zip(runs, STRANGE, strict=True):
        assert run.problem is None, name
        assert isinstance(run.loss, str), name
        assert (run.sizes, run.penalties) == ("$K = 10$, $n = 10$, $d = 20$", name)
    draw_gaps(runs, tmp_path / "gap")  # One picture: each takes a second.
    assert "ran.on_import" not in sys.modules
    assert not (tmp_path / "ran").is_file()


def test_a_described_value_that_does_not_fit_is_no_error(tmp_path):
    good = of.unbalanced_ce([9, 4], 3, 1e-2, 1e-3).describe()
    for name, value in {"counts": "abc", "lambda_w": "x", "targets": [[1], [2, 3]]}.items():
        bad = {**good, "init_args": {**good["init_args"], name: value}}
        run = record(tmp_path / name, CURVES, problem=bad)
        assert run.problem is None
        assert run.loss == "CrossEntropy loss"


class Own(of.SquaredError):
    """A loss that only this module knows."""

    short_name = "own"


def test_a_loss_of_your_own_is_known_where_it_is_loaded(tmp_path, monkeypatch):
    problem = of.Problem(Own(), None, [3, 3], 3, 1e-2, 1e-3)
    assert run_of(problem, tmp_path / "a").loss == "own loss"
    monkeypatch.delitem(sys.modules, __name__)
    elsewhere = run_of(problem, tmp_path / "b")
    assert (elsewhere.problem, elsewhere.loss) == (None, "Own loss")
    assert elsewhere.strength == (1e-3, 1e-2)


def test_long_tables_of_targets_are_read(tmp_path):
    """160 x 160 targets are more entries than an alias may stand for."""
    problem = of.label_smoothing([2] * 160, 0.1, 5, 1e-2, 1e-3)
    run = run_of(problem, tmp_path / "run")
    assert (run.folder / "hparams.yaml").stat().st_size > 200_000
    assert torch.equal(run.problem.targets, problem.targets)
