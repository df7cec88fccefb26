"""How a run ends, and that it ends once: whatever killed it, and however often it is resumed."""

import re
import shutil
from contextlib import nullcontext
from pathlib import Path

import lightning as L
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nclightning.cli import main
from nclightning.files import observers

RUNS = Path("lightning_logs")
WHOLE, OTHER = (RUNS / f"version_{i}" for i in range(2))
# Cadences that part the last row, and a stop off the multiples of anything.
STOP = ["--neural_collapse.every_n_iterations", "7", "--optimality.stop_distance", "5e-2"]


@pytest.fixture(autouse=True)
def _somewhere_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Runs to take copies of: one that stopped by itself, and 40 and 60 iterations of the same."""
    folder = tmp_path_factory.mktemp("recorded")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        fit(*STOP)
        fit(*STOP, steps=40)
        fit(*STOP, steps=60)
    names = ("stopped", "forty", "sixty")
    return {name: folder / "lightning_logs" / f"version_{i}" for i, name in enumerate(names)}


@pytest.fixture
def take(recorded):
    return lambda name, run: shutil.copytree(recorded[name], run)


def fit(*args, steps=300, config="ufm_mse"):
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.callbacks.every_n_iterations", "50"]
    callback = ["--trainer.callbacks", "nclightning.callbacks.LastCheckpoint"]
    main(["fit", "--config", config, "--trainer.max_steps", str(steps), *callback, *quiet, *args])


def last(run):
    return str(run / "checkpoints" / "last.ckpt")


def content(run):
    return {path.name: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def scalars(run):
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def assert_alike(one, other):
    """Two runs agree in rows, weights, and all that TensorBoard shows, to the last bit."""
    assert (one / "readings.csv").read_bytes() == (other / "readings.csv").read_bytes()
    first, second = (torch.load(last(run), weights_only=True) for run in (one, other))
    assert first["global_step"] == second["global_step"]
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name])
    assert first["readings"] == second["readings"]
    assert scalars(one) == scalars(other)
    assert (one / "convergence.png").read_bytes() == (other / "convergence.png").read_bytes()


ENDINGS = {
    "distance": (STOP, {}, "The run is finished. Distance "),
    "max_steps": (["--neural_collapse.every_n_iterations", "7"], {"steps": 33}, "all of its trainer.max_steps=33"),
    "search": (
        [
            *("--model.init_args.dtype", "float32", "--optimality.stop_distance", "null"),
            *("--optimality.stop_at_floor", "false", "--lambda", "5e-2", "--neural_collapse.every_n_iterations", "7"),
        ],
        {"steps": 5000, "config": "ufm_ce"},
        "The run is finished. Iteration ",
    ),
    "divergence": (
        [
            *("--model.init_args.optimizer", "torch.optim.SGD", "--model.init_args.optimizer.lr", "1e4"),
            *("--neural_collapse.every_n_iterations", "3"),
        ],
        {"steps": 500},
        "The objective is not finite any more",
    ),
}


def fails(ending):
    """What goes wrong has another status than success, so that a command after it is not run."""
    message = r"^error: training failed at iteration \d+: The objective is not finite any more"
    return pytest.raises(SystemExit, match=message) if ending == "divergence" else nullcontext()


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_finished_run_that_is_resumed_ends_again(ending, capsys):
    args, options, sentence = ENDINGS[ending]
    with fails(ending):
        fit(*args, **options)
    assert "share a RunLogger" not in "".join(capsys.readouterr())
    before = content(WHOLE)
    with fails(ending):
        fit(*args, "--ckpt_path", last(WHOLE), **options)
    output = capsys.readouterr().out
    assert sentence in output
    assert f"tensorboard --logdir {WHOLE}" in output
    assert content(WHOLE) == before
    assert not OTHER.exists()


@pytest.mark.parametrize("where", ["draw_convergence", "record_summary", "_print"])
def test_a_run_that_was_killed_in_its_report_makes_it_up_once(where, take, monkeypatch):
    def kill(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(f"nclightning.closing.{where}", kill)
        with pytest.raises(Killed):
            fit(*STOP)
    for _ in range(2):
        fit(*STOP, "--ckpt_path", last(WHOLE))
    take("stopped", OTHER)
    assert_alike(WHOLE, OTHER)
    assert len(list(OTHER.glob("events*"))) == len(list(WHOLE.glob("events*"))) == 2


class StopAfter(L.Callback):
    """Somebody's own callback."""

    def __init__(self, iterations: int) -> None:
        self.iterations = iterations

    def on_iteration_end(self, trainer, pl_module, batch, iteration):
        if iteration >= self.iterations:
            trainer.should_stop = True


def stop_after(iterations):
    return ["--trainer.callbacks+", f"{__name__}.StopAfter", "--trainer.callbacks.iterations", str(iterations)]


def early_stopping(patience):
    callback = ["--trainer.callbacks+", "EarlyStopping", "--trainer.callbacks.monitor", "loss"]
    options = ["--trainer.callbacks.patience", str(patience), "--trainer.callbacks.min_delta", "1000"]
    return [*callback, *options, "--data.steps_per_epoch", "1", "--model.iterations_per_step", "10"]


FOREIGN = {
    "callback": (stop_after(33), "set by StopAfter, ended it at iteration 33", stop_after(44)),
    "patience": (early_stopping(3), r"EarlyStopping\(monitor='loss'\) ended it at iteration 40", early_stopping(4)),
    "gone": (early_stopping(3), r"EarlyStopping\(monitor='loss'\) ended it at iteration 40", early_stopping(3)[8:]),
}


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.usefixtures("no_pictures")
def test_a_run_that_a_callback_stopped_ends_again_until_its_settings_change(name, capsys, monkeypatch):
    def kill(_):
        raise Killed

    args, sentence, changed = FOREIGN[name]
    with monkeypatch.context() as patch:
        patch.setattr("nclightning.closing.draw_convergence", kill)
        with pytest.raises(Killed):
            fit(*args, steps=70)
    before = content(WHOLE)
    capsys.readouterr()
    fit(*args, "--ckpt_path", last(WHOLE), steps=70)
    assert re.search(rf"The run is finished\. .*{sentence}", capsys.readouterr().out)
    completed = content(WHOLE)
    assert {name: data for name, data in completed.items() if name in before} == before
    assert (WHOLE / "convergence.png").is_file()
    fit(*args, "--ckpt_path", last(WHOLE), steps=70)
    assert content(WHOLE) == completed
    fit(*changed, "--ckpt_path", last(WHOLE), steps=70)
    assert "had been stopped at iteration" in capsys.readouterr().out
    fit(*changed, steps=70)
    assert_alike(WHOLE, OTHER)


def test_a_stale_checkpoint_replaces_rows_by_equal_ones(take):
    """As after a kill between the stop and the last checkpoint: the table is ahead of the checkpoint."""
    take("stopped", WHOLE)
    take("stopped", OTHER)
    take("forty", Path("forty"))
    shutil.copy(last(Path("forty")), last(OTHER))
    fit(*STOP, "--ckpt_path", last(OTHER))
    assert_alike(WHOLE, OTHER)


def test_a_changed_setting_lets_a_stopped_run_go_on_and_says_so(take, capsys):
    closer = [*STOP, "--optimality.stop_distance", "1e-2"]
    fit(*closer)
    take("stopped", OTHER)
    capsys.readouterr()
    fit(*closer, "--ckpt_path", last(OTHER))
    assert "had been stopped at iteration" in capsys.readouterr().out
    assert_alike(WHOLE, OTHER)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_run_stopped_by_the_theory_goes_on_without_it_and_says_so(take, capsys):
    take("stopped", WHOLE)
    stopped = torch.load(last(WHOLE), weights_only=True)["global_step"]
    without = ["--optimality.theory", "false", "--optimality.stop_distance", "null"]
    without += ["--optimality.stop_at_floor", "false", "--ckpt_path", last(WHOLE)]
    fit(*without, steps=stopped + 10)
    assert f"had been stopped at iteration {stopped}" in capsys.readouterr().out
    assert torch.load(last(WHOLE), weights_only=True)["global_step"] == stopped + 10


def test_more_iterations_do_not_move_a_run_that_stopped_by_itself(take, capsys):
    take("stopped", WHOLE)
    before = content(WHOLE)
    fit(*STOP, "--ckpt_path", last(WHOLE), steps=5000)
    assert "The run is finished. Distance" in capsys.readouterr().out
    assert content(WHOLE) == before


def cut(text):
    return "".join(text.splitlines(keepends=True)[:4])


def without_a_row(text):
    lines = text.splitlines(keepends=True)
    return "".join(lines[:4] + lines[5:])


DAMAGES = {
    "cut": (cut, r"ends at iteration 10, and rows up to the checkpoint at iteration 40 are missing"),
    "empty": (lambda text: "", r"ends at iteration -1|damaged in line 1"),
    "half a row": (
        lambda text: cut(text) + text.splitlines()[4][:20] + "\n",
        r"damaged in line 5: not all rows before the checkpoint",
    ),
    "a row less": (without_a_row, r"has other rows than when the checkpoint at iteration 40 was saved"),
    "a digit": (lambda text: re.sub(r"\n7,(.*)\d\n", r"\n7,\g<1>\n", text), r"has other rows than when"),
    "a header less": (lambda text: text.partition("\n")[2], r"damaged in line 1"),
    "shuffled": (lambda text: "\n".join(text.splitlines()[:1] + text.splitlines()[:0:-1]) + "\n", r"damaged in line 3"),
    "binary": (lambda text: "\x00\x01\x02" * 50 + "\n", r"damaged in line [12]"),  # NUL: line 1 before Python 3.11
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_table_without_the_rows_of_the_checkpoint_is_refused(damage, take):
    take("forty", WHOLE)
    change, message = DAMAGES[damage]
    table = WHOLE / "readings.csv"
    changed = change(table.read_text())
    assert changed != table.read_text()
    table.write_text(changed)
    before = content(WHOLE)
    with pytest.raises(SystemExit, match=message):
        fit(*STOP, "--ckpt_path", last(WHOLE), steps=60)
    assert content(WHOLE) == before
    assert not OTHER.exists()


@pytest.mark.parametrize("tail", ["50,0.1", "50,junk,,\n"])
def test_what_comes_after_the_checkpoint_may_be_damaged(tail, take):
    take("sixty", WHOLE)
    take("forty", OTHER)
    with (OTHER / "readings.csv").open("a") as file:
        file.write(tail)
    fit(*STOP, "--ckpt_path", last(OTHER), steps=60)
    assert_alike(WHOLE, OTHER)


def test_a_checkpoint_of_before_rows_were_counted_needs_its_rows_too(take):
    take("sixty", WHOLE)
    take("forty", OTHER)
    checkpoint = torch.load(last(OTHER), weights_only=True)
    del checkpoint["readings"]
    torch.save(checkpoint, last(OTHER))
    table = (OTHER / "readings.csv").read_text()
    (OTHER / "readings.csv").write_text(cut(table))
    with pytest.raises(SystemExit, match="ends at iteration 10"):
        fit(*STOP, "--ckpt_path", last(OTHER), steps=60)
    (OTHER / "readings.csv").write_text(table)
    fit(*STOP, "--ckpt_path", last(OTHER), steps=60)
    assert_alike(WHOLE, OTHER)


def test_a_table_that_is_gone_is_not_made_anew(take):
    take("forty", WHOLE)
    (WHOLE / "readings.csv").unlink()
    with pytest.raises(SystemExit, match=r"readings.csv is missing"):
        fit(*STOP, "--ckpt_path", last(WHOLE), steps=60)
    assert not OTHER.exists()


class Killed(BaseException):
    """Stands in for a kill."""


def go_on(run, *args, **options):
    """Resume a run as one would who found it, from its checkpoint or anew."""
    if Path(last(run)).is_file():
        fit(*args, "--ckpt_path", last(run), **options)
    else:
        shutil.rmtree(run, ignore_errors=True)
        fit(*args, **options)


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("part", range(2))
def test_a_run_killed_at_any_operation_on_files_comes_to_the_same_end(part):
    """What a kill leaves is what the disk holds at that moment, so that one run shows it for all operations.

    Moments at which it holds the same are one.
    """
    left, held = [], None

    def copy(operation):
        nonlocal held
        before, held = held, {path: path.read_bytes() if path.is_file() else None for path in RUNS.rglob("*")}
        if held == before:
            left.append(left[-1])
            return
        left.append(Path(f"at {len(left)}"))
        if RUNS.exists():
            shutil.copytree(RUNS, left[-1])

    observers.append(copy)
    try:
        fit(*STOP)
    finally:
        observers.remove(copy)
    RUNS.rename("whole")
    states = list(dict.fromkeys(left[len(left) // 2 :]))
    assert len(states) > 10
    for found in states[part::2]:
        found.rename(RUNS)
        go_on(WHOLE, *STOP)
        assert_alike(Path("whole") / WHOLE.name, WHOLE)
        shutil.rmtree(RUNS)
