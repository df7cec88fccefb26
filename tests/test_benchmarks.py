"""The studies of the two-layer network, at toy sizes against dense computations and made-up curves; the line search."""

import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.func import functional_call, jacrev

from nclightning.theory import UFMProblem

ROOT = Path(__file__).resolve().parents[1]
TOY = {"num_classes": 3, "samples_per_class": 4, "feature_dim": 5, "input_dim": 40, "hidden_dim": 32}


def load(name, monkeypatch):
    """Import a script of a folder that is no package, for one test."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def search(monkeypatch):
    return load("mlp_search", monkeypatch)


@pytest.fixture
def rate(search, monkeypatch):
    return load("mlp_rate", monkeypatch)


@pytest.fixture
def toy(search):
    """Give a network on its way, and the batch."""
    return search.run(search.Setting("mse", 5e-3, 0.05, 40), TOY)[:2]


def curves(gap, nc1=None, gates=0.5):
    """Readings with made-up gaps at 0, 10, 20, ..."""
    gap = np.asarray(gap)
    nc1 = gap if nc1 is None else nc1
    return np.column_stack([10.0 * np.arange(len(gap)), gap, nc1, gap, gap, np.full(len(gap), gates)])


X = np.linspace(0, 1, 101)
LINE = 10.0 ** (-20 * X)


@pytest.mark.parametrize(
    ("readings", "word"),
    [
        (curves(LINE), "straight"),
        (curves(np.maximum(LINE, 10.0 ** (-2 - X))), "slow"),
        (curves(LINE, nc1=10.0 ** (-20 * np.sqrt(X))), "curved"),
        (curves(10.0 ** (-20 * X**2)), "curved"),
        (curves(LINE, nc1=np.maximum(LINE, 1e-16)), "straight"),  # A floor of round-off is no bend.
        (curves(10.0 ** (-9 * X)), "slow"),
        (curves(1e4 * X + 1), "diverged"),
        (curves(np.append(LINE, np.nan)), "diverged"),
        (curves(LINE, gates=0.01), "dead"),
        (curves(np.maximum(LINE, 10.0 ** (20 * X - 20))), "unstable"),
    ],
)
def test_curves_are_named_by_the_rule(readings, word, search):
    assert search.outcome(readings) == word


def test_a_run_descends_reads_every_ten_iterations_and_ends_at_the_floor(search):
    setting = search.Setting("ce", 2e-2, 1.0, 1000, first=0.3)
    model, batch, readings = search.run(setting, TOY)
    assert readings[:, 0].tolist() == [10.0 * i for i in range(len(readings))]
    assert readings[-1, 1] <= search.FLOOR < readings[-2, 1]
    assert search.outcome(readings) == "straight"
    features = model.backbone(batch[0])
    assert readings[-1, 1] == float(model.problem.optimality_gap(model.head.weight, features, batch[1]))
    assert readings[-1, 2:5].max() < 1e-9
    assert search.row(setting, readings).count("|") == search.HEADER.count("|")


def test_runs_that_fail_end_early_and_say_so(search):
    diverged = search.run(search.Setting("mse", 5e-3, 50.0, 1000), TOY)[2]
    assert len(diverged) < 20
    assert search.outcome(diverged) == "diverged"
    model, batch = search.build(search.CE, TOY)
    with torch.no_grad():
        model.backbone[0].bias.fill_(-100)
    assert search.failure(np.array([[0.0, *search.read(model, batch)]])) == "dead"


def test_the_settings_of_the_table_hold_those_of_the_configurations(search):
    for setting in (search.CE, search.MSE):
        text = (ROOT / "configs" / f"mlp_{setting.loss}.yaml").read_text()
        assert float(re.search(r"lambda: (\S+)", text)[1]) == setting.lam
        assert float(re.search(r"lr: (\S+)", text)[1]) == setting.step
        assert float(re.search(r"first_layer_scale: (\S+)", text)[1]) == setting.first
        assert setting in search.SETTINGS
    assert len(set(search.SETTINGS)) == len(search.SETTINGS)


def test_extremes_of_the_kernel_are_those_of_the_dense_jacobian(rate, toy):
    model, (x, _) = toy
    parameters = {name: p.detach() for name, p in model.backbone.named_parameters()}
    blocks = jacrev(lambda values: functional_call(model.backbone, values, (x,)).reshape(-1))(parameters)
    jacobian = torch.cat([b.reshape(len(x) * TOY["feature_dim"], -1) for b in blocks.values()], dim=1)
    expected = torch.linalg.eigvalsh(jacobian @ jacobian.T)
    kernel = rate.feature_kernel(model.backbone, x)
    top, misfit = rate.extremes(kernel, "LA", 3)
    (least,), _ = rate.extremes(kernel, "SA")
    assert top == pytest.approx(expected.flip(0)[:3].numpy(), rel=1e-6)
    assert least == pytest.approx(float(expected[0]), rel=1e-6)
    assert misfit < 1e-3


def test_curvatures_are_those_of_the_dense_hessian(rate, search):
    model, batch, readings = search.run(search.Setting("ce", 2e-2, 1.0, 1000, first=0.3), TOY)
    assert readings[-1, 1] <= search.FLOOR
    operator = rate.hessian(model, batch)
    dense = operator @ np.eye(operator.shape[0])
    values = np.linalg.eigvalsh((dense + dense.T) / 2)
    expected = values[values > 1e-6 * values[-1]][0]
    found, misfit = rate.least_curvature(operator)
    assert found == pytest.approx(expected, rel=1e-3)
    assert misfit <= 1e-2
    assert rate.extremes(operator, "LA")[0][0] == pytest.approx(values[-1], rel=1e-6)


@pytest.mark.parametrize(("loss", "expected"), [("mse", 4.952924e-4), ("ce", 5e-4)])
def test_least_curvature_of_the_free_features_is_the_closed_form(loss, expected, rate):
    problem = UFMProblem(loss, 10, 10, 20, lambda_w=5e-3, lambda_h=5e-4)
    assert rate.ufm_curvature(problem) == pytest.approx(expected, rel=1e-6)


def test_the_rate_is_bounded_by_the_kernel(rate, search):
    setting = replace(search.CE, lam=2e-2, step=1.0, first=0.3)
    assert rate.initial_row(1.0, TOY).count("|") == 7
    column = rate.final_column(setting, TOY)
    bound, least, measured = (
        float(column[name])
        for name in ("2 mu, features kappa times as fast", "2 x least curvature of F", "rate of the gap, measured")
    )
    assert bound <= least * 1.01
    assert measured == pytest.approx(least, rel=0.1)
    assert float(column["largest residual"]) <= 1e-2


def test_the_page_shows_a_row_for_each_setting(search):
    page = (ROOT / "docs" / "mlp.md").read_text()
    header, _, *rows = re.search(r"\| loss \| lambda(?:.*\n)(?:\|.*\n)+", page)[0].splitlines()
    assert header == search.HEADER
    assert [" | ".join(r.strip("| ").split(" | ")[:6]) for r in rows] == [search.cells(s) for s in search.SETTINGS]
    for setting in (search.CE, search.MSE):
        assert rows[search.SETTINGS.index(setting)].endswith("| straight |")


@pytest.mark.parametrize("loss", ["ce", "mse"])
def test_the_line_search_saves_evaluations_and_costs_no_iterations(loss, monkeypatch):
    """Bounds of the whole table, on the settings that are quick."""
    line_search = load("line_search", monkeypatch)
    row = line_search.compare(loss, 5e-3, seeds=range(2))
    assert row.failures == 0
    assert max(row.evaluations) <= 0.65
    assert max(row.iterations) <= 1.3
    assert line_search.line(f"{loss} | 0.005", [row]).count("|") == line_search.HEADER.count("|")


def test_the_opponent_of_the_line_search_is_armijo_gd_that_always_grows(monkeypatch):
    """As long as the step is far below the bound, patience 1 doubles it at each iteration too."""
    line_search = load("line_search", monkeypatch)
    model = line_search.Model("ce", 2e-4)
    x = model.start(0)
    ours = line_search.with_armijo_gd(model, x, patience=1, grow=2.0)
    other = line_search.growing_at_every_iteration(model, x)
    for _ in range(4):
        (p, _, evaluations), (q, _, count) = next(ours), next(other)
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-15)
        assert evaluations == count


def test_the_line_search_reports_runs_that_do_not_arrive(monkeypatch):
    line_search = load("line_search", monkeypatch)
    monkeypatch.setattr(line_search, "MAX_ITERATIONS", 10)
    row = line_search.compare("mse", 5e-3, seeds=range(2))
    assert row.failures == 4
    assert all(run.iterations == 10 for run in row.ours + row.opponent)
