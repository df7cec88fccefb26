"""The examples do what their README says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nclightning.functional import class_statistics, etf_deviation, self_duality, within_class_variability

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(folder, script, *options):
    """Run an example as a user would, elsewhere."""
    command = [sys.executable, str(EXAMPLES / script), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=folder, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def factors(printed):
    """How much NC1, NC2 and NC3 fell."""
    rows = [line.split() for line in printed.splitlines() if line.startswith("NC")]
    return {name: float(first) / float(last) for name, first, last, _ in rows}


# A third of the least of seeds 0, 1 and 2: 274, 20.7 and 60.7 for the CNN, 4040, 25.7 and 83 for the transformer.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "least"),
    [("cnn.py", {"NC1": 90, "NC2": 7, "NC3": 20}), ("transformer.py", {"NC1": 1300, "NC2": 8, "NC3": 27})],
)
def test_collapse_by_orders_of_magnitude(script, least, tmp_path):
    picture = tmp_path / "picture.png"
    fell = factors(run(tmp_path, script, "--picture", str(picture)))
    assert all(fell[name] >= factor for name, factor in least.items()), fell
    assert picture.stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_classifier_of_transformers_is_read_rightly(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import digits  # noqa: PLC0415
    import huggingface  # noqa: PLC0415

    trainer, module = huggingface.main(["--epochs", "1", "--folder", str(tmp_path)])
    images, labels = digits.load()[0].tensors
    with torch.no_grad():
        hidden = module.model.eval().vit(images).last_hidden_state[:, 0]
    stats, weight = class_statistics(hidden, labels, 10), module.model.classifier.weight.detach().double()
    read = {name: float(trainer.callback_metrics[f"nc/train/{name}"]) for name in digits.NAMES}
    expected = {
        "nc1": float(within_class_variability(stats)),
        "nc2": float(etf_deviation(weight)),
        "nc3": float(self_duality(stats, weight)),
    }
    # Float32 forwards in batches of another size.
    assert read == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_two_processes_read_what_one_reads(tmp_path):
    printed = run(tmp_path, "ddp.py", "--epochs", "1")
    difference = float(printed.rsplit("one process: ", 1)[1])
    # Float32 forwards in batches of another size.
    assert difference <= 1e-6
