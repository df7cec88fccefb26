"""The commands that train nothing themselves."""

import inspect

import pytest
import yaml

from nclightning import problems
from nclightning.cli import main
from nclightning.problem_options import problem_names
from nclightning.problems import label_smoothing, unbalanced_ce
from nclightning.reproduction import reproduce
from tests.recorded import NC, geometric, record

SIZES = [
    *("--loss", "ce", "--num_classes", "10", "--samples_per_class", "10", "--feature_dim", "20"),
    *("--lambda", "5e-3"),
]


def test_plot_draws_what_the_runs_have_and_prints_their_rates(tmp_path, capsys):
    record(tmp_path / "a", {"optimality/gap": geometric(100, 20)}, loss="mse", lambda_w=1e-2, lambda_h=1e-3)
    record(tmp_path / "b", {tag: geometric(100, 20) for tag in NC})
    main(["plot", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "new" / "folder")])
    drawn = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert drawn == ["collapse.pdf", "collapse.png", "gap.pdf", "gap.png"]
    printed = capsys.readouterr().out
    assert printed.count("Iteration 2000") == 2
    assert "1.000e-20" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plot", "nowhere"], "error: no readings.csv, metrics.csv or TensorBoard events in nowhere"),
        (["reproduce", "--jobs", "0"], "error: jobs must be at least 1, got 0"),
        (["reproduce", "--out", "/proc/nowhere"], "error: cannot write /proc/nowhere: .*Choose another --out"),
        (["theory"], "error: loss is missing: give --loss, or a --config that has it"),
        (["theory", *SIZES[:-2]], "error: lambda_w is missing: give lambda_w and lambda_h, or the paper's single"),
        (["theory", *SIZES, "--feature_dim", "3"], "error: feature_dim must be at least num_classes - 1 = 9"),
        (["theory", *SIZES, "--lambda_h", "0"], "error: lambda_h must be positive and finite, got 0.0"),
        (["theory", "--config", "nowhere"], "error: --config nowhere: no such file, and no shipped"),
        (["theory", *SIZES, "--picture", "a.xyz"], "error: --picture a.xyz: the ending must be one of"),
    ],
)
def test_errors_are_one_line_for_the_user(words, message):
    with pytest.raises(SystemExit, match=message) as caught:
        main(words)
    assert "\n" not in str(caught.value)


def test_plot_says_where_it_cannot_write(tmp_path):
    record(tmp_path / "a", {"optimality/gap": geometric(100, 20)})
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"error: cannot write .*file: File exists"):
        main(["plot", str(tmp_path / "a"), "--out", str(tmp_path / "file")])


def test_names_in_brackets_are_printed_as_they_are(tmp_path, capsys, monkeypatch):
    record(tmp_path / "x[" / "b]y", {"optimality/gap": geometric(100, 20)})
    monkeypatch.chdir(tmp_path)
    main(["plot", "x[/b]y", "--out", "o[b]"])
    printed = capsys.readouterr().out
    assert "x[/b]y" in printed
    assert "wrote o[b]/gap.png" in printed


@pytest.mark.parametrize("text", ["", "iteration,optimality/gap\n", "iteration,optimality/gap\n0", "iteration,op"])
def test_a_run_that_has_just_begun_has_no_readings_yet(tmp_path, text):
    (tmp_path / "readings.csv").write_text(text)
    with pytest.raises(SystemExit, match="holds no readings yet"):
        main(["plot", str(tmp_path)])


def test_a_line_in_writing_is_left_out(tmp_path, capsys):
    (tmp_path / "readings.csv").write_text("iteration,optimality/gap\n0,1.0\n10,1e-5\n20,1e-1")  # ...0
    main(["plot", str(tmp_path), "--out", str(tmp_path)])
    assert "1.000e-05" in capsys.readouterr().out


def test_plot_says_when_there_is_nothing_to_draw(tmp_path):
    record(tmp_path / "a", {"loss": geometric(100, 20)})
    with pytest.raises(SystemExit, match="no reading to draw in"):
        main(["plot", str(tmp_path / "a")])


def test_figures_are_checked_for_callers_from_python(tmp_path):
    with pytest.raises(ValueError, match=r"figures must be out of 1, 2, 3, 4, 'error_bound', 'optimizers', got \[5\]"):
        reproduce([5], out=tmp_path)


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    for name in ("fit", "validate", "test", "reproduce", "plot", "theory"):
        assert f"nclightning {name}" in printed or f"{{{name}" in printed or f",{name}" in printed


@pytest.mark.parametrize("words", [SIZES, ["--config", "ufm_ce.yaml"], [*SIZES[:-2], "--config", "ufm_mse"]])
def test_theory_takes_sizes_or_a_configuration(words, tmp_path, capsys):
    main(["theory", *words, "--picture", str(tmp_path / "spectrum.pdf")])
    printed = capsys.readouterr().out
    for number in ("0.003719457", "0.1161851", "268.8565"):  # mu, L and kappa at the paper's sizes and lambda.
        assert number in printed
    assert (tmp_path / "spectrum.pdf").read_bytes().startswith(b"%PDF")
    assert f"wrote {tmp_path / 'spectrum.pdf'}" in printed


@pytest.mark.parametrize(
    ("words", "penalties"),
    [
        (["--lambda", "1e-3"], "lambda_w = 0.01, lambda_h = 0.001"),
        (["--lambda_w", "0.02"], "lambda_w = 0.02, lambda_h = 0.005"),
        (["--lambda_h", "0.02"], "lambda_w = 0.05, lambda_h = 0.02"),
        (["--lambda", "1e-3", "--lambda_h", "0.02"], "lambda_w = 0.01, lambda_h = 0.02"),
        (["--samples_per_class", "20"], "lambda_w = 0.1, lambda_h = 0.005"),
    ],
)
def test_options_win_over_the_configuration(words, penalties, capsys):
    main(["theory", "--config", "ufm_mse", *words])
    assert penalties in capsys.readouterr().out


def test_theory_reads_the_configuration_of_a_run(tmp_path, capsys):
    saved = {"loss": "mse", "num_classes": 3, "samples_per_class": 2, "feature_dim": 5}
    config = {"model": {"init_args": saved | {"lambda_w": "1e-2", "lambda_h": 5e-3, "lambda_": None}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    main(["theory", "--config", str(tmp_path / "config.yaml")])
    assert "MSE loss, K = 3, n = 2, d = 5, lambda_w = 0.01, lambda_h = 0.005" in capsys.readouterr().out
    main(["theory", "--config", str(tmp_path / "config.yaml"), "--lambda", "1e-2"])
    assert "lambda_w = 0.02, lambda_h = 0.01" in capsys.readouterr().out


LONG_TAIL = [
    *("--problem", "unbalanced_ce", "--problem.counts", "[100, 10, 1]", "--feature_dim", "5"),
    *("--lambda_w", "1e-3", "--lambda_h", "1e-3"),
]
LINE = "CE loss, K = 3, n = 1 to 100, N = 111, d = 5, lambda_w = 0.001, lambda_h = 0.001, no bias"


def test_theory_answers_for_any_problem(tmp_path, capsys):
    main(["theory", *LONG_TAIL, "--thresholds", "--picture", str(tmp_path / "spectrum.pdf")])
    printed = capsys.readouterr().out
    problem = unbalanced_ce([100, 10, 1], 5, 1e-3, 1e-3)
    for text in (LINE, f"{problem.optimal_value:.10g}", f"{problem.mu:.7g}", f"threshold {problem.threshold:.6g}"):
        assert text in printed
    assert "0.00036115" in printed  # Where the smallest class is lost, by bisection.
    assert (tmp_path / "spectrum.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("name", problem_names())
def test_theory_knows_each_member_by_its_short_name(name, capsys):
    """With the arguments that each asks for, given as text."""
    arguments = {
        "counts": "4,2,1",
        "targets": "[[1, 0], [0, 1], [1, 0]]",
        "num_classes": "3",
        "samples_per_class": "2",
        "samples_per_pair": "1",
        "feature_dim": "4",
        "lambda_w": "1e-2",
        "lambda_h": "1e-2",
        "lambda_b": "1e-1",
        "smoothing": "1e-1",
        "class_weights": "inverse",
    }
    parameters = inspect.signature(getattr(problems, name)).parameters.values()
    needed = [each.name for each in parameters if each.default is each.empty]
    words = [word for each in needed for word in (f"--problem.{each}", arguments[each])]
    main(["theory", "--problem", name, *words])
    printed = capsys.readouterr().out
    assert "lambda_w = 0.01, lambda_h = 0.01" in printed
    assert "minimum F*" in printed
    assert "kappa" in printed


def test_theory_takes_the_problem_of_a_configuration(tmp_path, capsys):
    arguments = {"counts": ["100", 10, 1], "feature_dim": 5, "lambda_w": "1e-3", "lambda_h": "0.001", "bias": "none"}
    problem = {"class_path": "nclightning.problems.unbalanced_ce", "init_args": arguments}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"model": {"init_args": {"problem": problem, "loss": None}}}))
    main(["theory", "--config", str(path)])
    assert LINE in capsys.readouterr().out
    main(["theory", "--config", str(path), "--feature_dim", "7", "--lambda_w", "0.5", "--problem.bias", "1e-1"])
    assert "d = 7, lambda_w = 0.5, lambda_h = 0.001, lambda_b = 0.1" in capsys.readouterr().out
    main(["theory", "--config", str(path), "--problem", "balanced_mse", *LONG_TAIL[-6:], *SIZES[2:6]])
    assert "MSE loss, K = 10, n = 10, d = 5" in capsys.readouterr().out


def test_theory_reads_what_a_run_keeps(tmp_path, capsys):
    problem = label_smoothing([3, 2, 2], 0.1, 4, 1e-2, 1e-3)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"model": {"init_args": {"problem": problem.describe()}}}))
    main(["theory", "--config", str(path)])
    assert problem.summary() in capsys.readouterr().out


def test_theory_says_what_has_no_answer_and_prints_the_rest(tmp_path, capsys):
    words = ["theory", *LONG_TAIL, "--feature_dim", "1", "--picture", str(tmp_path / "a.png")]
    with pytest.raises(SystemExit, match=r"--picture .*a.png: not drawn. optimum: feature_dim=1 is below the rank 2"):
        main(words)
    printed = capsys.readouterr().out
    assert "No optimum: feature_dim=1 is below the rank 2 of the optimal logits" in printed
    assert "lower bound of F*" in printed
    assert list(tmp_path.iterdir()) == []
    main(words[:-2])
    assert "lower bound of F*" in capsys.readouterr().out


def test_theory_refuses_a_penalty_on_weights(tmp_path):
    (tmp_path / "a.yaml").write_text("model: {init_args: {penalty: weights}}")
    with pytest.raises(SystemExit, match="penalty='weights' has no closed form, only 'features' has"):
        main(["theory", "--config", str(tmp_path / "a.yaml")])
