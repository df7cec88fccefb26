"""What people get wrong on the command line: one sentence, exit code 1, nothing written, no traceback."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nclightning.cli import main
from nclightning.wording import message_for_user

ROOT = Path(__file__).resolve().parents[1]
INIT, OPT = "--model.init_args", "--model.init_args.optimizer"
TAIL = "--problem unbalanced_ce --feature_dim 3 --lambda_w 1e-2 --lambda_h 1e-2"
TABLE = "iteration,optimality/gap\n"
GOOD = TABLE + "".join(f"{10 * i},{10.0**-i!r}\n" for i in range(12))
SIZES = "samples_per_class: 2, feature_dim: 3"
BOMB = "a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9]\n" + "".join(
    f"{x}: &{x} [{', '.join(['*' + y] * 9)}]\n" for y, x in zip("abcdefgh", "bcdefghi", strict=True)
)

# Words after fit --config ufm_mse.
FIT = [
    ("--trainer.max_step 5", "--trainer.max_step: no such option. Did you mean --trainer.max_steps?"),
    ("--modle.init_args.loss mse", "--modle.init_args.loss: no such option. Did you mean --model.init_args.loss?"),
    ("--lamda 1", "--lamda: no such option. Did you mean --lambda?"),
    ("--foo.bar 1", "--foo.bar: no such option."),
    ("extra", "'extra' does not belong to an option"),
    ("--trainer.max_steps five", "--trainer.max_steps: expected an integer, got 'five'"),
    ("--trainer.max_steps 1.5", "--trainer.max_steps: expected an integer, got '1.5'"),
    ("--trainer.max_steps", "--trainer.max_steps needs a value"),
    ("--trainer.max_steps -5", "--trainer.max_steps -5: "),
    ("--trainer.max_steps -1", "trainer.max_steps must be set"),
    ("--trainer.devices 0", "--trainer.devices 0: "),
    ("--trainer.devices x", "--trainer.devices x: "),
    ("--trainer.accelerator gpuu", "--trainer.accelerator gpuu: .*Available names are"),
    ("--trainer.accelerator tpu", "torch_xla|tpu"),
    ("--trainer.strategy ddpp", "--trainer.strategy ddpp: .*invalid strategy name"),
    ("--trainer.precision 12", "--trainer.precision: expected .*'64-true'.*, got '12'"),
    ("--trainer.precision 16-true", "trainer.precision='16-true' does not fit parameters"),
    ("--trainer.gradient_clip_val 1", "trainer.gradient_clip_val=1.* does not fit the full-batch loop"),
    ("--trainer.accumulate_grad_batches 2", "trainer.accumulate_grad_batches=2 does not fit"),
    ("--trainer.limit_train_batches 0", "trainer.limit_train_batches=0.* leaves nothing to train on"),
    ("--trainer.num_nodes 0", "--trainer.num_nodes 0: "),
    ("--trainer 3", "--trainer: expected a mapping of options, or a YAML file with one, got '3'"),
    (
        "--trainer.logger Tensorboard",
        "--trainer.logger: there is no class 'Tensorboard'. Did you mean TensorBoard",
    ),
    ("--trainer.logger+=RunLogger --trainer.logger.save_dir s3://x", "RunLogger: save_dir=s3://x is a URL"),
    ("--trainer.logger.init_args.foo 3", "--trainer.logger.init_args.foo: .*RunLogger has no argument 'foo'"),
    ("--trainer.callbacks 3", "--trainer.callbacks: there is no class '3'"),
    ("--trainer.callbacks+=EarlyStoping", "there is no class 'EarlyStoping'. Did you mean EarlyStopping?"),
    ("--trainer.callbacks+=EarlyStopping", "monitor must be given for lightning.pytorch.callbacks.EarlyStopping"),
    ("--trainer.callbacks+=ModelCheckpoint --trainer.callbacks.save_top_k -7", "--trainer.callbacks.save_top_k -7: "),
    ("--neural_collapse.head foo", "--neural_collapse.head does nothing in a fit of UFM, .* got 'foo'"),
    ("--neural_collapse.layers [a]", "--neural_collapse.layers does nothing in a fit of UFM"),
    ("--neural_collapse.source online", "--neural_collapse.source does nothing"),
    ("--neural_collapse.every_n_epochs 2", "--neural_collapse.every_n_epochs does nothing"),
    ("--neural_collapse.on_error warn", "--neural_collapse.on_error does nothing"),
    ("--neural_collapse.stages [val]", "--neural_collapse.stages=.'val'. leaves out 'train'"),
    ("--optimality.loss ce", "--optimality.loss does nothing in a fit of UFM"),
    ("--optimality.head foo", "--optimality.head does nothing in a fit of UFM"),
    (
        "--trainer.callbacks+=nclightning.callbacks.NeuralCollapseMonitor --trainer.callbacks.layers [a]",
        "NeuralCollapseMonitor: layers does nothing in a fit of UFM",
    ),
    ("--seed_everything x", "--seed_everything: expected true or false or an integer, got 'x'"),
    ("--seed_everything -1", "--seed_everything must be between 0 and 2..32 - 1, got -1"),
    ("--seed_everything 5000000000", "--seed_everything must be between"),
    (f"{INIT}.los mse", f"{INIT}.los: nclightning.models.UFM has no argument 'los'. Did you mean loss?"),
    ("--model.los mse", "--model.los: nclightning.models.UFM has no argument 'los'. Did you mean loss?"),
    (f"{INIT}.loss hinge", f"{INIT}.loss: expected 'mse' or 'ce', got 'hinge'"),
    (f"{INIT}.dtype float16", f"{INIT}.dtype: expected 'float64' or 'float32', got 'float16'"),
    (f"{INIT}.num_classes ten", f"{INIT}.num_classes: expected an integer, got 'ten'"),
    (f"{INIT}.num_classes 1", "num_classes must be at least 2, got 1"),
    (f"{INIT}.num_classes 1{'0' * 23}", "this UFM needs at least .* GiB of memory, but this machine has"),
    (f"{INIT}.num_classes 100000 {INIT}.feature_dim 100000000", "this UFM needs at least .* GiB"),
    (f"{INIT}.num_classes 100000", "training on this many samples and classes needs at least .* GiB"),
    (f"{INIT}.init_scale -1", "init_scale must be finite and non-negative, got -1.0"),
    (f"{INIT}.iterations_per_step 0", "iterations_per_step must be at least 1, got 0"),
    ("--model UFN", "--model: there is no class 'UFN'. Did you mean UFM?"),
    ("--model nclightning.models.UFN", "--model: there is no 'UFN' in nclightning.models. Did you mean UFM?"),
    ("--model nclightnin.models.UFM", "there is no Python module 'nclightnin'. Did you mean nclightning?"),
    ("--model torch.nn.Linear", "--model: 'torch.nn.Linear' is not a LightningModule"),
    ("--model nowhere.yaml", "--model: nowhere.yaml: no such file"),
    ("--data nclightning.models.UFM", "--data: 'nclightning.models.UFM' is not a LightningDataModule"),
    ("--data.init_args.num_classes 5", "differs from the model's 10"),
    (f"{OPT} Adamm", f"{OPT}: there is no class 'Adamm'. Did you mean Adam?"),
    (f"{OPT}.init_args.c2 1", f"{OPT}.init_args.c2: nclightning.optim.ArmijoGD has no argument 'c2'"),
    (f"{OPT}.init_args.c1 x", f"{OPT}.init_args.c1: expected a number, got 'x'"),
    (f"{OPT}.init_args.c1 0.7", r"ArmijoGD\(c1=...\) must be between 0 and 1/2"),
    (f"{OPT} torch.optim.SGD {OPT}.init_args.lr -1", f"{OPT}.init_args.lr -1: Invalid learning rate"),
    ("--lambda", "--lambda needs a value"),
    ("--lambda x", "--lambda: expected a number, got 'x'"),
    ("--lambda -1", "lambda must be finite and non-negative, got -1.0"),
    ("--lambda 1e400", "lambda must be finite"),
    ("--optimality.stop_distance -1", "stop_distance must be None or positive"),
    ("--neural_collapse.measures nc1", "--neural_collapse.measures: expected a list, got 'nc1'"),
    ("--neural_collapse.measures [nc9]", "measures must be different names out of .*got \\['nc9'\\]"),
    ("--ckpt_path nowhere.ckpt", "--ckpt_path nowhere.ckpt: no such file"),
    ("--ckpt_path", "--ckpt_path needs a value"),
    ("--config", "--config needs a value"),
    ("--config nowhere", "--config nowhere: no such file, and no shipped configuration"),
    ("--config .", "--config . is a folder"),
]

# A second configuration over the shipped one.
CONFIG = [
    ("modle: 3", "--config a.yaml: modle: no such option. Did you mean model?"),
    ("lambda: 3", "--config a.yaml: lambda: no such option. Did you mean model.init_args.lambda?"),
    ("trainer: {max_step: 3}", "--config a.yaml: trainer.max_step: no such option. Did you mean trainer.max_steps?"),
    ("trainer: 3", "--config a.yaml: trainer: expected a mapping of options, got int"),
    ("model: {init_args: {num_classes: ten}}", "--config a.yaml: model.init_args.num_classes: expected an integer"),
    ("model: {init_args: {lambda: 1, lambda_: 1}}", "--config a.yaml: lambda and lambda_ are one argument"),
    ("model: {class_path: 3}", "--config a.yaml: model: expected a class_path with its init_args"),
    ("model: nowhere.yaml", "--config a.yaml: model: nowhere.yaml: no such file"),
    ("seed_everything: 1\nseed_everything: 2", "--config a.yaml: line 2 repeats the key 'seed_everything'"),
    ("a: !!python/name:os.system ''", "--config a.yaml: line 1 has the tag"),
    (BOMB, "--config a.yaml: line . has too many entries"),
    ("a: &a [*a]", "--config a.yaml: line 1 contains an alias of itself"),
    ("a: " + "[" * 5000, "--config a.yaml: (line 1 is nested|not YAML)"),
    (b"\xff\xfe\x00", "--config a.yaml: not text in UTF-8"),
    ("seed_everything: 1".encode("utf-16"), "--config a.yaml: not text in UTF-8"),
    ("1: 2", "--config a.yaml: .*1"),
    ("- 3", "--config a.yaml: expected a mapping of options, got list"),
    ("", "--config a.yaml: expected a mapping of options, got NoneType"),
    ("config: a.yaml", "--config a.yaml: .*loop"),
]

# Whole command lines.
WORDS = [
    ("", "the first word must be a command: fit, validate"),
    ("fitt", "there is no command 'fitt'.*Did you mean fit?"),
    ("--config ufm_mse", "the first word must be a command"),
    ("fit", "give a configuration: --config NAME"),
    ("fit --trainer.max_steps 3", "give a configuration: --config NAME"),
    ("fit --model UFM", "--data must be given"),
    ("test --config ufm_mse --ckpt_path nowhere", "--ckpt_path nowhere: no such file"),
    ("fit --config mlp_ce --data.init_args.seed 99999999999999999999", "seed must be between"),
    ("fit --config mlp_ce --model.init_args.hidden_dim 10000000000", "this network needs at least .* GiB"),
    ("theory", "loss is missing: give --loss"),
    ("theory --los mse", "--los: no such option. Did you mean --loss?"),
    ("theory --loss hinge", "--loss: invalid choice: 'hinge'"),
    ("theory --num_classes x", "--num_classes: invalid int value: 'x'"),
    ("theory --lambda", "--lambda needs a value"),
    ("theory --config ufm_mse extra", "'extra' does not belong to an option"),
    ("theory --config ufm_mse --lambda -1", "lambda must be finite and non-negative"),
    ("theory --config ufm_mse --lambda nan", "lambda must be finite and non-negative"),
    ("theory --config ufm_mse --lambda 0", "lambda_w must be positive and finite"),
    ("theory --config ufm_mse --lambda 1e-320", "lambda must be between 1e-100 and 1e100"),
    ("theory --config ufm_mse --lambda_h 1e300", "lambda_h must be between"),
    (f"theory --config ufm_mse --num_classes 1{'0' * 23}", "num_classes must be an integer between 1 and 1e.15"),
    ("theory --problem unbalanced_c", "--problem unbalanced_c: no such problem. Did you mean unbalanced_ce"),
    ("theory --problem nowhere.at.all", "problem: nowhere.at.all is not a function that makes a Problem"),
    ("theory --problem torch.eye --problem.n 3", "problem: torch.eye is not a function that makes a Problem"),
    ("theory --problem unbalanced_ce", "counts is missing: give --problem.counts"),
    (
        "theory --problem unbalanced_ce --problem.count 3",
        "--problem.count: unbalanced_ce has no argument .*Did you mean",
    ),
    ("theory --problem unbalanced_ce --num_classes 3", "--problem.num_classes: unbalanced_ce has no argument"),
    ("theory --problem unbalanced_ce --problem.counts", "--problem.counts needs a value"),
    ("theory --problem unbalanced_ce --problem.counts --thresholds", "--problem.counts needs a value"),
    ("theory --problem unbalanced_ce --problem.counts [1", "--problem.counts: not YAML"),
    ("theory --problem unbalanced_ce --loss ce", "--loss does not go with a problem: the problem has its loss"),
    ("theory --problem unbalanced_ce --lambda 1", "--lambda does not go with a problem: .*Give --lambda_w"),
    ("theory --problem.counts 3", "--problem.counts needs --problem NAME"),
    (f"theory {TAIL} --problem.counts abc", "counts must be integers, got"),
    (f"theory {TAIL} --problem.counts 3", "counts must hold the number of samples of each of at least two classes"),
    (f"theory {TAIL} --problem.counts 3,-1", "counts must be integers, none negative"),
    (f"theory {TAIL} --problem.counts 3,1.5", "counts must be integers"),
    (f"theory {TAIL} --problem.counts 3,1 --problem.bias no", "bias must be 'none', 'free' or a positive penalty"),
    (f"theory {TAIL} --problem.counts 3,1 --lambda_w 0", "lambda_w must be positive and finite, got 0.0"),
    ("theory --config nowhere", "--config nowhere: no such file"),
    ("theory --config /dev/null", "--config /dev/null: no such file"),
    ("theory --config ufm_mse --picture /nowhere/a.png", "--picture /nowhere/a.png: cannot be written"),
    ("theory --config ufm_mse --picture a.xyz", "the ending must be one of"),
    ("plot", "RUN must be given"),
    ("plot --foo r", "--foo: no such option"),
    ("plot nowhere", "no readings.csv, metrics.csv or TensorBoard events in nowhere"),
    ("reproduce --figures 7", "--figures: invalid choice: '7'"),
    ("reproduce --jobs x", "--jobs: invalid int value: 'x'"),
    ("reproduce --jobs 0", "jobs must be at least 1, got 0"),
    ("reproduce --out /proc/nowhere", "cannot write /proc/nowhere"),
]

THEORY = [
    (f"num_classes: ten, {SIZES}, lambda: 1e-4", "num_classes must be an integer.*got 'ten'"),
    (f"num_classes: 10.5, {SIZES}, lambda: 1e-4", "num_classes must be an integer.*got 10.5"),
    (f"num_classes: [3], {SIZES}, lambda: 1e-4", r"num_classes must be an integer.*got \[3\]"),
    (f"num_classes: 3, {SIZES}, lambda: [1]", r"lambda must be a number, got \[1\]"),
    (f"num_classes: 3, {SIZES}, lambda_w: x", "lambda_w must be a number, got 'x'"),
    ("problem: 3", "problem must be a name, or a mapping with class_path and init_args, got 3"),
    ("problem: {class_path: nclightning.problems.Problem}", "loss is missing"),
    ("problem: {init_args: {a: 1}}", "problem: class_path is missing, got init_args"),
    ("problem: unbalanced", "error: problem unbalanced: no such problem. Did you mean unbalanced_"),
    ("problem: {class_path: nclightning.problems.balanced_ce, init_args: {classes: 3}}", "balanced_ce has no argument"),
    (f"num_classes: 3, {SIZES}, lambda: 1, lambda_: 1", "lambda and lambda_ are one argument"),
]

READINGS = [
    ("", "holds no readings yet"),
    (TABLE, "holds no readings yet"),
    (b"\x00\xff\xfe\x01" * 50, "is not UTF-8 text"),
    (GOOD.encode("utf-16"), "is not UTF-8 text"),
    (GOOD.replace(",", ";"), "could not convert"),
    (TABLE + "0,one\n", "could not convert string to float: 'one'"),
    (TABLE + "0,1\n20,1\n10,1\n", "damaged: line 4 has iteration 10 after 20"),
    (TABLE + "0,1\n10,1\n10,1\n", "damaged: line 4 has iteration 10 after 10"),
    (TABLE + "0.5,1\n", "damaged: line 2 has iteration 0.5, which is not a whole number"),
    (TABLE + "nan,1\n", "damaged: line 2 has iteration nan"),
    (TABLE + "0,1\ninf,1\n", "damaged: line 3 has iteration inf"),
    (TABLE + "-10,1\n", "damaged: line 2 has iteration -10"),
    (TABLE + "0,1\n1e300,1\n", "damaged: line 3 has iteration 1e.300"),
    (TABLE + "0,1\n10\n20,1\n", "damaged: line 3 has 1 of 2 cells"),
    (TABLE + "0,1\n\n20,1\n", "damaged: line 3 has 0 of 2 cells"),
    (TABLE + "0,1\n10,1,2\n20,1\n", "damaged: line 3 has 3 of 2 cells"),
    ("iteration,a,a\n0,1,2\n", "a column occurs twice"),
    (TABLE + f"0,{'1' * 200_000}\n", "field limit"),
]

HPARAMS = [
    ("a: [1", "hparams.yaml is damaged: not YAML .*line"),
    (b"\xff\xfe\x00", "hparams.yaml: not text in UTF-8"),
    (BOMB, "hparams.yaml is damaged: line . has too many entries"),
    ("a: &a [*a]", "hparams.yaml is damaged: line 1 contains an alias of itself"),
]


@pytest.fixture(autouse=True)
def _somewhere_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nclightning.arguments._memory", lambda: 2**34)


def write(**files):
    for name, content in files.items():
        path = Path(name.replace("__", "/").replace("_yaml", ".yaml").replace("_csv", ".csv"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def check(words, message, capsys):
    before = sorted(str(path) for path in Path().rglob("*"))
    with pytest.raises(SystemExit) as stop:
        main(words)
    said = stop.value.code
    assert isinstance(said, str), said  # Python prints it on stderr and ends with 1.
    assert said.startswith("error: ")
    assert "\n" not in said
    assert re.search(message, said), said
    assert "Traceback" not in capsys.readouterr().err
    assert sorted(str(path) for path in Path().rglob("*")) == before


def test_they_are_many():
    assert sum(map(len, (FIT, CONFIG, WORDS, THEORY, READINGS, HPARAMS))) >= 112 + 18


@pytest.mark.parametrize(("words", "message"), FIT, ids=[words[:70] for words, _ in FIT])
def test_options_of_a_fit(words, message, capsys):
    check(["fit", "--config", "ufm_mse", *words.split()], message, capsys)


@pytest.mark.parametrize(("content", "message"), CONFIG, ids=[str(content)[:30] for content, _ in CONFIG])
def test_configurations(content, message, capsys):
    write(a_yaml=content)
    check(["fit", "--config", "ufm_mse", "--config", "a.yaml"], message, capsys)


@pytest.mark.parametrize(("words", "message"), WORDS, ids=[words for words, _ in WORDS])
def test_whole_command_lines(words, message, capsys):
    check(words.split(), message, capsys)


@pytest.mark.parametrize(("arguments", "message"), THEORY)
def test_configurations_of_theory(arguments, message, capsys):
    write(a_yaml=f"model: {{init_args: {{loss: mse, {arguments}}}}}")
    check(["theory", "--config", "a.yaml"], message, capsys)


@pytest.mark.parametrize(("content", "message"), READINGS, ids=[str(content)[25:50] for content, _ in READINGS])
def test_damaged_readings(content, message, capsys):
    write(r__readings_csv=content)
    check(["plot", "r", "--out", "out"], message, capsys)


@pytest.mark.parametrize(("content", "message"), HPARAMS, ids=[str(content)[:20] for content, _ in HPARAMS])
def test_damaged_settings(content, message, capsys):
    write(r__readings_csv=GOOD, r__hparams_yaml=content)
    check(["plot", "r", "--out", "out"], message, capsys)


def test_a_process_prints_one_line_and_ends_with_1():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-m", "nclightning", "fit", "--config", "ufm_mse", "--lambda", "x"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    said = [line for line in ended.stderr.splitlines() if not line.startswith("Using the shipped configuration")]
    assert (ended.returncode, ended.stdout, len(said)) == (1, "", 1)
    assert said[0].startswith("error: --")
    assert list(Path().iterdir()) == []


def test_a_fault_of_our_own_keeps_its_traceback_and_asks_for_a_report(monkeypatch):
    def fails(words):
        raise ValueError("inside")

    monkeypatch.setitem(sys.modules["nclightning.cli"].COMMANDS, "plot", fails)
    with pytest.raises(ValueError, match="inside") as caught:
        main(["plot"])
    if sys.version_info >= (3, 11):
        assert "Please report it" in caught.value.__notes__[0]


class WithoutNotes(ValueError):
    """An error as those of Python 3.10 are."""

    add_note = property()


def test_the_request_for_a_report_needs_no_notes(monkeypatch, capsys):
    def fails(words):
        raise WithoutNotes("inside")

    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setitem(sys.modules["nclightning.cli"].COMMANDS, "plot", fails)
    with pytest.raises(WithoutNotes) as caught:
        main(["plot"])
    sys.excepthook(*caught._excinfo)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2].endswith("WithoutNotes: inside")
    assert "Please report it" in lines[-1]
    sys.excepthook(KeyError, KeyError("another"), None)
    assert "Please report it" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device", "run/readings.csv"), "run/readings.csv: No space left on device"),
        (OSError(30, "Read-only file system", "run"), "run: Read-only file system"),
        (PermissionError(13, "Permission denied", "run"), "run: Permission denied"),
        (FileNotFoundError(2, "No such file or directory", "gone/run/readings.csv"), "its folder no longer exists"),
        (RuntimeError("Parent directory gone does not exist."), "the run folder cannot be written"),
        (
            RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/0"),
            "the run folder cannot be written",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
            "this problem does not fit in memory",
        ),
        (RuntimeError("Missing folder: lightning_logs/version_0."), "the run folder cannot be written"),
        (MemoryError(), "this problem does not fit in memory"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_happens_to_the_place_is_one_sentence(error, message, monkeypatch):
    def fails(words):
        raise error

    monkeypatch.setitem(sys.modules["nclightning.cli"].COMMANDS, "plot", fails)
    with pytest.raises(SystemExit, match=message):
        main(["plot"])


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "No such file", "x.css"), RuntimeError("other"), OSError("odd")]
)
def test_other_errors_are_faults(error, monkeypatch):
    def fails(words):
        raise error

    monkeypatch.setitem(sys.modules["nclightning.cli"].COMMANDS, "plot", fails)
    with pytest.raises(type(error)):
        main(["plot"])


@pytest.mark.parametrize("logger", ["--trainer.logger+=MLFlowLogger", "--trainer.logger=MLFlowLogger"])
def test_what_the_client_of_a_logger_refuses_is_one_sentence(logger, monkeypatch, capsys):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "false")
    words = f"fit --config ufm_mse {logger} --trainer.logger.tracking_uri nowhere://x".split()
    check(words, "unsupported URI .nowhere://x", capsys)


def test_what_a_client_refuses_during_a_fit_is_one_sentence():
    wandb_errors = pytest.importorskip("wandb.errors")
    error = RuntimeError("setup failed")
    error.__cause__ = wandb_errors.UsageError("No API key configured.")
    assert message_for_user(error) == "the logger's client wandb says: No API key configured."
