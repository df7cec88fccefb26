import json

import numpy as np
import pytest
import torch

import nclightning
from nclightning.errors import UserError
from nclightning.figures import read_run
from nclightning.report import read_records, verdicts_on, write_report
from tests.recorded import NC, geometric, record

FEATURES = torch.tensor([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.2], [-1.0, 0.0], [0.1, 1.0]])


def measured(**options):
    labels = torch.tensor([0, 0, 1, 1, 2])
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    return nclightning.measure(features=FEATURES, labels=labels, weight=weight, **options)


def test_a_measurement_is_the_same_from_memory_from_a_dict_and_from_its_file(tmp_path):
    found = measured()
    found.to_json(tmp_path / "m.json")
    records = read_records([found, found.to_dict(), tmp_path / "m.json"])
    assert [each.name for each in records] == ["measurement", "measurement (2)", "m"]
    first = verdicts_on(records[0])
    assert first == verdicts_on(records[1]) == verdicts_on(records[2])
    words = [verdict.words for verdict in first]
    assert "NC2 cannot vanish: K > d + 1" in words  # Three classes are there, and NC3 takes no more.
    assert "Some classes have no samples; class means leave them out" in words
    assert any(each.startswith("Classes are unbalanced") for each in words)
    assert "Not decided whether and how fast values fall: this is one state of the network" in words


def test_lightnings_own_loggers_are_read(tmp_path):
    folder = tmp_path / "csv"
    folder.mkdir()
    rows = [f"{epoch},{0.5 / (epoch + 1)},{100 * epoch + 99},1.5" for epoch in range(20)]
    (folder / "metrics.csv").write_text("epoch,nc/train/nc1,step,train_loss\n" + "\n".join(rows) + "\n")
    (found,) = read_records([folder])
    assert not found.has_iterations
    assert any(v.words.startswith("NC1: falling ever more slowly; more than") for v in verdicts_on(found))
    assert any("steps" in v.words for v in verdicts_on(found))


def test_several_loaders_and_absent_classes_have_verdicts_of_their_own(tmp_path):
    curves = {"nc/val/0/nc1": geometric(100, 4), "nc/val/1/nc1": (geometric(100, 4)[0], np.full(200, np.nan))}
    record(tmp_path / "a", curves)
    words = [verdict.words for verdict in verdicts_on(read_records([tmp_path / "a"])[0])]
    assert any(each.startswith("NC1 (val/0): still falling") for each in words)
    assert "NC1 (val/1): not decided, every reading is nan or infinite" in words


def test_a_folder_that_cannot_be_read_among_others_is_said_on_the_page(tmp_path):
    record(tmp_path / "good", {NC[0]: geometric(100, 4)})
    (tmp_path / "empty").mkdir()
    (tmp_path / "started").mkdir()
    (tmp_path / "started" / "readings.csv").write_text("iteration,nc/train/nc1\n")
    _, empty, started = read_records([tmp_path / "good", tmp_path / "empty", tmp_path / "started"])
    assert "no readings.csv" in empty.fault
    assert "holds no readings yet" in started.fault
    assert verdicts_on(started)[0].words == "Not decided: there are no readings"
    with pytest.raises(UserError, match=r"no readings\.csv"):
        read_records([tmp_path / "empty"])


def test_names_are_told_apart(tmp_path):
    for place in ("a/version_0", "b/version_0"):
        (tmp_path / place).parent.mkdir()
        record(tmp_path / place, {NC[0]: geometric(100, 4)})
    folders = [tmp_path / "a/version_0", tmp_path / "b/version_0", tmp_path / "b/version_0"]
    names = [each.name for each in read_records(folders)]
    assert names == ["a/version_0", "b/version_0", "b/version_0 (2)"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("{}", "has no measures: give what Measurement.to_json wrote"),
        ('{"measures": {"nc1": []}}', "a measure is no number"),
        ('{"measures": {"nc1": "x"}}', "a measure is no number"),
        ('{"measures": {"nc1": 1%s}}' % ("0" * 400), "a measure is no number"),
    ],
)
def test_json_of_something_else_is_refused(tmp_path, content, message):
    (tmp_path / "m.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_records([tmp_path / "m.json"])


def test_what_is_not_there_or_of_another_kind_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"nowhere does not exist: give the folder of a run"):
        read_records([tmp_path / "nowhere"])
    with pytest.raises(UserError, match="does not exist: give the folder of a run"):
        read_records(["y" * 300])
    with pytest.raises(UserError, match="give at least one run folder"):
        read_records([])
    with pytest.raises(TypeError, match="a report takes folders, files, Measurements and Runs, got int"):
        read_records([3])


def test_odd_measurements_have_a_page(tmp_path):
    """nan in JSON is text; lists that are no counts, and sizes that are none, are passed over."""
    odd = {"measures": {"nc1": "nan", "mine": 3}, "num_classes": 0, "per_class": {"count": ["a"]}, "feature_dim": None}
    (tmp_path / "m.json").write_text(json.dumps(odd))
    page = write_report(tmp_path / "m.json", tmp_path / "r.html").read_text()
    assert "Not decided: nc1." in page


def test_runs_and_single_paths_are_taken(tmp_path):
    run = record(tmp_path / "a", {NC[0]: geometric(100, 4)})
    one = write_report(tmp_path / "a", tmp_path / "1.html").read_text()
    assert "a - nclightning report" in one
    assert write_report(run, tmp_path / "2.html").exists()
    assert write_report([read_run(tmp_path / "a"), measured()], tmp_path / "3.html").exists()


def test_a_table_without_quantities_and_broken_text_have_a_page(tmp_path):
    """Names of files and strings of JSON may hold half of a surrogate pair, which is no text in UTF-8."""
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "readings.csv").write_text("iteration\n1\n2\n")
    (folder / "environment.json").write_text('{"host": "a\\ud800b"}')
    page = write_report(folder, tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Nothing to decide" in page
    assert "a?b" in page
