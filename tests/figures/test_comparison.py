"""Figures of several runs."""

import matplotlib.image
import numpy as np
import pytest

from nclightning.figures import draw_collapse, draw_gaps, read_run
from tests.recorded import NC, geometric, record

GAP = "optimality/gap"


def gap_run(folder, loss="mse", lambda_h=5e-3, lambda_w=None, per_decade=100):
    lambda_w = 10 * lambda_h if lambda_w is None else lambda_w
    return record(folder, {GAP: geometric(per_decade, 20)}, loss=loss, lambda_w=lambda_w, lambda_h=lambda_h)


def test_a_run_is_named_by_its_penalties_as_in_the_paper(tmp_path):
    assert gap_run(tmp_path / "a").penalties == r"$\lambda = 5 \times 10^{-3}$"
    assert gap_run(tmp_path / "b", lambda_h=0.00025).penalties == r"$\lambda = 2.5 \times 10^{-4}$"
    two = gap_run(tmp_path / "c", lambda_w=5e-4, lambda_h=5e-5)
    assert two.single_lambda  # n = 10: the penalties that the paper states for Figure 3.
    other = gap_run(tmp_path / "d", lambda_w=5e-4, lambda_h=1e-5)
    assert other.penalties == r"$\lambda_W = 5 \times 10^{-4},\ \lambda_H = 1 \times 10^{-5}$"
    assert other.sizes == "$K = 10$, $n = 10$, $d = 20$"
    plain = record(tmp_path / "e", {GAP: geometric(10, 5)})
    assert (plain.penalties, plain.loss, plain.sizes, plain.single_lambda) == ("e", "", "", False)


def test_hyperparameters_that_are_no_plain_yaml_are_left_out(tmp_path):
    gap_run(tmp_path / "a")
    (tmp_path / "a" / "hparams.yaml").write_text("net: !!python/object:torch.nn.Linear {}\n")
    assert read_run(tmp_path / "a").settings == {}


@pytest.mark.parametrize(("losses", "width"), [(("mse",), 1), (("mse", "ce"), 2), (("mse", "mse", "ce"), 2)])
def test_gaps_get_a_panel_per_loss(tmp_path, losses, width):
    runs = [gap_run(tmp_path / str(i), loss) for i, loss in enumerate(losses)]
    png, pdf = draw_gaps(runs, tmp_path / "gap")
    # Matplotlib before 3.11 rounds sizes down.
    assert matplotlib.image.imread(png).shape[:2] == pytest.approx((880, 920 * width), abs=1)
    assert pdf.read_bytes().startswith(b"%PDF")
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["gap.pdf", "gap.png"]


def test_drawing_again_gives_the_same_bytes(tmp_path):
    run = gap_run(tmp_path / "a")
    first = [p.read_bytes() for p in draw_gaps([run], tmp_path / "gap")]
    assert [p.read_bytes() for p in draw_gaps([run], tmp_path / "gap")] == first
    other = gap_run(tmp_path / "b", per_decade=150)
    assert [p.read_bytes() for p in draw_gaps([other], tmp_path / "gap")] != first


def test_collapse_gets_a_panel_per_run_and_skips_what_is_not_there(tmp_path):
    whole = record(tmp_path / "whole", {tag: geometric(100, 20) for tag in NC}, loss="ce", lambda_w=1e-3, lambda_h=1e-4)
    part = record(tmp_path / "part", {NC[0]: geometric(100, 20), NC[1]: (np.zeros(200), np.zeros(200))})
    png, _ = draw_collapse([whole, part, whole], tmp_path / "collapse")
    assert matplotlib.image.imread(png).shape[:2] == pytest.approx((1760, 1840), abs=1)


def test_curves_in_grey_differ(tmp_path):
    """Without colour, seven curves stay apart by dashes and markers."""
    from nclightning.figures.panels import MARKERS, STYLES  # noqa: PLC0415

    assert len({str(dashes) for _, dashes in STYLES}) == len(STYLES) == len(set(MARKERS))


def test_many_curves_differ_and_keep_the_size_of_the_axes(tmp_path):
    runs = [gap_run(tmp_path / f"r{i}", lambda_h=1e-3 * (i + 1)) for i in range(15)]
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nclightning.figures.comparison.save", lambda figure, _: drawn.append(figure) or [])
        draw_gaps(runs[:5], tmp_path / "few")
        draw_gaps(runs, tmp_path / "many")
    heights = []
    for figure in drawn:
        figure.draw_without_rendering()
        heights.append(figure.axes[0].get_window_extent().height)
    assert heights[1] > 0.9 * heights[0]
    lines = drawn[1].axes[0].lines
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 15


def test_equal_penalties_are_told_apart_by_folders(tmp_path):
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nclightning.figures.comparison.save", lambda figure, _: drawn.append(figure) or [])
        draw_gaps([gap_run(tmp_path / "seed0"), gap_run(tmp_path / "seed1")], tmp_path / "gap")
    labels = [line.get_label() for line in drawn[0].axes[0].lines]
    assert [label.partition("  (")[0][-7:] for label in labels] == [", seed0", ", seed1"]


@pytest.mark.parametrize(("name", "shown"), [("_run", "run"), ("a$b^^$c", r"a\$b^^\$c")])
def test_folders_with_signs_of_matplotlib_are_drawn(tmp_path, name, shown):
    run = record(tmp_path / name, {GAP: geometric(100, 20)})
    assert run.penalties == shown
    draw_gaps([run], tmp_path / "gap")


def test_settings_that_are_no_numbers_are_left_out(tmp_path):
    run = record(tmp_path / "a", {GAP: geometric(100, 20)}, lambda_w="x", lambda_h=[1], num_classes="$^^")
    assert (run.penalties, run.sizes, run.single_lambda) == ("a", "$n = 10$, $d = 20$", False)


def test_runs_without_the_quantity_are_named(tmp_path):
    run = record(tmp_path / "only_nc", {NC[0]: geometric(100, 20)})
    with pytest.raises(ValueError, match=r"only_nc has no readings of optimality/gap"):
        draw_gaps([run], tmp_path / "gap")
    with pytest.raises(ValueError, match="at least one run"):
        draw_collapse([], tmp_path / "collapse")


def test_a_full_disk_leaves_the_figure_before(tmp_path, monkeypatch):
    run = gap_run(tmp_path / "a")
    png, _ = draw_gaps([run], tmp_path / "gap")
    before = png.read_bytes()

    def full(self, target, **_):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(OSError, match="No space left"):
        draw_gaps([run], tmp_path / "gap")
    assert png.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["gap.pdf", "gap.png"]
