"""The command line, from any directory, with the mistakes that people make."""

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nclightning.cli import main
from nclightning.configurations import shipped_configs
from tests.faults import runs

pytestmark = pytest.mark.usefixtures("no_pictures")
DRAW = Figure.draw
QUIET = ["--trainer.enable_progress_bar", "false"]
RUN = Path("lightning_logs/version_0")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _somewhere_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def fit(*args, config="ufm_mse", steps=20):
    main(["fit", "--config", config, "--trainer.max_steps", str(steps), *QUIET, *args])


def rows(run=RUN):
    with (run / "readings.csv").open() as file:
        return list(csv.DictReader(file))


def saved_config(run=RUN):
    return yaml.safe_load((run / "config.yaml").read_text())


def checkpoint(run=RUN):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


# Those of other problems run to their end in tests/problems/test_members.py.
OF_THE_PAPER = sorted(name for name, path in shipped_configs().items() if "problem:" not in path.read_text())


@pytest.mark.parametrize("config", [*OF_THE_PAPER, "ufm_mixup"])
def test_shipped_configs_fit_and_leaves_a_run_folder(config, capsys, monkeypatch):
    monkeypatch.setattr(Figure, "draw", DRAW)
    fit(config=config)
    assert {p.name for p in RUN.iterdir()} >= {"config.yaml", "readings.csv", "checkpoints", "convergence.png"}
    assert int(rows()[-1]["iteration"]) == 20
    output = capsys.readouterr()
    assert f"Using the shipped configuration {shipped_configs()[config]}" in output.err
    assert re.search(r"Iteration 20.*gap F - F\*", output.out, re.DOTALL)
    assert f"tensorboard --logdir {RUN}" in output.out


def test_a_further_monitor_beside_those_of_the_command_line():
    more = ["--trainer.callbacks+=nclightning.callbacks.NeuralCollapseMonitor"]
    fit(*more, "--trainer.callbacks.measures=[nc1_cdnv]", "--trainer.callbacks.every_n_iterations=10")
    assert {tag for tag in rows()[-1] if tag.startswith("nc/")} == {
        f"nc/train/{m}" for m in ("nc1", "nc2", "nc3", "nc1_cdnv")
    }
    with pytest.raises(SystemExit):
        fit(*more)


INIT = "--model.init_args"
SMALL = [f"{INIT}.samples_per_class", "6", f"{INIT}.input_dim", "80", f"{INIT}.hidden_dim", "40"]


@pytest.mark.parametrize("optimizer", ["ArmijoGD", "ArmijoLBFGS", "ArmijoCG", "ArmijoNewtonCG"])
@pytest.mark.parametrize("config", ["mlp_mse", "mlp_ce"])
def test_the_network_takes_a_line_search(config, optimizer):
    fit(*SMALL, f"{INIT}.optimizer", f"nclightning.optim.{optimizer}", config=config)
    recorded = rows()
    assert float(recorded[-1]["optimality/gap"]) < float(recorded[0]["optimality/gap"])
    assert int(float(recorded[-1]["line_search/evaluations"])) >= 21


def test_a_penalty_on_weights_is_read_without_the_theory():
    without = ["--optimality.theory", "false", "--optimality.stop_distance", "null"]
    without += ["--optimality.stop_at_floor", "false"]
    with pytest.raises(SystemExit, match=r"penalty='weights' has no closed form.*--optimality.theory false"):
        fit(*SMALL, f"{INIT}.penalty", "weights", config="mlp_ce")
    assert not RUN.exists()
    fit(*SMALL, f"{INIT}.penalty", "weights", *without, config="mlp_ce")
    assert float(rows()[-1]["loss"]) < float(rows()[0]["loss"])
    assert "optimality/gap" not in rows()[0]


@pytest.mark.usefixtures("finished")
def test_events_agree_with_the_table():
    events = EventAccumulator(str(RUN), size_guidance={"scalars": 0})
    events.Reload()
    table = rows()
    tags = {tag for tag in events.Tags()["scalars"] if not tag.startswith("summary/")}
    assert tags == set(table[0]) - {"iteration"}
    for tag in tags:
        written = [(int(r["iteration"]), float(r[tag])) for r in table if r[tag] not in ("nan", "-inf")]
        assert [e.step for e in events.Scalars(tag)] == [it for it, _ in written]
        # TensorBoard keeps float32: half a unit in its last place.
        assert [e.value for e in events.Scalars(tag)] == pytest.approx([v for _, v in written], rel=6e-8, abs=1e-45)
        assert events.Scalars(tag)[-1].step == 20


def test_a_file_here_wins_over_a_shipped_name():
    text = shipped_configs()["ufm_ce"].read_text().replace("feature_dim: 20", "feature_dim: 11")
    Path("ufm_ce.yaml").write_text(text)
    fit(config="ufm_ce.yaml")
    assert saved_config()["model"]["init_args"]["feature_dim"] == 11


@pytest.mark.parametrize(
    ("args", "lambda_w", "lambda_h"),
    [
        ([], 0.05, 0.005),
        (["--lambda", "1e-3"], 0.01, 0.001),
        (["--lambda=1e-3"], 0.01, 0.001),
        (["--model.init_args.lambda_h", "1e-4"], 0.05, 1e-4),
        (["--model.init_args.lambda_w", "5e-4", "--model.init_args.lambda_h", "5e-5"], 5e-4, 5e-5),
        (["--model.init_args.lambda_h", "1e-4", "--lambda", "1e-3"], 0.01, 0.001),
        (["--model.init_args.samples_per_class", "3"], 0.015, 0.005),
    ],
)
def test_lambdas_are_resolved_and_saved(args, lambda_w, lambda_h):
    fit(*args, steps=1)
    saved = saved_config()["model"]["init_args"]
    assert saved["lambda_w"] == pytest.approx(lambda_w, rel=1e-15)
    assert saved["lambda_h"] == lambda_h
    assert saved["lambda_"] is None


def test_a_saved_config_repeats_the_run():
    fit("--lambda", "1e-3", "--seed_everything", "7")
    fit(config=str(RUN / "config.yaml"))
    again = Path("lightning_logs/version_1")
    assert (again / "readings.csv").read_bytes() == (RUN / "readings.csv").read_bytes()


def test_seeds_differ():
    fit(steps=1)
    fit("--seed_everything", "1", steps=1)
    assert rows()[0]["loss"] != rows(Path("lightning_logs/version_1"))[0]["loss"]


def test_optimizer_options_reach_the_optimizer():
    fit("--model.init_args.optimizer.init_args.initial_step", "0.25", steps=1)
    assert checkpoint()["optimizer_states"][0]["param_groups"][0]["initial_step"] == 0.25


@pytest.mark.usefixtures("finished")
@pytest.mark.parametrize("stage", ["validate", "test"])
def test_looking_at_a_checkpoint_makes_no_run_folder(stage, capsys):
    main([stage, "--config", "ufm_mse", *QUIET, "--ckpt_path", str(RUN / "checkpoints" / "last.ckpt")])
    assert [p.name for p in Path("lightning_logs").iterdir()] == ["version_0"]
    assert "nc/val/nc1" if stage == "validate" else "nc/test/nc1" in capsys.readouterr().out


def test_resume_goes_on_in_the_same_folder_bit_for_bit():
    fit(steps=40)
    fit(steps=25)
    stopped = Path("lightning_logs/version_1")
    fit("--ckpt_path", str(stopped / "checkpoints" / "last.ckpt"), steps=40)
    assert sorted(p.name for p in Path("lightning_logs").iterdir()) == ["version_0", "version_1"]
    assert (stopped / "readings.csv").read_bytes() == (RUN / "readings.csv").read_bytes()
    one, other = checkpoint(), checkpoint(stopped)
    assert all(torch.equal(one["state_dict"][k], other["state_dict"][k]) for k in one["state_dict"])
    assert (stopped / "config_resumed_1.yaml").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.init_args.num_classes", "1"], "num_classes must be at least 2, got 1"),
        (["--model.init_args.samples_per_class", "0"], "samples_per_class must be at least 1, got 0"),
        (["--model.init_args.feature_dim", "0"], "feature_dim must be at least 1, got 0"),
        (["--model.init_args.lambda_w", "-1"], "lambda_w must be finite and non-negative, got -1.0"),
        (["--lambda", "0"], "lambda_w must be positive .* --optimality.theory false"),
        (["--model.init_args.loss", "hinge"], "loss.*hinge"),
        (["--model.init_args.loss", "ce", "--model.init_args.feature_dim", "8"], "feature_dim=8 is below the rank 9"),
        (["--model.init_args.init_scale", ".nan"], "init_scale must be finite"),
        (["--trainer.logger.init_args.version", "7"], "the run folder .*version_7 exists"),
        (["--trainer.logger.init_args.save_dir", "/proc/nowhere"], "cannot write the run folder /proc/nowhere"),
        (["--model.init_args.lambda_x", "1"], "lambda_x"),
        (["--optimality.every_n_iterations", "0"], "every_n_iterations must be at least 1"),
        (["--model.init_args.optimizer.init_args.c1", "0.7"], r"ArmijoGD\(c1=...\) must be between 0 and 1/2"),
        (["--ckpt_path", "nowhere.ckpt"], "nowhere.ckpt: no such file"),
        (["--data.init_args.num_classes", "5"], r"IndexDataModule\(num_classes=5\) differs from the model's 10"),
    ],
)
def test_mistakes_end_in_words_and_write_nothing(args, message, capsys):
    precious = Path("lightning_logs/version_7")
    precious.mkdir(parents=True)
    (precious / "readings.csv").write_text("precious")
    with pytest.raises(SystemExit) as stop:
        fit(*args)
    said = str(stop.value.code) + capsys.readouterr().err
    assert re.search(message, said, re.DOTALL)
    assert "Traceback" not in said
    assert [str(p) for p in Path("lightning_logs").rglob("*") if p.is_file()] == [str(precious / "readings.csv")]
    assert (precious / "readings.csv").read_text() == "precious"


@pytest.mark.parametrize(
    ("args", "content", "message"),
    [
        (["--model.init_args.loss", "ce"], None, "another problem .loss: 'mse' there, 'ce' here"),
        ([], b"junk", "last.ckpt: not a readable checkpoint"),
        ([], b"", "last.ckpt: not a readable checkpoint"),
    ],
)
@pytest.mark.parametrize("stage", ["fit", "validate"])
@pytest.mark.usefixtures("finished")
def test_checkpoints_that_do_not_fit_leave_the_run_alone(stage, args, content, message):
    path = RUN / "checkpoints" / "last.ckpt"
    if content is not None:
        path.write_bytes(content)
    before = {p: p.read_bytes() for p in RUN.rglob("*") if p.is_file()}
    with pytest.raises(SystemExit, match=message):
        main([stage, "--config", "ufm_mse", *QUIET, *args, "--ckpt_path", str(path)])
    assert {p: p.read_bytes() for p in RUN.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("callback", "off"),
    [("RichProgressBar", "progress_bar"), ("TQDMProgressBar", "progress_bar"), ("ModelCheckpoint", "checkpointing")],
)
def test_what_is_switched_off_may_be_among_the_callbacks(callback, off):
    """Also somebody's own callbacks alone, without those of the shipped configurations."""
    fit(f"--trainer.callbacks=lightning.pytorch.callbacks.{callback}", f"--trainer.enable_{off}", "false", steps=3)
    assert int(rows()[-1]["iteration"]) == 3


def test_a_run_folder_that_is_removed_ends_the_run_in_a_sentence():
    class Removes(L.Callback):
        def on_iteration_end(self, trainer, pl_module, batch, iteration):
            if iteration == 120:
                shutil.rmtree(trainer.log_dir)

    sys.modules[__name__].Removes = Removes
    Removes.__qualname__ = "Removes"
    with pytest.raises(SystemExit, match=r"error: .*(gone|cannot be written)") as stop:
        fit("--trainer.callbacks+", f"{__name__}.Removes", steps=300)
    assert "\n" not in stop.value.code


def test_a_missing_config_is_asked_for():
    with pytest.raises(SystemExit, match="--config NAME, where shipped are mlp_ce, mlp_mse, ufm_ce, ufm_label"):
        main(["fit"])


def test_a_lambda_without_value_is_named():
    with pytest.raises(SystemExit, match="--lambda needs a value"):
        fit("--lambda")


def test_a_zero_penalty_trains_without_the_theory():
    without = [
        "--optimality.theory",
        "false",
        "--optimality.stop_distance",
        "null",
        "--optimality.stop_at_floor",
        "false",
    ]
    fit("--model.init_args.lambda_h", "0", *without)
    assert "optimality/gap" not in rows()[0]
    assert float(rows()[-1]["loss"]) < float(rows()[0]["loss"])


@pytest.mark.parametrize(
    ("name", "content"),
    [("nothing", None), ("ufm_mes.yaml", None), ("list.yaml", "- 1"), ("torn.yaml", "a: [1"), ("key.yaml", "modle: 3")],
)
def test_wrong_configs_are_named(name, content):
    if content is not None:
        Path(name).write_text(content)
    with pytest.raises(SystemExit) as stop:
        fit(config=name)
    error = str(stop.value)
    assert name.removesuffix(".yaml") in error or "modle" in error
    if content is None:
        assert "Shipped configurations: mlp_ce, mlp_mse, ufm_ce, ufm_label" in error


@pytest.mark.usefixtures("finished")
def test_a_run_that_is_past_max_steps_is_refused():
    with pytest.raises(SystemExit, match=r"at iteration 20 and trainer.max_steps is 10: there is nothing to do"):
        fit("--ckpt_path", str(RUN / "checkpoints" / "last.ckpt"), steps=10)
    assert len(rows()) == 3


@pytest.mark.parametrize("args", [["--help"], ["fit", "--help"]])
def test_help_shows_examples(args, capsys):
    with pytest.raises(SystemExit):
        main(args)
    shown = capsys.readouterr().out
    assert "python -m nclightning fit --config ufm_mse.yaml" in shown
    shipped = re.search(r"shipped configurations:\n((?:  .+\n)+)", shown)[1]
    assert sorted(re.findall(r"\w+", shipped)) == sorted(shipped_configs())
    assert max(map(len, shipped.splitlines())) <= 80


def run_in_background(*args):
    command = [sys.executable, "-m", "nclightning", "fit", "--config", "ufm_mse", *QUIET, *args]
    return subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def wait_for(path, process, seconds=600):
    for _ in range(seconds * 50):
        if path.exists():
            return
        assert process.poll() is None, process.stdout.read().decode()
        time.sleep(0.02)
    raise AssertionError(f"{path} did not appear")


class KillAt(L.Callback):
    """Ends its own process as a kill from outside would, at a stated point of the run."""

    def __init__(self, iteration: int, saving: bool = False) -> None:
        self.iteration, self.saving = iteration, saving

    def on_iteration_end(self, trainer, pl_module, batch, iteration):
        if iteration == self.iteration and not self.saving:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        if trainer.global_step == self.iteration and self.saving:
            os.kill(os.getpid(), signal.SIGKILL)


def curves(run):
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


LONG = ["--lambda", "5e-4", "--optimality.stop_distance", "1e-9", "--trainer.max_steps", "1500"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        fit(*LONG)
    return folder / RUN


@pytest.mark.parametrize(("iteration", "saving"), [(501, False), (1237, False), (1000, True)], ids=str)
def test_a_killed_run_resumes_bit_for_bit(iteration, saving, whole, tmp_path):
    """SIGKILL among the iterations after a checkpoint, and while a later one is being made."""
    kill = ["--trainer.callbacks+", f"{__name__}.KillAt", "--trainer.callbacks.iteration", str(iteration)]
    words = ["fit", "--config", "ufm_mse", *QUIET, *LONG, *kill, "--trainer.callbacks.saving", str(saving).lower()]
    ending = runs.run(words, tmp_path)
    assert ending.status == -signal.SIGKILL, ending.errors
    assert 0 < checkpoint()["global_step"] <= iteration
    fit(*LONG, "--ckpt_path", str(RUN / "checkpoints" / "last.ckpt"))
    assert (RUN / "readings.csv").read_bytes() == (whole / "readings.csv").read_bytes()
    one, other = checkpoint(whole), checkpoint()
    assert one["global_step"] == other["global_step"] == 1500
    assert all(torch.equal(one["state_dict"][k], other["state_dict"][k]) for k in one["state_dict"])
    assert curves(whole) == curves(RUN)


@pytest.mark.slow
def test_ctrl_c_keeps_everything():
    with run_in_background("--lambda", "5e-5", "--optimality.stop_distance", "null") as process:
        wait_for(RUN / "checkpoints" / "last.ckpt", process)
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=600)[0].decode()
    assert "Traceback" not in output
    assert f"tensorboard --logdir {RUN}" in output
    reached = checkpoint()["global_step"]
    assert reached >= 500
    assert reached - 10 < int(rows()[-1]["iteration"]) <= reached
    assert (RUN / "convergence.png").exists()
