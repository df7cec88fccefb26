"""Rates fitted to sequences whose rate is known, and a picture of a recorded run."""

import math

import matplotlib.image
import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib.figure import Figure

from nclightning.figures import draw_convergence, fit_rate, fit_straight, read_readings, summarize
from nclightning.loggers import ReadingsTable

ITERATIONS = np.arange(0, 2001, 10, dtype=float)


@pytest.mark.parametrize("factor", [0.9, 0.97, 0.995])
def test_exact_geometric_decay(factor):
    fit = fit_rate(ITERATIONS, 3.0 * factor**ITERATIONS)
    assert fit.factor == pytest.approx(factor, rel=1e-12)
    assert fit.iterations_per_decade == pytest.approx(-1 / math.log10(factor), rel=1e-10)
    assert fit.r_squared == pytest.approx(1.0, abs=1e-12)


def test_floor_and_transient_stay_out():
    """A plateau, then 0.95 per iteration, then round-off noise at 1e-16."""
    noise = 10 ** np.random.default_rng(0).uniform(-16.3, -15.8, len(ITERATIONS))
    values = 1 / (1 + 0.95 ** -(ITERATIONS - 300)) + noise
    fit = fit_rate(ITERATIONS, values)
    assert fit.factor == pytest.approx(0.95, rel=1e-3)
    assert fit.r_squared > 0.999
    assert fit.first > 300
    assert fit.last < 300 + 16.5 / -math.log10(0.95)


def test_at_most_the_last_decades_are_fitted():
    fit = fit_rate(ITERATIONS, 0.97**ITERATIONS, decades=15)
    assert fit.last == 2000
    # One reading is 0.13 decades.
    assert fit.decades == pytest.approx(15, abs=0.14)


def brute_force(x, y, lowest):
    """All stretches by numpy's own polynomial and correlation."""
    best = 0.0
    for i in range(len(x)):
        for j in range(i + 5, len(x) + 1):
            own = x[i:j], y[i:j]
            if y[j - 1] <= lowest and np.corrcoef(*own)[0, 1] ** 2 >= 0.99:
                best = max(best, -np.polyfit(*own, 1)[0] * (x[j - 1] - x[i]))
    return best


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("lowest", [math.inf, -4.0])
def test_longest_straight_stretch_is_that_of_all_stretches(seed, lowest):
    """Three slopes with noise."""
    rng = np.random.default_rng(seed)
    x = np.sort(rng.choice(1000, 60, replace=False)).astype(float)
    y = np.interp(x, [0, 300, 600, 1000], [0, -5, -6, -9]) + 0.05 * rng.normal(size=60)
    fit = fit_straight(x, 10.0**y, ending_at_most=10.0**lowest)
    assert fit.decades == pytest.approx(brute_force(x, y, lowest), rel=1e-10)
    assert fit.r_squared >= 0.99


def test_longest_straight_stretch_of_a_bent_line():
    """Slow above 1e-2, 0.95 per iteration down to 1e-12, a floor."""
    logs = np.interp(ITERATIONS, [0, 400, 400 + 10 / -math.log10(0.95), 2000], [0, -2, -12, -12])
    fit = fit_straight(ITERATIONS, 10.0**logs)
    assert fit.factor == pytest.approx(0.95, rel=0.02)
    # The line may reach a little into the bends at either end.
    assert 10 <= fit.decades <= 12.5
    # All of it is straight but only a tenth of its 20,001 readings is looked at.
    many = np.arange(20001.0)
    whole = fit_straight(many, 10.0 ** (-many / 1000))
    assert (whole.first, whole.last) == (0, 20000)
    assert whole.decades == pytest.approx(20)


@pytest.mark.parametrize(
    "values",
    [np.full(201, 2.0), np.full(201, np.nan), np.zeros(201), 1.1**ITERATIONS, 0.9 ** ITERATIONS[:4], np.ones(0)],
)
def test_what_does_not_fall_has_no_stretch(values):
    assert fit_straight(ITERATIONS[: len(values)], values) is None


def test_noise_has_no_long_stretch():
    noise = 10.0 ** np.random.default_rng(0).uniform(-3, 0, 201)
    fit = fit_straight(ITERATIONS, noise)
    assert fit is None or fit.last - fit.first < 100


@pytest.mark.parametrize("values", [np.full(201, 2.0), np.full(201, np.nan), np.zeros(201), np.full(201, -1.0)])
def test_what_does_not_converge_has_no_rate(values):
    assert fit_rate(ITERATIONS, values) is None


def test_few_points_have_no_rate():
    assert fit_rate(ITERATIONS[:4], 0.9 ** ITERATIONS[:4]) is None


def test_curves_of_two_cadences_are_lines(tmp_path, monkeypatch):
    """A value that only every second row has is drawn as a line, not as points that nobody sees."""
    rows = [
        (
            k,
            {"optimality/gap": 0.9**k, "optimality/predicted_decay": 0.9**k}
            | ({"nc/train/nc1": 0.8**k} if k % 2 else {}),
        )
        for k in range(60)
    ]
    ReadingsTable(tmp_path / "readings.csv").append(rows)
    drawn = []

    def keep(figure, path, **_):
        path.touch()
        drawn.append(figure)

    monkeypatch.setattr(Figure, "savefig", keep)
    draw_convergence(tmp_path, tmp_path / "a.pdf")
    curves = {line.get_label().partition(" ")[0]: line.get_xydata() for axes in drawn[0].axes for line in axes.lines}
    assert len(curves["gap"]) == 60
    # Whatever the optimizer was.
    assert {axes.get_xlabel() for axes in drawn[0].axes} == {"iteration"}
    np.testing.assert_allclose(curves["NC1"], [(k, 0.8**k) for k in range(1, 60, 2)])


def write_run(folder, tags):
    folder.mkdir()
    ReadingsTable(folder / "readings.csv").append(
        [(int(k), {tag: values[i] for tag, values in tags.items()}) for i, k in enumerate(ITERATIONS)]
    )
    return folder


@pytest.fixture
def run(tmp_path):
    gap = 0.95 ** (2 * ITERATIONS)
    return write_run(
        tmp_path / "run",
        {
            "optimality/gap": gap,
            "optimality/distance": 4 * np.sqrt(gap),
            "optimality/grad_norm": np.sqrt(gap) / 50,
            "optimality/error_bound_ratio": np.full_like(gap, 200.0),
            "nc/train/nc1": gap,
        },
    )


def test_summary(run):
    summary = summarize(read_readings(run))
    assert summary.iteration == 2000
    assert summary.kappa == 200.0
    assert summary.last["optimality/distance"] == pytest.approx(4 * 0.95**2000, rel=1e-12)
    assert summary.fits["optimality/distance"].factor == pytest.approx(0.95, rel=1e-10)
    assert set(summary.last) == {"optimality/gap", "optimality/distance", "optimality/grad_norm", "nc/train/nc1"}


def test_picture_is_drawn_from_the_table(run, tmp_path):
    assert draw_convergence(run, title="a run") == run / "convergence.png"
    picture = matplotlib.image.imread(run / "convergence.png")
    assert picture.shape[:2] == (630, 1680)  # Two panels of 5.6 x 4.2 inches at 150 dots.
    assert picture[..., :3].std() > 0.05
    assert draw_convergence(run, tmp_path / "other.pdf").read_bytes().startswith(b"%PDF")


def test_a_picture_drawn_once_is_that_of_savefig(run, tmp_path):
    once, twice = (draw_convergence(run, tmp_path / name, title="A run") for name in ("a.png", "b.PNG"))
    assert once.read_bytes() == twice.read_bytes()


def test_runs_without_readings_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no readings.csv, metrics.csv or .*lightning_logs/version_0"):
        read_readings(tmp_path)
    (tmp_path / "readings.csv").write_text("iteration,loss\n")
    with pytest.raises(ValueError, match="holds no readings yet"):
        read_readings(tmp_path)
    (tmp_path / "readings.csv").write_text("iteration,loss\n0,1.0\n")
    with pytest.raises(ValueError, match="has no readings of optimality/gap"):
        draw_convergence(tmp_path)


@pytest.mark.parametrize("make", [CSVLogger, TensorBoardLogger])
def test_folders_of_lightnings_own_loggers_are_read(make, tmp_path):
    logger = make(tmp_path)
    for step in range(0, 50, 10):
        logger.log_metrics({"nc/train/nc1": 2.0**-step}, step)
        logger.log_metrics({"loss": 3.0}, step)
        logger.log_metrics({"loss_epoch": 3.0}, max(step - 1, 0))  # As Lightning does with means over an epoch.
    logger.log_metrics({"val": 0.25}, 45)
    logger.save()
    read = read_readings(logger.log_dir)
    assert read.iterations.tolist() == [0, 10, 20, 30, 40]
    assert read.values["nc/train/nc1"].tolist() == [2.0**-step for step in range(0, 50, 10)]
    assert summarize(read).last == {"nc/train/nc1": 2.0**-40}


def test_event_files_without_scalars_are_named(tmp_path):
    TensorBoardLogger(tmp_path, name="", version="").experiment.flush()
    with pytest.raises(ValueError, match="have no readings yet"):
        read_readings(tmp_path)
