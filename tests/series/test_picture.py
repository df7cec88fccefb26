"""What the picture of a series shows."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure

from nclightning.figures.series import draw_series
from nclightning.table import ReadingsTable


@pytest.mark.parametrize(("values", "scale"), [((0.2, 0.13, 0.11), "linear"), ((1.0, 1e-4, 1e-9), "log")])
def test_both_axes_have_ticks_and_steps_are_whole(values, scale, tmp_path, monkeypatch):
    table = ReadingsTable(tmp_path / "readings.csv")
    table.append([(2 * i + 2, {"nc/train/nc1": value}) for i, value in enumerate(values)])
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: (drawn.append(self), path.write_bytes(b"x")))
    draw_series(tmp_path, tmp_path / "a.png")
    axes = drawn[0].axes[0]
    low, high = axes.get_ylim()
    assert axes.get_yscale() == scale
    assert sum(low <= tick <= high for tick in axes.get_yticks()) >= 2
    assert np.array_equal(axes.get_xticks(), np.round(axes.get_xticks()))
    plt.close("all")
