"""Run folders: tables that are complete, events that agree, and nothing written over."""

import math
import os
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nclightning.loggers import ReadingsTable, RunLogger


def lines(path):
    return path.read_text().splitlines()


def test_table_keeps_every_digit(tmp_path):
    table = ReadingsTable(tmp_path / "readings.csv")
    values = [0.1 + 0.2, 1e-310, 1e300, math.pi, -0.0]
    table.append([(i, {"a": v}) for i, v in enumerate(values)])
    assert [float(line.split(",")[1]).hex() for line in lines(table.path)[1:]] == [v.hex() for v in values]


def test_table_grows_by_rows_and_by_tags(tmp_path):
    table = ReadingsTable(tmp_path / "readings.csv")
    table.append([(0, {"a": 1.0})])
    table.append([(5, {"a": 2.0, "b": 3.0}), (10, {"b": 4.0})])
    assert lines(table.path) == ["iteration,a,b", "0,1.0,", "5,2.0,3.0", "10,,4.0"]


def test_table_of_a_continued_run_drops_what_comes_again(tmp_path):
    path = tmp_path / "readings.csv"
    ReadingsTable(path).append([(i, {"a": float(i)}) for i in (0, 5, 10, 15)])
    table = ReadingsTable(path)
    table.replace_from = 10
    assert len(lines(path)) == 5  # Nothing is dropped before there is something new.
    table.append([(10, {"a": -1.0})])
    table.append([(15, {"a": -2.0})])
    assert lines(path) == ["iteration,a", "0,0.0", "5,5.0", "10,-1.0", "15,-2.0"]


def test_table_survives_a_torn_last_line(tmp_path):
    path = tmp_path / "readings.csv"
    path.write_text("iteration,a,b\n0,1.0,2.0\n5,3.")
    table = ReadingsTable(path)
    table.replace_from = 5
    table.append([(5, {"a": 3.5, "b": 4.5})])
    assert lines(path) == ["iteration,a,b", "0,1.0,2.0", "5,3.5,4.5"]


def read_events(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_events_carry_the_rows_without_what_is_not_finite(tmp_path):
    logger = RunLogger(str(tmp_path))
    logger.log_rows([(0, {"a": 1.0, "b": math.nan}), (3, {"a": 0.5, "b": 2.0})])
    logger.save()
    assert read_events(logger.log_dir) == {"a": [(0, 1.0), (3, 0.5)], "b": [(3, 2.0)]}
    assert lines(logger.table.path) == ["iteration,a,b", "0,1.0,nan", "3,0.5,2.0"]
    logger.finalize("success")


def test_versions_count_up(tmp_path):
    folders = []
    for _ in range(3):
        logger = RunLogger(str(tmp_path))
        logger.claim()
        folders.append(os.path.basename(logger.log_dir))
    assert folders == ["version_0", "version_1", "version_2"]


def test_an_existing_run_is_not_written_over(tmp_path):
    folder = tmp_path / "lightning_logs" / "version_3"
    folder.mkdir(parents=True)
    (folder / "readings.csv").write_text("precious")
    logger = RunLogger(str(tmp_path), version=3)
    with pytest.raises(ValueError, match=r"run folder .*version_3 exists.*--ckpt_path"):
        logger.experiment  # noqa: B018
    assert os.listdir(folder) == ["readings.csv"]
    assert (folder / "readings.csv").read_text() == "precious"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write the run folder .*Not a directory.*save_dir"):
        RunLogger(str(tmp_path / "file")).claim()


def test_runs_that_start_together_get_folders_of_their_own(tmp_path):
    loggers = [RunLogger(str(tmp_path)) for _ in range(3)]
    assert {logger.version for logger in loggers} == {0}  # All have looked before any has made its folder.
    for logger in loggers:
        logger.claim()
    assert [os.path.basename(logger.log_dir) for logger in loggers] == ["version_0", "version_1", "version_2"]


def test_an_empty_folder_of_the_asked_name_is_taken(tmp_path):
    (tmp_path / "lightning_logs" / "mine").mkdir(parents=True)
    logger = RunLogger(str(tmp_path), version="mine")
    logger.claim()
    logger.claim()
    assert os.path.basename(logger.log_dir) == "mine"


def test_a_second_run_does_not_mix_into_the_first(tmp_path):
    logger = RunLogger(str(tmp_path))
    logger.log_rows([(0, {"a": 1.0}), (3, {"a": 0.5})])
    with pytest.raises(ValueError, match=r"iteration 0 came after iteration 3 in .*version_0: two runs share"):
        logger.log_rows([(0, {"a": 2.0})])
    assert lines(logger.table.path) == ["iteration,a", "0,1.0", "3,0.5"]


@pytest.mark.parametrize("ahead", [0, 3600], ids=["at once", "with the clock set back"])
def test_events_of_a_continued_run_replace_those_before(tmp_path, ahead):
    """TensorBoard reads event files by name, so by the time of their making."""
    folder = tmp_path / "lightning_logs" / "version_0"
    logger = RunLogger(str(tmp_path))
    logger.log_rows([(i, {"a": float(i)}) for i in (0, 5, 10)])
    logger.finalize("success")
    (first,) = folder.glob("events*")
    first.rename(folder / f"events.out.tfevents.{int(time.time()) + ahead}.zzz.9.0")
    for value in (-1.0, -2.0):
        logger = RunLogger(str(tmp_path))
        logger.continue_run(folder, 5)
        logger.log_rows([(5, {"a": value}), (7, {"a": value})])
        logger.finalize("success")
    assert read_events(folder) == {"a": [(0, 0.0), (5, -2.0), (7, -2.0)]}


def test_what_has_no_value_yet_makes_no_file(tmp_path):
    logger = RunLogger(str(tmp_path))
    logger.experiment.add_custom_scalars({"a": {"b": ["Multiline", ["c"]]}})
    logger.save()
    assert not list(tmp_path.rglob("*events*"))
    logger.experiment.add_scalar("a", 1.0, 0)
    logger.save()
    assert read_events(logger.log_dir) == {"a": [(0, 1.0)]}
    logger.finalize("success")


def test_a_fit_refused_at_its_start_leaves_nothing(tmp_path):
    logger = RunLogger(str(tmp_path))
    logger.log_hyperparams({"a": 1})
    logger.experiment.add_custom_scalars({"a": {"b": ["Multiline", ["c"]]}})
    logger.save()
    logger.finalize("failed")
    assert list((tmp_path / "lightning_logs").iterdir()) == []


def test_a_refused_resume_leaves_what_was_there(tmp_path):
    """Even after it has read the iterate that it would go on from."""
    logger = RunLogger(str(tmp_path))
    logger.log_rows([(i, {"a": float(i)}) for i in (0, 5, 10)])
    logger.finalize("failed")
    folder = Path(logger.log_dir)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    logger = RunLogger(str(tmp_path))
    logger.continue_run(folder, 5)
    logger.log_rows([(5, {"a": 5.0})])
    logger.save()
    logger.finalize("failed")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    logger = RunLogger(str(tmp_path))
    logger.continue_run(folder, 5)
    logger.log_rows([(5, {"a": 5.0})])
    logger.log_rows([(7, {"a": 7.0})])
    logger.finalize("success")
    assert read_events(folder) == {"a": [(0, 0.0), (5, 5.0), (7, 7.0)]}
    assert lines(folder / "readings.csv") == ["iteration,a", "0,0.0", "5,5.0", "7,7.0"]


def test_a_run_has_one_writer(tmp_path):
    first = RunLogger(str(tmp_path))
    first.claim()
    second = RunLogger(str(tmp_path))
    with pytest.raises(ValueError, match=r"another process is writing .*version_0"):
        second.continue_run(first.log_dir, 5)
    first.finalize("success")
    second.continue_run(first.log_dir, 5)


@pytest.mark.parametrize("url", ["file:///x", "s3://bucket/x", "memory://x"])
def test_runs_are_local(url):
    with pytest.raises(ValueError, match=rf"save_dir={url} is a URL, .*: give a path"):
        RunLogger(url)


@pytest.mark.parametrize("holds", [False, True])
def test_a_fit_that_another_logger_refused_leaves_no_folder(holds, tmp_path):
    """Such as one without a login, before anything was written here."""
    logger = RunLogger(str(tmp_path))
    logger.claim()
    if holds:
        (Path(logger.log_dir) / "notes.txt").write_text("of the user")
    logger.finalize("failed")
    assert Path(logger.log_dir).exists() == holds
