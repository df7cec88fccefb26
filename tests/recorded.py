"""Run folders with curves of known rates."""

import numpy as np
import yaml

from nclightning.figures import read_run

NC = ("nc/train/nc1", "nc/train/nc2", "nc/train/nc3")
SIZES = {"num_classes": 10, "samples_per_class": 10, "feature_dim": 20}


def geometric(per_decade, decades, start=1.0, count=200):
    """Iterations and values of a line that falls by that many decades."""
    iterations = np.unique(np.linspace(0, per_decade * decades, count).round())
    return iterations, start * 10.0 ** (-iterations / per_decade)


def record(folder, curves, **settings):
    """Write a run folder whose tags share the iterations of the first curve, and read it."""
    folder.mkdir(parents=True)
    iterations = next(iter(curves.values()))[0]
    rows = [",".join(["iteration", *curves])]
    for i, iteration in enumerate(iterations):
        rows.append(",".join([str(int(iteration)), *(repr(float(values[i])) for _, values in curves.values())]))
    (folder / "readings.csv").write_text("\n".join(rows) + "\n")
    if settings:
        (folder / "hparams.yaml").write_text(yaml.safe_dump(SIZES | settings))
    return read_run(folder)
