"""What docs/measure_command.md shows runs, and the options and names of the page exist."""

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nclightning.cli import main
from nclightning.figures import read_readings
from nclightning.series.arrays import NAMES
from tests.series import training

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "measure_command.md").read_text()
pytestmark = pytest.mark.filterwarnings("ignore")


def commands():
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL):
        yield from (shlex.split(line)[3:] for line in block.splitlines())


def test_commands_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    labels = np.repeat(np.arange(3), 5)
    features = np.eye(3, 4)[labels] + np.random.default_rng(0).normal(size=(15, 4)) / 9
    np.savez("features.npz", features=features, labels=labels)
    np.save("features.npy", features)
    np.save("labels.npy", labels)
    (tmp_path / "dumps").mkdir()
    for step in (1, 2):
        tensors = {"h": torch.tensor(features), "y": torch.tensor(labels), "fc.weight": torch.eye(3, 4).double()}
        torch.save(tensors, tmp_path / "dumps" / f"step_{step}.pt")
    training.train(tmp_path, 2)
    monkeypatch.setitem(sys.modules, "my_project", training)
    monkeypatch.setattr(training, "Digits", training.Data, raising=False)
    sizes = ("--model.init_args.num_classes", "3", "--model.init_args.samples_per_class", "4", "--lambda", "5e-3")
    quiet = ("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false")
    main(["fit", "--config", "ufm_mse", *sizes, "--trainer.max_steps", "20", *quiet])
    shown = list(commands())
    assert len(shown) == 7
    for words in shown:
        if "reviews.csv" in words:
            datasets = pytest.importorskip("datasets")
            monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
            from tests.series.models import save_models  # noqa: PLC0415  # Skips without transformers.

            (tmp_path / "models").mkdir()
            save_models(tmp_path / "models")
            (tmp_path / "output").symlink_to(tmp_path / "models" / "out")
            rows = "".join(f"w{i} w{i + 1},{name}\n" for i in range(9) for name in ("bad", "ok", "good"))
            (tmp_path / "reviews.csv").write_text("review,sentiment\n" + rows)
        main(words)
        out = words[words.index("--out") + 1] if "--out" in words else "measured"
        assert len(read_readings(out).iterations) >= 1
        assert Path(out, "measured.png").exists()


def test_names_and_options_of_the_page_are_those_of_the_command(capsys):
    for role, names in NAMES.items():
        line = next(line for line in PAGE.splitlines() if line.startswith(f"| {role} "))
        assert re.findall(r"`([\w.]+)`", line.split("|")[2]) == list(names)
    with pytest.raises(SystemExit):
        main(["measure", "--help"])
    printed = capsys.readouterr().out
    assert {option for option in re.findall(r"--\w+", PAGE) if option not in printed} == set()
