"""The picture of several optimizers on one problem."""

import matplotlib.image
import numpy as np
import pytest

from nclightning.figures import draw_optimizers
from tests.recorded import geometric, record

GAP, NC0, DECAY = "optimality/gap", "nc/train/nc0", "optimality/predicted_decay"


def run(folder, *tags, per_decade=100.0, loss="ce"):
    iterations, values = geometric(per_decade, 20)
    curves = dict.fromkeys(tags, (iterations, values))
    return record(folder, curves, loss=loss, lambda_w=5e-3, lambda_h=5e-3)


@pytest.fixture
def runs(tmp_path):
    """One with a predicted decay, one without, one without a gap."""
    return {
        "GD": run(tmp_path / "a", GAP, NC0, DECAY),
        "Adam": run(tmp_path / "b", GAP, NC0, per_decade=500.0),
        "AdamW": run(tmp_path / "c", NC0, per_decade=900.0),
    }


def test_gaps_are_above_with_their_prediction_and_nc0_below(runs, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("nclightning.figures.optimizers.save", lambda figure, _: drawn.append(figure) or [])
    draw_optimizers({"mse": runs, "ce": runs}, tmp_path / "a")
    above, _, below, _ = drawn[0].axes
    labels = [text.get_text() for text in above.get_legend().get_texts()]
    assert labels == ["GD  (100 it./decade, predicted 100)", "Adam  (500 it./decade)", "predicted decay"]
    prediction, gap, *_ = above.lines
    assert np.allclose(prediction.get_ydata(), gap.get_ydata(), rtol=1e-9)
    assert above.get_xlim()[1] == pytest.approx(1.05 * 2000)  # Where the run with a prediction ends.
    labels = [text.get_text() for text in below.get_legend().get_texts()]
    assert labels == [f"{name}  (1.0e-20 at the end)" for name in runs]
    assert below.get_xscale() == "log"


def test_one_loss_and_no_prediction(runs, tmp_path):
    del runs["GD"]
    png, pdf = draw_optimizers({"ce": runs}, tmp_path / "a")
    assert matplotlib.image.imread(png).shape[1] == pytest.approx(920, abs=1)  # Matplotlib before 3.11 rounds down.
    assert pdf.read_bytes().startswith(b"%PDF")
