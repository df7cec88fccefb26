"""Sweeps that fail, are killed or find the disk full lose no finished run."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import lightning as L
import pytest
import torch
from rich.console import Console

from nclightning.figures import read_readings
from nclightning.reproduction.experiments import Experiment
from nclightning.reproduction.runner import Failure, Store, run_all
from tests.forked import Forked

ROOT = Path(__file__).resolve().parents[2]
QUIET = ("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false")
SHORT = Experiment("short", (1,), ("--config", "ufm_ce", "--trainer.max_steps", "30", *QUIET))
BROKEN = Experiment("broken", (1,), ("--config", "ufm_ce", "--model.init_args.feature_dim", "-3", *QUIET))
# Ends at its number of steps only; with a checkpoint at each 500.
ENDLESS = ("--config", "ufm_mse", "--lambda", "5e-5", "--optimality.stop_distance", "null")


class Hold(L.Callback):
    """Where the environment names a file, writes its process there at iteration 700 and goes no further."""

    def on_iteration_end(self, trainer, pl_module, batch, iteration):
        path = os.environ.get("HOLD")
        if iteration == 700 and path:
            Path(path).with_suffix(".part").write_text(str(os.getpid()))
            Path(path).with_suffix(".part").rename(path)
            threading.Event().wait()


class Await(L.Callback):
    """Writes a file at iteration 300 and goes on once a signal has come."""

    def on_iteration_end(self, trainer, pl_module, batch, iteration):
        if iteration == 300:
            Path(os.environ["HOLD"]).touch()
            _wait_for(lambda: trainer.received_sigterm)


AWAITED = Experiment(
    "awaited", (1,), (*ENDLESS, "--trainer.max_steps", "4000", *QUIET, "--trainer.callbacks+", f"{__name__}.Await")
)
LONG = Experiment(
    "long", (1,), (*ENDLESS, "--trainer.max_steps", "1200", *QUIET, "--trainer.callbacks+", f"{__name__}.Hold")
)


@pytest.fixture
def console():
    with open(os.devnull, "w") as nowhere:
        yield Console(file=nowhere)


@pytest.fixture
def _forked(monkeypatch):
    """Runs of a sweep, and sweeps, find everything imported."""
    monkeypatch.setattr(subprocess, "Popen", Forked)


def finish(path):
    store = Store(path)
    store.begin(SHORT)
    store.run_folder(SHORT).mkdir(parents=True)
    store._write(SHORT, finished=True)
    return store


def iterations(folder):
    return read_readings(folder).iterations.astype(int).tolist()


@pytest.mark.usefixtures("_forked")
def test_a_failure_keeps_what_finished_and_the_next_call_does_the_rest(tmp_path, console):
    failures = run_all(tmp_path, [SHORT, BROKEN], 2, console)
    assert failures == [Failure("broken", "error: feature_dim must be at least 1, got -3.")]
    readings = tmp_path / "runs" / "short" / "readings.csv"
    assert iterations(readings)[-1] == 30
    before = readings.stat().st_mtime_ns
    repaired = Experiment("repaired", (1,), SHORT.words)
    assert run_all(tmp_path, [SHORT, repaired], 2, console) == []
    assert readings.stat().st_mtime_ns == before
    assert readings.read_bytes() == (tmp_path / "runs" / "repaired" / "readings.csv").read_bytes()


def test_finished_runs_are_not_run_again(tmp_path, console, monkeypatch):
    finish(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("something was run"))
    assert run_all(tmp_path, [SHORT], 1, console) == []


def test_a_folder_of_other_settings_is_refused(tmp_path, console):
    finish(tmp_path)
    other = Experiment(SHORT.name, (1,), (*SHORT.words, "--seed_everything", "1"))
    with pytest.raises(ValueError, match=r"was run with other settings .*--out"):
        run_all(tmp_path, [other], 1, console)
    (tmp_path / "runs" / "short").rmdir()  # As the message says.
    assert not Store(tmp_path).is_finished(other)


@pytest.mark.parametrize("text", ["", '{"words"', "[]", "{}"])
def test_a_damaged_state_is_named(tmp_path, text):
    store = finish(tmp_path)
    store.state_path(SHORT).write_text(text)
    with pytest.raises(ValueError, match=r"short\.json is damaged\. Delete .*short to run it anew"):
        store.is_finished(SHORT)
    store.run_folder(SHORT).rmdir()
    assert not store.is_finished(SHORT)


def test_a_deleted_run_is_run_again(tmp_path):
    store = finish(tmp_path)
    assert store.is_finished(SHORT)
    store.run_folder(SHORT).rmdir()
    assert not store.is_finished(SHORT)


def test_a_run_whose_files_are_gone_starts_anew(tmp_path):
    store = finish(tmp_path)
    (store.run_folder(SHORT) / "checkpoints").mkdir()
    (store.run_folder(SHORT) / "checkpoints" / "last.ckpt").touch()
    assert "--ckpt_path" not in store.begin(SHORT)
    assert not store.run_folder(SHORT).exists()


def test_a_folder_in_use_is_refused(tmp_path, console):
    code = (
        "import sys; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); "
        "print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="another process is writing"):
            run_all(tmp_path, [SHORT], 1, console)
        holder.stdin.close()


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_anew(tmp_path):
    store = Store(tmp_path)
    folder = store.run_folder(SHORT)
    folder.mkdir(parents=True)
    (folder / "readings.csv").write_text("iteration,loss\n0,1.0\n")
    words = store.begin(SHORT)
    assert not folder.exists()
    assert "--ckpt_path" not in words
    assert not store.is_finished(SHORT)


@pytest.mark.usefixtures("_forked")
def test_a_run_that_was_killed_at_its_end_makes_up_the_rest(tmp_path, console):
    """Killed between its last checkpoint and its report, it takes no further iteration."""
    assert run_all(tmp_path, [SHORT], 1, console) == []
    store = Store(tmp_path)
    folder = store.run_folder(SHORT)
    before = (folder / "readings.csv").read_bytes(), (folder / "checkpoints" / "last.ckpt").read_bytes()
    store._write(SHORT, finished=False)
    for path in (folder / "convergence.png", *folder.glob("*.finished_at_*")):
        path.unlink()
    assert run_all(tmp_path, [SHORT], 1, console) == []
    assert store.is_finished(SHORT)
    assert (folder / "convergence.png").is_file()
    assert len(list(folder.glob("*.finished_at_30"))) == 1
    assert ((folder / "readings.csv").read_bytes(), (folder / "checkpoints" / "last.ckpt").read_bytes()) == before


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path):
    store = finish(tmp_path)
    folder = store.run_folder(SHORT)
    (folder / "config.yaml").touch()
    (folder / "readings.csv").touch()
    checkpoints = [folder / "checkpoints" / name for name in ("last.ckpt", "previous.ckpt")]
    checkpoints[0].parent.mkdir()
    for path in checkpoints:
        torch.save({"a": torch.zeros(9)}, path)
    for path in checkpoints:
        words = store.begin(SHORT)
        assert words[words.index("--ckpt_path") + 1] == str(path)
        path.write_bytes(path.read_bytes().replace(bytes(36), bytes(35) + b"1"))
    assert "--ckpt_path" not in store.begin(SHORT)
    assert not folder.exists()


def test_a_full_disk_is_a_failure_with_its_reason(tmp_path, console, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("nclightning.reproduction.runner.os.fsync", full)
    assert run_all(tmp_path, [SHORT], 1, console) == [Failure("short", "No space left on device")]
    assert not list((tmp_path / "state").iterdir())


@pytest.mark.usefixtures("_forked")
def test_a_killed_sweep_goes_on_to_the_same_numbers(tmp_path, console):
    code = (
        "import sys; from pathlib import Path; from rich.console import Console; "
        "from tests.reproduction.test_runner import LONG; from nclightning.reproduction.runner import run_all; "
        "run_all(Path(sys.argv[1]), [LONG], 1, Console(quiet=True))"
    )
    held, folder = tmp_path / "held", tmp_path / "killed" / "runs" / "long"
    sweep = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "killed")], env=os.environ | {"HOLD": str(held)}
    )
    _wait_for(held.is_file)
    assert _lives(int(held.read_text()))
    sweep.send_signal(signal.SIGKILL)
    sweep.wait()
    _wait_for(lambda: not _lives(int(held.read_text())))  # The child notices that its parent is gone.
    assert 0 < iterations(folder)[-1] <= 700
    assert run_all(tmp_path / "killed", [LONG], 1, console) == []
    assert run_all(tmp_path / "whole", [LONG], 1, console) == []
    killed, whole = ((tmp_path / name / "runs" / "long" / "readings.csv").read_text() for name in ("killed", "whole"))
    assert iterations(folder)[-1] == 1200
    # A resumed run repeats one evaluation, which its count leaves out; all else is equal to the last bit.
    assert killed == whole


@pytest.mark.slow
def test_a_terminated_sweep_saves_its_runs_and_says_so(tmp_path):
    """Ended with its child at rest between two checkpoints, which then saves what it has reached.

    Both are started, not forked.
    """
    code = (
        "import sys; from unittest.mock import patch; from tests.reproduction.test_runner import AWAITED; "
        "from nclightning.cli import main; "
        "patch('nclightning.reproduction.reproduce.experiments', lambda *_: [AWAITED]).start(); "
        "main(['reproduce', '--figures', '1', '--jobs', '1', '--out', sys.argv[1]])"
    )
    held = tmp_path / "held"
    sweep = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        cwd=ROOT,
        env=os.environ | {"HOLD": str(held), "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    _wait_for(held.is_file)
    sweep.send_signal(signal.SIGTERM)
    said = sweep.communicate()[1]
    assert sweep.returncode == 143
    assert said == "Interrupted. What finished is kept; the same command goes on.\n"
    checkpoint = torch.load(tmp_path / "out" / "runs" / "awaited" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == iterations(tmp_path / "out" / "runs" / "awaited")[-1] == 300
    assert not Store(tmp_path / "out").is_finished(AWAITED)


def _lives(pid):
    """Whether a process runs; one that has ended may wait for a parent to take note."""
    listed = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], check=False, capture_output=True, text=True).stdout
    return bool(listed.strip()) and not listed.strip().startswith("Z")


def _wait_for(condition, seconds=600):
    """Wait for what comes on any machine; the bound is only for what never comes."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
