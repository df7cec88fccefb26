"""Where runs live: nothing is written over, nothing goes on elsewhere, and what is refused leaves nothing."""

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from zipfile import ZipFile

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from nclightning.callbacks import LastCheckpoint
from nclightning.cli import main
from nclightning.data import IndexDataModule
from nclightning.figures import draw_convergence
from nclightning.files import FolderLock, check_checkpoint
from nclightning.folders import run_folder
from nclightning.loggers import RunLogger
from nclightning.models import UFM
from tests import forked
from tests.trainers import quiet_trainer

pytestmark = pytest.mark.usefixtures("no_pictures")
RUN = Path("lightning_logs/version_0")
LAST = RUN / "checkpoints" / "last.ckpt"


@pytest.fixture(autouse=True)
def _somewhere_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def fit(*args, steps=20):
    words = ["fit", "--config", "ufm_mse", "--trainer.max_steps", str(steps), "--trainer.enable_progress_bar", "false"]
    main([*words, *map(str, args)])


def resume(path=LAST, *args, steps=40):
    fit("--ckpt_path", path, *args, steps=steps)


def tree(folder="."):
    """All files with their content; locks hold none."""
    return {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file() and p.name != ".lock"}


def step_of(path):
    return torch.load(path, weights_only=True)["global_step"]


class At(L.Callback):
    """Does something at an iteration."""

    def __init__(self, iteration: int, what: str) -> None:
        self.iteration, self.what = iteration, what

    def on_fit_start(self, trainer, pl_module):
        if self.what == "refuse":
            raise ValueError("not today")

    def on_iteration_end(self, trainer, pl_module, batch, iteration):
        if iteration == self.iteration:
            for name in self.what.split("+"):
                signal.raise_signal(getattr(signal, name))


def at(iteration, what):
    return [
        "--trainer.callbacks+", f"{__name__}.At", "--trainer.callbacks.iteration", str(iteration),
        "--trainer.callbacks.what", what,
    ]  # fmt: skip


NOWHERE = SimpleNamespace(save_dir=None, name=None, version=None)


@pytest.mark.parametrize(
    ("loggers", "folder"),
    [
        (lambda: [], "root"),
        (lambda: [NOWHERE], "root"),
        (lambda: [RunLogger()], "./lightning_logs/version_0"),
        (lambda: [RunLogger("a", version="b")], "a/lightning_logs/b"),
        (lambda: [CSVLogger("csv")], "csv/lightning_logs/version_0"),
        (lambda: [TensorBoardLogger("tb", name="a", version=3)], "tb/a/version_3"),
        (lambda: [CSVLogger("csv"), RunLogger("a")], "a/lightning_logs/version_0"),
        (lambda: [NOWHERE, CSVLogger("csv")], "csv/lightning_logs/version_0"),
        (lambda: [SimpleNamespace(save_dir="w", name="project", version="x1y2")], "w/project/x1y2"),
    ],
)
def test_one_answer_for_all_loggers(loggers, folder):
    trainer = SimpleNamespace(loggers=loggers(), default_root_dir="root", fast_dev_run=False)
    assert run_folder(trainer) == Path(folder)


def test_a_folder_that_is_a_url_is_refused():
    trainer = SimpleNamespace(loggers=[CSVLogger("memory://a/b")], default_root_dir="root", fast_dev_run=False)
    with pytest.raises(ValueError, match=r"memory://a/b/.* is a URL.*ModelCheckpoint"):
        run_folder(trainer)


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
@pytest.mark.parametrize("logger", ["false", "CSVLogger"])
def test_a_second_run_in_the_same_folder_is_refused(logger):
    options = ["--trainer.logger", logger]
    if logger == "CSVLogger":
        options += ["--trainer.logger.save_dir", ".", "--trainer.logger.version", "a"]
    fit(*options)
    (last,) = Path().rglob("last.ckpt")
    before = tree(last.parent)
    with pytest.raises(SystemExit, match=r"error: .*is the checkpoint of another run\. .* folder of its own"):
        fit(*options)
    assert tree(last.parent) == before
    if logger == "false":
        resume(last, *options)
        assert step_of(last) == 40
        assert step_of(last.with_name("previous.ckpt")) == 20


def test_a_trainer_goes_on_with_its_own_run(tmp_path):
    trainer = quiet_trainer(tmp_path, max_steps=20, callbacks=[LastCheckpoint(10)], enable_checkpointing=True)
    for steps in (20, 40):
        trainer.fit_loop.epoch_loop.max_steps = steps
        trainer.fit(UFM(3, 4, 6, "mse", lambda_=5e-3), datamodule=IndexDataModule())
    assert step_of(tmp_path / "checkpoints" / "last.ckpt") == 40


def test_a_trial_run_leaves_nothing():
    fit("--trainer.fast_dev_run", "true")
    assert not list(Path().iterdir())


def test_runs_go_to_the_root_that_was_given():
    fit("--trainer.default_root_dir", "here")
    assert [str(path) for path in Path().iterdir()] == ["here"]
    assert step_of(Path("here") / LAST) == 20


def test_a_run_of_several_loggers_goes_on_in_its_folder():
    Path("two.yaml").write_text(
        "trainer:\n  logger:\n    - {class_path: CSVLogger, init_args: {save_dir: csv}}\n"
        "    - {class_path: nclightning.loggers.RunLogger}\n"
    )
    fit("--config", "two.yaml")
    resume(LAST, "--config", "two.yaml")
    assert step_of(LAST) == 40
    assert {path.name for path in RUN.parent.iterdir()} == {"version_0"}
    assert {"config.yaml", "config_resumed_1.yaml"} <= {path.name for path in RUN.iterdir()}


@pytest.mark.usefixtures("finished")
def test_a_linked_checkpoint_goes_on_where_its_path_lies(caplog):
    fit(steps=30)
    other = Path("lightning_logs/version_1")
    LAST.unlink()
    LAST.symlink_to(Path("../../version_1/checkpoints/last.ckpt"))
    before = tree(other)
    resume()
    assert tree(other) == before
    assert not LAST.is_symlink()
    assert step_of(LAST) == 40
    Path("best.ckpt").symlink_to(LAST)
    before = tree(RUN)
    resume("best.ckpt", steps=50)
    assert tree(RUN) == before
    assert step_of("lightning_logs/version_2/checkpoints/last.ckpt") == 50
    assert "is no run folder, as it has no readings.csv: the run goes on in" in caplog.text


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
@pytest.mark.usefixtures("finished")
def test_a_flipped_bit_stops_all_that_read_it(stage):
    resume()
    content = bytearray(LAST.read_bytes())
    content[len(content) // 2] ^= 1
    LAST.write_bytes(content)
    before = tree()
    with pytest.raises(SystemExit, match=r"^error: --ckpt_path .*damaged.*previous\.ckpt, is good\.$"):
        main([stage, "--config", "ufm_mse", "--ckpt_path", str(LAST)])
    assert tree() == before
    if stage == "fit":
        previous = LAST.with_name("previous.ckpt")
        resume(previous)
        assert step_of(LAST) == 40
        check_checkpoint(previous)  # The damaged one did not take its place.


def test_a_flipped_bit_stops_a_trainer_too(tmp_path):
    def run(**options):
        trainer = quiet_trainer(tmp_path, max_steps=20, callbacks=[LastCheckpoint(10)], enable_checkpointing=True)
        trainer.fit(UFM(3, 4, 6, "mse", lambda_=5e-3), datamodule=IndexDataModule(), **options)

    run()
    path = tmp_path / "checkpoints" / "last.ckpt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^ckpt_path=.*last\.ckpt: not a readable checkpoint"):
        run(ckpt_path=path)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_refused_run_leaves_nothing(resumed, request):
    if resumed:
        request.getfixturevalue("finished")
    before = tree()
    with pytest.raises(ValueError, match="not today"):
        (resume if resumed else fit)(*([LAST] if resumed else []), *at(0, "refuse"))
    assert tree() == before
    assert resumed or not list(RUN.parent.iterdir())


@pytest.mark.usefixtures("finished")
def test_a_run_that_another_process_writes_is_not_resumed():
    before, lock = tree(), FolderLock(RUN)
    lock.acquire()
    with pytest.raises(SystemExit, match=r"^error: another process is writing .*version_0\. Wait until it ends"):
        resume()
    assert tree() == before
    lock.release()
    resume()


@pytest.mark.parametrize(
    ("signals", "status", "reached"),
    [("SIGTERM", 143, 200), ("SIGTERM+SIGTERM", 143, 200), ("SIGINT", 130, 117)],
)
def test_a_signal_ends_a_run_that_is_saved(signals, status, reached, caplog):
    with pytest.raises(SystemExit) as stop:
        fit(*at(117, signals), steps=400)
    assert stop.value.code == status
    assert step_of(LAST) == reached
    last_row = (RUN / "readings.csv").read_text().splitlines()[-1]
    assert int(last_row.partition(",")[0]) == reached // 10 * 10
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("SIG")]
    assert len(said) == 1
    assert f"the run is saved at iteration {reached}. It goes on from" in said[0]


def test_a_signal_ends_a_trainer_with_its_status(tmp_path):
    callbacks = [At(5, "SIGTERM"), LastCheckpoint(100)]
    trainer = quiet_trainer(tmp_path, max_steps=20, callbacks=callbacks, enable_checkpointing=True)
    with pytest.raises(SystemExit) as stop:
        trainer.fit(UFM(3, 4, 6, "mse", lambda_=5e-3, iterations_per_step=10), datamodule=IndexDataModule())
    assert stop.value.code == 143
    assert step_of(tmp_path / "checkpoints" / "last.ckpt") == 10


class AtFirst(At):
    """Does it on the first of several processes only."""

    def on_iteration_end(self, trainer, pl_module, batch, iteration):
        if trainer.is_global_zero:
            super().on_iteration_end(trainer, pl_module, batch, iteration)


@pytest.mark.slow
def test_a_signal_to_the_first_process_ends_all(tmp_path):
    """In the middle of a step, when the others are about to talk to it."""
    words = ["fit", "--config", "ufm_mse", "--trainer.max_steps", "400", "--trainer.enable_progress_bar", "false"]
    options = ["--trainer.devices", "2", "--trainer.strategy", "ddp", *at(117, "SIGTERM")]
    options[options.index(f"{__name__}.At")] = f"{__name__}.AtFirst"
    done = forked.run(
        [sys.executable, "-m", "nclightning", *words, *options],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.returncode == 143, done.stderr
    assert done.stderr.count("SIGTERM: the run is saved at iteration 200.") == 1
    assert step_of(LAST) == 200


class Unnamed(Logger):
    """Keeps nothing, and has no folder."""

    name = version = None

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params, *_):
        pass


def test_a_logger_without_folder(tmp_path):
    def run():
        trainer = quiet_trainer(
            tmp_path, max_steps=5, logger=Unnamed(), callbacks=[LastCheckpoint()], enable_checkpointing=True
        )
        trainer.fit(UFM(3, 4, 6, "mse", lambda_=5e-3), datamodule=IndexDataModule())

    run()
    assert step_of(tmp_path / "checkpoints" / "last.ckpt") == 5
    with pytest.raises(ValueError, match="is the checkpoint of another run"):
        run()


@pytest.mark.parametrize("stage", ["fit", "validate"])
@pytest.mark.usefixtures("finished")
def test_a_checkpoint_is_checked_once(stage, monkeypatch):
    monkeypatch.setattr(LastCheckpoint, "_keep", lambda *_: None)  # Which looks at what it keeps, much later.
    checked, check = [], ZipFile.testzip
    monkeypatch.setattr(ZipFile, "testzip", lambda archive: checked.append(archive.filename) or check(archive))
    steps = ["--trainer.max_steps", "40"] if stage == "fit" else []
    main([stage, "--config", "ufm_mse", *steps, "--trainer.enable_progress_bar", "false", "--ckpt_path", str(LAST)])
    assert checked == [str(LAST)]


def test_a_checkpoint_that_changes_after_its_check_is_checked_again(tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save({"a": torch.ones(100)}, path)
    check_checkpoint(path, hand_over=True)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    other = tmp_path / "b.ckpt"
    other.write_bytes(content)
    other.replace(path)
    with pytest.raises(ValueError, match="damaged"):
        check_checkpoint(path)


@pytest.mark.parametrize("argument", ["name", "version"])
@pytest.mark.parametrize("value", ["1/2/../..", "..", "/abs"])
def test_a_run_that_leads_out_of_its_folder_is_refused(argument, value):
    with pytest.raises(SystemExit, match=rf"^error: .*{argument}='{value}' leads out of save_dir"):
        fit(f"--trainer.logger.init_args.{argument}", value)
    assert not list(Path().iterdir())


def test_nobody_else_writes_until_the_report_is_written(monkeypatch):
    seen = []

    def draw(folder):
        with pytest.raises(ValueError, match="another process is writing"):
            FolderLock(folder).acquire()
        seen.append(folder)
        return draw_convergence(folder)

    monkeypatch.setattr("nclightning.closing.draw_convergence", draw)
    fit()
    with pytest.raises(SystemExit):
        fit("--ckpt_path", LAST, *at(25, "SIGTERM"), steps=100)
    (RUN / "convergence.png").unlink()
    resume(steps=100)  # Which has nothing else to do.
    assert len(seen) == 3
    lock = FolderLock(RUN)
    lock.acquire()
    lock.release()


CSV = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "csv", "--trainer.logger.prefix", "a"]
CSV_RUN = Path("csv/lightning_logs/version_0")


@pytest.mark.parametrize("stale", [False, True])
def test_a_run_with_a_csv_logger_alone_goes_on_in_its_table(stale, tmp_path, monkeypatch):
    last = CSV_RUN / "checkpoints" / "last.ckpt"
    fit(*CSV, steps=40)
    whole = (CSV_RUN / "metrics.csv").read_text()
    other = tmp_path.parent / f"{tmp_path.name}_resumed"
    other.mkdir()
    monkeypatch.chdir(other)
    fit(*CSV, steps=20)
    first = last.read_bytes()
    if stale:  # As after a kill: the table is ahead of the checkpoint.
        resume(last, *CSV, steps=30)
        last.write_bytes(first)
    before = (CSV_RUN / "metrics.csv").read_text()
    resume(last, *CSV)
    assert (CSV_RUN / "metrics.csv").read_text() == whole
    assert step_of(last) == 40
    assert [path.name for path in CSV_RUN.parent.iterdir()] == ["version_0"]
    assert (CSV_RUN / "metrics_before_resume.csv").read_text() == before


def test_a_run_with_another_logger_does_not_go_on_elsewhere():
    options = ["--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", "."]
    fit(*options)
    before = tree()
    with pytest.raises(SystemExit, match=r"^error: the checkpoint is in the run folder .*version_0, but with Tensor"):
        resume(LAST, *options)
    assert tree() == before
    resume(LAST, *options, "--trainer.logger.version", "0")
    assert step_of(LAST) == 40
