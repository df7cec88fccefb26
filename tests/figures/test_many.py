"""Figures of many runs: bounded in panels, size and time whatever their number."""

import numpy as np
import pytest

from nclightning.cli import main
from nclightning.figures import Readings, Run, draw_collapse, draw_gaps, group_runs, read_run, summarize, thinned
from tests.recorded import NC, geometric, record

GAP = "optimality/gap"
SIZES = {"num_classes": 10, "samples_per_class": 10, "feature_dim": 20}


def run(folder, loss="mse", lambda_h=1e-3, count=40, **sizes):
    iterations, values = geometric(100, 8, count=count)
    readings = Readings(iterations, dict.fromkeys((GAP, *NC), values))
    settings = SIZES | sizes | {"loss": loss, "lambda_h": lambda_h, "lambda_w": 10 * lambda_h}
    return Run(folder, readings, summarize(readings), settings)


@pytest.mark.parametrize("number", [1, 13, 24, 25, 200, 1000])
@pytest.mark.parametrize("losses", [("mse",), ("mse", "ce"), tuple(map(str, range(40)))], ids=len)
def test_at_most_24_groups_hold_every_run_once(tmp_path, number, losses):
    one = run(tmp_path)
    runs = [
        Run(
            tmp_path / str(i),
            one.readings,
            one.summary,
            one.settings | {"loss": losses[i % len(losses)], "lambda_h": i},
        )
        for i in range(number)
    ]
    groups = group_runs(runs)
    assert 1 <= len(groups) <= 24
    assert sorted(each.folder for group in groups for each in group.runs) == sorted(each.folder for each in runs)
    if len(losses) < 24:
        assert all(len({each.loss for each in group.runs}) == 1 for group in groups)
    strengths = [each.strength for group in groups for each in group.runs if each.loss == losses[0]]
    assert strengths == sorted(strengths)


def test_seeds_of_a_setting_share_a_panel_and_runs_without_settings_are_named(tmp_path):
    runs = [run(tmp_path / f"{i}", lambda_h=10.0 ** -(i % 3)) for i in range(30)]
    assert [len(group.runs) for group in group_runs(runs)] == [10, 10, 10]
    assert group_runs(runs)[0].title.startswith("MSE loss, 10 runs\n$\\lambda = 1 ")
    plain = [Run(tmp_path / f"x{i}", runs[0].readings, runs[0].summary, {}) for i in range(2)]
    assert [group.title for group in group_runs(plain)] == ["1 run\nx0", "1 run\nx1"]


@pytest.mark.parametrize(("draw", "few"), [(draw_gaps, 20), (draw_collapse, 12)])
def test_more_runs_make_no_larger_picture(tmp_path, draw, few):
    runs = [run(tmp_path / f"r{i}", ("mse", "ce")[i % 2], 1e-3 * (1 + i // 3)) for i in range(few + 50)]
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nclightning.figures.many.save", lambda figure, _: drawn.append(figure) or [])
        draw(runs, tmp_path / "many")
    width, height = drawn[0].get_size_inches()
    assert width <= 16.3
    assert height <= 10.1
    assert len(drawn[0].axes) == len(group_runs(runs)) <= 24


def test_bands_end_where_runs_end_and_skip_what_is_not_positive(tmp_path):
    """The median stops when half of the runs have; the band goes on."""
    short, long = run(tmp_path / "a"), run(tmp_path / "b")
    cut = Readings(
        short.readings.iterations[:20], {GAP: np.where(np.arange(20) == 3, 0, short.readings.values[GAP][:20])}
    )
    runs = [Run(tmp_path / str(i), cut, short.summary, short.settings) for i in range(15)]
    runs += [Run(tmp_path / f"l{i}", long.readings, long.summary, long.settings) for i in range(6)]
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nclightning.figures.many.save", lambda figure, _: drawn.append(figure) or [])
        draw_gaps(runs, tmp_path / "gap")
    (axes,) = drawn[0].axes
    (line,) = axes.lines
    last = line.get_xdata()[np.isfinite(line.get_ydata())].max()
    assert last == pytest.approx(cut.iterations[-1], abs=5)
    assert axes.collections[0].get_datalim(axes.transData).x1 == long.readings.iterations[-1]


def test_thinned_runs_keep_ends_and_what_converges(tmp_path):
    whole = record(tmp_path / "a", {GAP: geometric(100, 20, count=2000), "loss": geometric(100, 20, count=2000)})
    thin = thinned(whole)
    assert set(thin.readings.values) == {GAP}
    assert len(thin.readings.iterations) == 400
    assert thin.readings.iterations[[0, -1]].tolist() == whole.readings.iterations[[0, -1]].tolist()


def test_plot_of_many_runs_prints_one_table(tmp_path, capsys):
    first = record(
        tmp_path / "r0",
        {tag: geometric(100, 5, count=60) for tag in (GAP, *NC)},
        loss="mse",
        lambda_w=1e-2,
        lambda_h=1e-3,
    )
    folders = []
    for i in range(26):
        folders.append(tmp_path / f"run{i}")
        folders[-1].mkdir()
        for name in ("readings.csv", "hparams.yaml"):
            (folders[-1] / name).write_bytes((first.folder / name).read_bytes())
    main(["plot", *map(str, folders), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert printed.count("median of the runs") == 1
    assert "Iteration" not in printed.replace("Iterations per decade", "")
    assert " 26 " in printed
    assert read_run(folders[0]).summary.fits[GAP].iterations_per_decade == pytest.approx(100)
