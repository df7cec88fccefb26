"""Claims decided on curves whose rates are known, and the report of them."""

import re

import numpy as np
import pytest

from nclightning.reproduction.claims import check_claims
from nclightning.reproduction.experiments import FIGURES, experiments
from nclightning.reproduction.report import write_report
from tests.recorded import NC, geometric, record

GAP = "optimality/gap"


class Folder:
    """Makes runs with folders of their own."""

    def __init__(self, path):
        self.path, self.count = path, 0

    def run(self, curves, loss, lambda_h=1e-3):
        self.count += 1
        return record(self.path / str(self.count), curves, loss=loss, lambda_w=10 * lambda_h, lambda_h=lambda_h)

    def gap(self, loss, per_decade=100.0, decades=20.0, lambda_h=1e-3):
        return self.run({GAP: geometric(per_decade, decades)}, loss, lambda_h)

    def collapse(self, loss, factor=2.0, decades=40.0, lambda_h=1e-3):
        iterations, nc1 = geometric(50, decades)
        slower = 10.0 ** (-iterations / (50 * factor))
        return self.run(
            {NC[0]: (iterations, nc1), NC[1]: (iterations, slower), NC[2]: (iterations, slower)}, loss, lambda_h
        )


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / "runs")


def curved(decades):
    """Falls like a power of the iteration: never a straight line."""
    iterations = np.arange(0, 2000, 10.0)
    return iterations, (1 + iterations) ** (-decades / np.log10(2000))


def held(figure, runs):
    return [claim.held for claim in check_claims({figure: runs})]


def test_figure_1(folder):
    both = [folder.gap("mse"), folder.gap("ce", 30)]
    assert held(1, both) == [True, True]
    assert held(1, [*both, folder.gap("ce", 60)]) == [True, False]
    assert held(1, [*both, folder.gap("mse", decades=9)]) == [False, True]
    claims = check_claims({1: [*both, folder.run({GAP: curved(20)}, "ce")]})
    assert not claims[0].held
    assert claims[0].evidence.startswith("3 curves, straight over ")
    assert claims[0].evidence.endswith(" to 20.0 decades")


def test_the_spread_of_rates_is_stated(folder):
    _, rates = check_claims({1: [folder.gap("mse", 100), folder.gap("mse", 250), folder.gap("ce", 30)]})
    assert rates.evidence == "MSE: a factor of 2.50, CE: a factor of 1.00"


def test_a_curve_without_a_line_has_no_equal_rate(folder):
    flat = folder.run({GAP: (np.arange(0.0, 100, 10), np.ones(10))}, "mse")
    assert held(1, [folder.gap("mse"), flat, folder.gap("ce")]) == [False, False]


@pytest.mark.parametrize(("factor", "faster"), [(2.0, True), (1.2, False)])
def test_figure_3(folder, factor, faster):
    assert held(3, [folder.collapse(loss, factor) for loss in ("mse", "ce")]) == [True, faster]


def test_nc1_is_compared_on_its_own_stretch(folder):
    """NC1 falls ten decades, then stands; NC2 and NC3 fall half as fast all along: no longer line makes them slower."""
    iterations = np.arange(0, 4001, 20.0)
    nc1 = 10.0 ** -np.minimum(iterations / 100, 10)
    slower = 10.0 ** -(iterations / 200)
    curves = dict(zip(NC, ((iterations, values) for values in (nc1, slower, slower)), strict=True))
    runs = [folder.run(curves, loss) for loss in ("mse", "ce")]
    _, faster = check_claims({3: runs})
    assert faster.held
    first, last = (int(v) for v in re.search(r"iterations (\d+)-(\d+)", faster.evidence).groups())
    assert first <= 100
    assert 900 <= last <= 1200
    ratio = float(re.search(r"([\d.]+) times NC2", faster.evidence).group(1))
    assert ratio == pytest.approx(2.0 * min(last, 1000) / last, abs=0.01)


def test_figure_3_needs_long_lines(folder):
    # NC2 and NC3 fall by four decades.
    short, whole = folder.collapse("mse", decades=8), folder.collapse("ce")
    assert held(3, [short, whole]) == [False, True]
    claim, _ = check_claims({3: [short, whole]})
    assert claim.evidence == "NC1 over 8.0 and 40.0, NC2 over 4.0 and 20.0, NC3 over 4.0 and 20.0 decades (MSE and CE)"


def test_figures_2_and_4_need_a_lambda_that_works_and_one_that_does_not(folder):
    good = [folder.gap("mse", lambda_h=6e-4), folder.gap("ce", lambda_h=4e-4)]
    bad = [folder.run({GAP: curved(6)}, "mse", 5e-6), folder.gap("ce", decades=3.5, lambda_h=5e-6)]
    (claim,) = check_claims({2: good + bad})
    assert claim.held
    assert claim.evidence == "MSE: lambda 0.0006 out of 0.0006, 5e-06; CE: lambda 0.0004 out of 0.0004, 5e-06"
    assert held(2, good) == [False]
    assert held(2, bad) == [False]
    good = [folder.collapse("mse"), folder.collapse("ce")]
    # NC1 falls far enough, NC2 and NC3 do not.
    bad = [folder.collapse(loss, factor=4.0, decades=6) for loss in ("mse", "ce")]
    assert held(4, good + bad) == [True]
    assert held(4, good) == [True]
    assert held(4, bad) == [False]


def test_the_report_states_every_curve_and_verdict(folder, tmp_path):
    runs = {1: [folder.gap("mse"), folder.gap("ce", 30)], 3: [folder.collapse("mse"), folder.collapse("ce")]}
    runs[1].append(folder.run({GAP: (np.arange(0.0, 30, 10), np.ones(3))}, "ce", 5e-4))
    claims = check_claims(runs)
    text = write_report(tmp_path, runs, claims, quick=True).read_text()
    assert "Shortened runs" in text
    assert text.count("**held**") + text.count("**did not hold**") == len(claims) == 4
    assert "| MSE | 0.01 | 0.001 | gap | 2000 | 1.0e-20 | 100 | 1.00000 | 20.0 | 0-2000 |" in text
    assert "| CE | 0.005 | 0.0005 | gap | 20 | 1.0e+00 | - | - | - | - |" in text
    assert len(re.findall(r"^\| (?:MSE|CE) \|", text, re.MULTILINE)) == 3 + 2 * 3
    assert "![Figure 3" in text
    assert "Figure 2" not in text


def test_experiments_cover_what_the_claims_need():
    for quick in (False, True):
        listed = experiments(quick=quick)
        assert len({each.name for each in listed}) == len(listed)
        for figure in FIGURES:
            of_loss = {
                loss: [e for e in listed if figure in e.figures and f"_{loss}_" in e.name] for loss in ("mse", "ce")
            }
            least = {1: 2 if quick else 4, 2: 2, 3: 1, 4: 2}[figure]
            assert all(len(own) >= least for own in of_loss.values())
    assert {e.name for e in experiments((3,))} == {f"ufm_{loss}_lambda_w_5e-4_lambda_h_5e-5" for loss in ("mse", "ce")}
