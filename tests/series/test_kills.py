"""A series that is killed, at any of its states, ends with the bytes of one that was not."""

import csv

import numpy as np
import pytest
import torch

from nclightning.cli import main
from nclightning.compat.recorded import read_scalars
from nclightning.series import runner
from nclightning.series.arrays import ArraySource
from tests.series.forks import Killer, run_killed
from tests.series.training import MEASURES, WORDS, train

pytestmark = pytest.mark.filterwarnings("ignore")  # Of few workers, and of forking.


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train(folder, 20)
    return folder


def rows_of(path):
    with path.open(newline="") as file:
        return {int(row.pop("iteration")): row for row in csv.DictReader(file)}


def check_events(folder):
    """Each step is there once, with the values of the table."""
    table, events = rows_of(folder / "readings.csv"), read_scalars(str(folder))
    for tag, curve in events.items():
        assert [step for step, _ in curve] == list(table)
        np.testing.assert_array_equal([v for _, v in curve], [np.float32(row[tag]) for row in table.values()])


def test_twenty_checkpoints_killed_twice_are_those_that_training_logged(trained, tmp_path, capsys):
    words = ["measure", str(trained / "checkpoints"), *WORDS, "--measures", *MEASURES, "--out"]
    main([*words, str(tmp_path / "whole")])
    printed = capsys.readouterr()
    assert "last.ckpt has the same weights as" in printed.err
    assert "Neural collapse of 20 states" in printed.out
    assert run_killed([*words, str(tmp_path / "killed")], Killer(6, "sync", "readings.csv"))
    assert len(rows_of(tmp_path / "killed" / "readings.csv")) == 6
    assert run_killed([*words, str(tmp_path / "killed")], Killer(7, "append", "readings.csv"))
    assert len(rows_of(tmp_path / "killed" / "readings.csv")) == 13
    main([*words, str(tmp_path / "killed")])
    whole = (tmp_path / "whole" / "readings.csv").read_bytes()
    assert (tmp_path / "killed" / "readings.csv").read_bytes() == whole
    assert "existing rows: 13, files to measure: 7" in capsys.readouterr().err
    for name in ("whole", "killed"):
        check_events(tmp_path / name)
        assert (tmp_path / name / "measured.png").stat().st_size > 10_000
    found, compared = rows_of(tmp_path / "whole" / "readings.csv"), 0
    with (trained / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            logged = {tag: float(value) for tag, value in row.items() if tag.startswith("nc/") and value}
            compared += len(logged)
            assert {tag: float(found[int(row["step"])][tag]) for tag in logged} == logged  # Bit by bit.
    assert compared == 20 * 2 * len(MEASURES)


def save_features(folder):
    generator, labels = np.random.default_rng(0), np.repeat(np.arange(3), 8)
    means = generator.normal(size=(3, 4))
    for step in (5, 10, 100):
        features = means[labels] + generator.normal(size=(24, 4)) / step
        np.savez(folder / f"step{step}.npz", h=features, y=labels, W=means)
    torch.save({"h": torch.tensor(features), "y": torch.tensor(labels)}, folder / "unrelated.dat")
    return [str(folder / f"step{step}.npz") for step in (100, 5, 10)]


def test_a_kill_at_any_operation_leaves_what_the_next_start_completes(tmp_path, monkeypatch, capsys):
    # What takes time and writes nothing while rows come.
    monkeypatch.setattr(runner, "draw_series", lambda folder, path: None)
    monkeypatch.setattr(ArraySource, "measure", lambda self: {"nc/train/nc1": self.step / 3, "nc/train/nc2": 0.1})
    files = save_features(tmp_path)
    main(["measure", *files, "--out", str(tmp_path / "whole")])
    whole, number, lost = (tmp_path / "whole" / "readings.csv").read_bytes(), 1, set()
    while True:
        words = ["measure", *files, "--out", str(tmp_path / f"killed{number}")]
        if not run_killed(words, Killer(number)):
            break
        table = tmp_path / f"killed{number}" / "readings.csv"
        lost.add(4 - len(table.read_text().splitlines()) if table.exists() else 3)
        main(words)
        assert table.read_bytes() == whole, number
        check_events(table.parent)
        assert {path.name for path in table.parent.iterdir()} <= {
            ".lock", "readings.csv", "measured.json", "events.out.tfevents.0000000000.rows"
        }, number  # fmt: skip
        number += 1
    assert number > 25
    assert lost == {0, 1, 2, 3}


def test_a_line_that_a_kill_has_cut_is_measured_again(tmp_path):
    words = ["measure", *save_features(tmp_path), "--out", str(tmp_path / "out")]
    main(words)
    table = tmp_path / "out" / "readings.csv"
    whole = table.read_bytes()
    table.write_bytes(whole[:-7])
    main(words)
    assert table.read_bytes() == whole
    check_events(table.parent)


@pytest.mark.slow
def test_several_processes_give_the_bytes_of_one(tmp_path, capsys):
    files = save_features(tmp_path)
    main(["measure", *files, "--out", str(tmp_path / "one")])
    main(["measure", *files, "--out", str(tmp_path / "two"), "--jobs", "2"])
    assert "Measuring 2 at a time (--jobs 2; about" in capsys.readouterr().err
    one, two = ((tmp_path / name / "readings.csv").read_bytes() for name in ("one", "two"))
    assert one == two
