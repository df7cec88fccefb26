"""Predictions on paper: tables of the theory, the picture of the spectrum, predicted beside measured."""

import math

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from nclightning.figures import draw_convergence, draw_spectrum, summarize
from nclightning.figures.prediction import describe_problem, prediction_tables
from nclightning.figures.summary import predicted_gap
from nclightning.figures.tables import rates_table
from nclightning.problems import (
    NoAnswer,
    balanced_ce,
    mse_without_bias,
    multi_label_bce,
    regression,
    unbalanced_ce,
    unbalanced_mse,
)
from nclightning.theory import UFMProblem
from tests.cases import COLLAPSED, LOW_RANK, ZERO, name_of
from tests.problems.cases import CASES
from tests.recorded import geometric, record

PAPER = UFMProblem("ce", 10, 10, 20, 5e-2, 5e-3)
IMAGENET = UFMProblem("ce", 1000, 1300, 2048, 6.5e-6, 5e-9)
ALL = [*COLLAPSED, *LOW_RANK, *ZERO, IMAGENET]
LONG_TAIL = [500, 300, 100, 50, 20, 10, 5, 5, 3, 1]


def printed(*tables, width=80):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in tables:
        console.print(table)
    console.file.close()
    return console.export_text()


@pytest.mark.parametrize("problem", ALL, ids=name_of)
def test_tables_fit_a_terminal_and_have_every_eigenvalue(problem):
    text = printed(*prediction_tables(problem))
    assert "…" not in text
    assert "nan" not in text
    for value, multiplicity, sector in problem.spectrum():
        assert f"{value:.7g}" in text
        assert f" {multiplicity} " in text
        assert sector in text
    assert f"{problem.optimal_value:.10g}" in text
    assert f"{problem.error_bound_constant:.7g}" in text


def test_tables_of_the_paper_sizes_in_numbers():
    text = printed(*prediction_tables(PAPER))
    for number in ("0.003719457", "0.1161851", "268.8565", "31.23712", "16.67993", "35.3843", "17.9754", "135"):
        assert number in text, number
    assert describe_problem(PAPER) == "CE loss, K = 10, n = 10, d = 20, lambda_w = 0.05, lambda_h = 0.005"


@pytest.mark.parametrize("name", list(CASES))
def test_tables_of_any_problem(name):
    problem = CASES[name]()
    text = printed(*prediction_tables(problem))
    assert "…" not in text
    assert "nan" not in text
    assert f"{problem.optimal_value:.10g}" in text
    assert f" {problem.dimension} " in text
    assert f"{problem.rates.error_bound_constant:.7g}" in text
    assert multiplicities(text) == sum(each.multiplicity for each in problem.spectrum())


def multiplicities(text):
    """Sum of the column of the spectrum, whose rows are at most 25."""
    rows = text.partition("The Hessian of F")[2].partition("Conditioning")[0].splitlines()
    cells = [row.split("│")[1:4] for row in rows if row.startswith("│")]
    assert len(cells) <= 25
    return sum(int(multiplicity) for _, multiplicity, _ in cells)


def test_momentum_stands_below_gradient_descent():
    """Lessard, Recht and Packard (2016), Proposition 1, at kappa = 31.23712 and mu = 0.003719457."""
    rows = printed(*prediction_tables(PAPER)).partition("Fixed step and momentum")[2].splitlines()
    cells = [[cell.strip() for cell in row.split("│")[1:6]] for row in rows if row.startswith("│")]
    root, far = math.sqrt(31.23712), math.sqrt(3 * 31.23712 + 1)
    expected = {
        "gradient descent": (16.67993, 0, 30.23712 / 32.23712),
        "Nesterov": (4 / 0.003719457 / far**2, (far - 2) / (far + 2), 1 - 2 / far),
        "heavy ball": (4 / 0.003719457 / (root + 1) ** 2, ((root - 1) / (root + 1)) ** 2, (root - 1) / (root + 1)),
    }
    assert [row[0] for row in cells] == list(expected)
    for (_, *numbers), (step, momentum, factor) in zip(cells, expected.values(), strict=True):
        decade = -math.log(10) / 2 / math.log(factor)
        # Seven digits are printed.
        assert [float(each) for each in numbers] == pytest.approx([step, momentum, factor, decade], rel=5e-6, abs=1e-6)


def test_a_problem_and_the_papers_agree():
    """The closed form and the general theory print the same numbers for the same problem."""
    text = printed(*prediction_tables(balanced_ce(10, 10, 20, 5e-2, 5e-3)))
    for number in ("0.003719457", "0.1161851", "268.8565", "31.23712", "16.67993", "35.3843", "17.9754", "135"):
        assert number in text, number


@pytest.mark.parametrize("width", [80, 120])
def test_many_eigenvalues_share_rows_that_hold_each_of_them(width):
    problem = unbalanced_ce(LONG_TAIL, 16, 1e-2, 1e-3)
    text = printed(*prediction_tables(problem), width=width)
    assert "…" not in text
    assert "A row may hold several neighbouring eigenvalues of a sector." in text
    entries = problem.spectrum()
    assert len(entries) > 100
    assert multiplicities(text) == sum(each.multiplicity for each in entries)
    rows = text.partition("The Hessian of F")[2].partition("Conditioning")[0].splitlines()
    spans = [[cell.strip() for cell in row.split("│")[1:4]] for row in rows if row.startswith("│")]
    for entry in entries:
        ends = ([float(end) for end in value.split(" to ")] for value, _, sector in spans if sector == entry.sector)
        assert any(min(e) * (1 - 1e-6) <= entry.value <= max(e) * (1 + 1e-6) for e in ends), entry


@pytest.mark.parametrize(
    ("problem", "sentence"),
    [
        (unbalanced_ce(LONG_TAIL, 16, 1e-2, 1e-3), "Classes 6, 7 share one feature and one row of the head."),
        (unbalanced_ce([100, 100, 2, 2, 2], 4, 1e-2, 1e-2), "Classes 2-4 share one feature and one row of the head."),
        (CASES["soft labels"](), "Group 2 has vanished: the features are zero."),
        (CASES["zero, ce"](), "The optimum is zero: nothing is learned."),
    ],
    ids=["two", "three", "vanished", "zero"],
)
def test_what_has_merged_or_vanished_is_said(problem, sentence):
    assert sentence in printed(*prediction_tables(problem), width=100)


def test_many_classes_that_vanish_are_named_in_ranges():
    counts = [1000] * 3 + [1, 1000] * 15 + [1] * 40
    text = " ".join(printed(*prediction_tables(mse_without_bias(counts, 80, 1e-3, 1e-3))).split())
    assert "Classes 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25 and 43 more have vanished" in text


def test_thresholds_of_a_formula_are_those_of_the_counts():
    """Class k vanishes iff n_k is at most N^2 lambda_w lambda_h (Dang et al. 2024)."""
    text = printed(*prediction_tables(mse_without_bias([60, 30, 10], 4, 1e-3, 1e-3)))
    rows = text.partition("Where the rank")[2].partition("The Hessian")[0].splitlines()
    cells = [[cell.strip() for cell in row.split("│")[1:4]] for row in rows if row.startswith("│")]
    assert cells == [
        ["1e-06", "3", "as given"],
        ["0.001", "2", ""],
        ["0.003", "1", ""],
        ["0.006", "0", "zero"],
    ]


def test_thresholds_without_a_formula_are_searched_for_when_asked():
    problem = unbalanced_ce([12, 12, 1, 1], 4, 0.01, 0.02)
    assert "Where the rank" not in printed(*prediction_tables(problem))
    text = printed(*prediction_tables(problem, thresholds=True))
    for value in ("0.0014793", "0.007639", "0.017751"):  # By bisection of the rank alone.
        assert value in text


@pytest.mark.parametrize(
    ("problem", "words", "bound"),
    [
        (unbalanced_ce(LONG_TAIL, 3, 1e-2, 1e-3), "No optimum: feature_dim=3 is below the rank 5", "0.8862732681"),
        (unbalanced_ce([5, 3, 0], 3, 1e-2, 1e-3, "free"), "No optimum: F has no minimum with a free bias", None),
        (
            multi_label_bce([[1, 0], [1, 1]], [3, 3], 3, 1e-2, 1e-3, "free"),
            "No optimum: F has no minimum with a free bias: all or no samples have label 0",
            None,
        ),
        (unbalanced_mse([9, 9, 3, 3, 3], 3, 1e-3, 1e-3), "No distance: feature_dim=3 keeps some of several", None),
        (regression(np.arange(50) * np.eye(50), 100, 1e-6, 1e-6), "No spectrum: its dense part has 4950 rows", None),
    ],
    ids=["few features", "absent class", "label of all", "choice of directions", "many rows"],
)
def test_what_has_no_answer_says_why_and_the_rest_is_there(problem, words, bound):
    text = printed(*prediction_tables(problem), width=200)
    assert words in text
    assert text.count("No ") == 1
    if bound is not None:
        assert f"lower bound of F* │ {bound}" in text
    if "distance" in words or "spectrum" in words:
        assert f"{problem.optimal_value:.10g}" in text
    with pytest.raises(NoAnswer):
        problem.spectrum()


def test_what_is_heuristic_is_marked_and_what_is_undefined_left_out():
    assert "NC1 *" in printed(*prediction_tables(PAPER))
    single = printed(*prediction_tables(UFMProblem("ce", 4, 1, 5, 0.02, 0.02)))
    assert "NC1" not in single
    assert "NC2 *" in single


SPECTRA = {name_of(problem): problem for problem in (PAPER, IMAGENET, LOW_RANK[1], *ZERO[:3])}
SPECTRA |= {name: CASES[name]() for name in ("merged minorities", "penalized bias", "mixup", "zero, mse")}


@pytest.mark.parametrize("problem", SPECTRA.values(), ids=list(SPECTRA))
def test_spectrum_is_drawn(problem, tmp_path):
    path = draw_spectrum(problem, tmp_path / "spectrum.png")
    picture = matplotlib.image.imread(path)
    assert picture.shape[:2] == (840, 1280)  # 6.4 x 4.2 inches at 200 dots.
    assert picture[..., :3].std() > 0.05


def test_the_ending_decides_the_format(tmp_path):
    assert draw_spectrum(PAPER, tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    assert "<svg" in draw_spectrum(PAPER, tmp_path / "a.SVG").read_text()


@pytest.mark.parametrize(
    ("name", "message"),
    [("a.xyz", "the ending must be one of .*pdf, .*png"), ("a", "the ending"), ("no/a.png", "cannot be written")],
)
def test_pictures_that_cannot_be_drawn_are_refused(name, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        draw_spectrum(PAPER, tmp_path / name)


@pytest.fixture
def run(tmp_path):
    """A run whose gap takes 40 iterations per decade, and whose prediction is 38."""
    gap = geometric(40, 20, start=3.0)
    return record(
        tmp_path / "run",
        {
            "optimality/gap": gap,
            "optimality/distance": (gap[0], np.sqrt(gap[1])),
            "optimality/error_bound_ratio": (gap[0], np.full_like(gap[1], 250.0)),
            "optimality/predicted_decay": (gap[0], 10.0 ** (-gap[0] / 38)),
        },
        loss="ce",
        lambda_w=5e-2,
        lambda_h=5e-3,
    )


def test_prediction_is_fitted_over_the_range_of_the_gap(run):
    fit, predicted = run.summary.fits["optimality/gap"], run.summary.predicted
    assert (predicted.first, predicted.last) == (fit.first, fit.last)
    assert fit.iterations_per_decade == pytest.approx(40, rel=1e-9)
    assert predicted.iterations_per_decade == pytest.approx(38, rel=1e-9)


def test_table_has_theory_below_measurement(run):
    lines = printed(rates_table(run.summary, problem=run.problem)).splitlines()
    gap, kappa = (next(i for i, line in enumerate(lines) if name in line) for name in ("gap F - F*", "kappa"))
    assert "theory" in lines[gap + 1]
    assert " 38 " in lines[gap + 1]
    assert "250" in lines[kappa]
    assert "theory" in lines[kappa + 1]
    assert "268.856" in lines[kappa + 1]
    assert "theory" not in printed(rates_table(summarize(without_decay(run))))


def without_decay(run):
    run.readings.values.pop("optimality/predicted_decay")
    return run.readings


def test_the_prediction_meets_the_middle_of_the_fitted_line(run):
    fit = run.summary.fits["optimality/gap"]
    iterations, values = predicted_gap(run.readings, run.summary)
    middle = (fit.first + fit.last) / 2
    assert np.interp(middle, iterations, np.log10(values)) == pytest.approx(fit.intercept + fit.slope * middle)
    assert np.polyfit(iterations, np.log10(values), 1)[0] == pytest.approx(-1 / 38)
    assert predicted_gap(run.readings, summarize(without_decay(run))) is None


def test_picture_has_the_prediction(run, tmp_path):
    drawn = matplotlib.image.imread(draw_convergence(run.folder, tmp_path / "with.png"))
    table = run.folder / "readings.csv"
    table.write_text(table.read_text().replace("predicted_decay", "other"))
    without = matplotlib.image.imread(draw_convergence(run.folder, tmp_path / "without.png"))
    assert not np.array_equal(drawn, without)


def test_only_runs_of_the_ufm_have_a_problem(tmp_path, run):
    assert run.problem == PAPER
    curves = {"optimality/gap": geometric(40, 20)}
    network = record(tmp_path / "mlp", curves, loss="ce", lambda_w=5e-2, lambda_h=5e-3, hidden_dim=64, input_dim=9)
    unnamed, zero, text = (
        record(tmp_path / "a", curves, loss="ce"),
        record(tmp_path / "b", curves, loss="ce", lambda_w=0.0, lambda_h=5e-3),
        record(tmp_path / "c", curves, loss="ce", lambda_w="some", lambda_h=5e-3),
    )
    assert [r.problem for r in (network, unnamed, zero, text)] == [None] * 4


def test_at_the_threshold_the_tables_say_so():
    text = printed(*prediction_tables(UFMProblem("mse", 4, 4, 3, 0.125, 0.125)))
    assert "at the threshold" in text
    assert "heavy ball" not in text
    assert text.count("inf") >= 4
    assert math.isinf(UFMProblem("mse", 4, 4, 3, 0.125, 0.125).error_bound_constant)
