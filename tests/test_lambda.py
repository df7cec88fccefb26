"""The paper's single lambda, wherever it is written."""

import json
from pathlib import Path

import pytest
import yaml

from nclightning.cli import main
from nclightning.errors import UserError
from nclightning.models import UFM, TwoLayerMLP
from nclightning.parsing import in_order

UFM_ARGUMENTS = {"num_classes": 3, "samples_per_class": 2, "feature_dim": 4, "loss": "mse"}
OLD = UFM_ARGUMENTS | {"lambda_w": 1.0, "lambda_h": 2.0, "lambda_": None}
NEW = (2e-4, 1e-4)  # Of lambda = 1e-4 and n = 2.


@pytest.fixture(autouse=True)
def _somewhere_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(path, content):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(content if isinstance(content, str) else yaml.safe_dump(content))


def configuration(arguments, model="nclightning.models.UFM"):
    return {
        "model": {"class_path": model, "init_args": arguments},
        "data": "nclightning.data.IndexDataModule",
        "trainer": {"max_steps": 1, "accelerator": "cpu"},
    }


def resolved(capsys, *words, command="fit"):
    """Model that the command line would make, as it prints it."""
    with pytest.raises(SystemExit) as stop:
        main([command, *words, "--print_config"])
    assert stop.value.code in (0, None), stop.value.code
    return yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]


def penalties(capsys, *words):
    """What is trained with."""
    given = {name: value for name, value in resolved(capsys, *words).items() if name != "optimizer"}
    model = (TwoLayerMLP if "hidden_dim" in given else UFM)(**given)
    return model.hparams["lambda_w"], model.hparams["lambda_h"]


@pytest.fixture
def base():
    write("run/config.yaml", configuration(OLD))
    return ["--config", "run/config.yaml"]


@pytest.mark.parametrize(
    "words",
    [
        ["--lambda", "1e-4"],
        ["--lambda=1e-4"],
        ["--model.lambda", "1e-4"],
        ["--model.lambda_=1e-4"],
        ["--model.init_args.lambda", "1e-4"],
        ["--model.init_args.lambda_", "1e-4"],
        ["--model.init_args", '{"lambda": 1e-4}'],
        ["--model", '{"class_path": "UFM", "init_args": {"lambda": 1e-4}}'],
        ["--lambda", "7", "--lambda", "1e-4"],
        ["--model.init_args.lambda_h", "7", "--lambda", "1e-4"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_on_the_command_line_it_overrides_what_configurations_say(words, before, base, capsys):
    assert penalties(capsys, *(words + base if before else base + words)) == pytest.approx(NEW)


@pytest.mark.parametrize("name", ["lambda", "lambda_"])
def test_a_later_configuration_overrides_the_penalties_of_a_run(name, base, capsys):
    write("over.yaml", {"model": {"init_args": {name: 1e-4}}})
    assert penalties(capsys, *base, "--config", "over.yaml") == pytest.approx(NEW)
    write("half.yaml", {"model": {"init_args": {name: 1e-4, "lambda_h": 7.0}}})
    assert penalties(capsys, *base, "--config", "half.yaml") == pytest.approx((2e-4, 7.0))


def test_the_last_of_several_configurations_counts(base, capsys):
    write("over.yaml", {"model": {"init_args": {"lambda": 1e-4}}})
    write("later.yaml", {"model": {"init_args": {"lambda_h": 5.0}}})
    assert penalties(capsys, *base, "--config=over.yaml", "-c", "later.yaml") == pytest.approx((2e-4, 5.0))
    write("without.yaml", configuration(UFM_ARGUMENTS | {"lambda": 3.0}))
    assert penalties(capsys, "--config", "without.yaml", *base) == (1.0, 2.0)


def test_a_model_in_a_file_of_its_own(base, capsys):
    write("m.yaml", {"class_path": "nclightning.models.UFM", "init_args": UFM_ARGUMENTS | {"lambda": 1e-4}})
    assert penalties(capsys, *base, "--model", "m.yaml") == pytest.approx(NEW)
    assert penalties(capsys, "--model", "m.yaml", *base) == pytest.approx(NEW)


def test_a_model_beside_its_configuration(capsys):
    write("there/model.yaml", {"class_path": "nclightning.models.UFM", "init_args": UFM_ARGUMENTS | {"lambda": 1e-4}})
    write("there/config.yaml", configuration({}) | {"model": "model.yaml"})
    assert penalties(capsys, "--config", "there/config.yaml") == pytest.approx(NEW)
    main(["theory", "--config", "there/config.yaml"])
    assert "lambda_w = 0.0002, lambda_h = 0.0001" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_in_a_section_of_a_command(command, capsys):
    write("all.yaml", {command: configuration(UFM_ARGUMENTS | {"lambda": 1e-4})})
    with pytest.raises(SystemExit):
        main(["--config", "all.yaml", command, "--print_config"])
    model = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    assert (model["lambda_"], model["lambda_w"], model["lambda_h"]) == (1e-4, None, None)


def test_validate_takes_it_like_fit(base, capsys):
    write("over.yaml", {"model": {"init_args": {"lambda": 1e-4}}})
    model = resolved(capsys, *base, "--config", "over.yaml", command="validate")
    assert (model["lambda_"], model["lambda_w"], model["lambda_h"]) == (1e-4, None, None)


def test_a_network_takes_it(capsys):
    write("mlp.yaml", configuration(OLD | {"hidden_dim": 5, "input_dim": 3}, "nclightning.models.TwoLayerMLP"))
    assert penalties(capsys, "--config", "mlp.yaml", "--lambda", "1e-4") == pytest.approx(NEW)


OWN = """
from lightning.pytorch import LightningModule
from nclightning.models import UFM
class Own(LightningModule):
    def __init__(self, lambda_: float = 1.0, lambda_w: float = 2.0, lambda_h: float = 3.0, samples_per_class: int = 4):
        super().__init__()
class Less(UFM):
    def __init__(self, lambda_: float = 1.0):
        super().__init__(3, 2, 4, "mse", lambda_=lambda_)
class Keeps(UFM):
    def __init__(self, extra: int = 0, **kwargs):
        super().__init__(**kwargs)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    write("own_models.py", OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    import sys  # noqa: PLC0415

    sys.modules.pop("own_models", None)


def test_models_of_the_user_keep_their_arguments(own, capsys):
    write("own.yaml", configuration({"lambda_": 0.5}, "own_models.Own"))
    expected = {"lambda_": 0.5, "lambda_w": 2.0, "lambda_h": 3.0, "samples_per_class": 4}
    assert resolved(capsys, "--config", "own.yaml") == expected
    assert resolved(capsys, "--config", "own.yaml", "--model.lambda_", "0.25") == expected | {"lambda_": 0.25}
    write("less.yaml", configuration({"lambda_": 0.5}, "own_models.Less"))
    assert resolved(capsys, "--config", "less.yaml") == {"lambda_": 0.5}
    with pytest.raises(SystemExit, match=r"--lambda: own_models.Own has no argument 'lambda'"):
        main(["fit", "--config", "own.yaml", "--lambda", "3"])


def test_models_made_from_ours_take_it(own, capsys):
    write("keeps.yaml", configuration(OLD, "own_models.Keeps"))
    model = resolved(capsys, "--config", "keeps.yaml", "--lambda", "1e-4")
    assert (model["lambda_"], model["lambda_w"], model["lambda_h"]) == (1e-4, None, None)


@pytest.mark.parametrize("content", ["lambda: 1.0, lambda_: 1.0", "lambda: 1.0, lambda: 2.0"])
def test_two_of_it_are_refused(content, base):
    write("over.yaml", f"model: {{init_args: {{{content}}}}}")
    for words in (["--config", "over.yaml"], ["--model.init_args", f"{{{content}}}"]):
        with pytest.raises(SystemExit, match=r"lambda and lambda_ are one argument|repeats the key 'lambda'"):
            main(["fit", *base, *words])


def test_a_fit_saves_both_penalties(base):
    write("over.yaml", json.dumps({"model": {"init_args": {"lambda": 1e-4}}}))
    main(["fit", *base, "--config", "over.yaml", "--trainer.enable_progress_bar", "false"])
    saved = yaml.safe_load(Path("lightning_logs/version_0/config.yaml").read_text())["model"]["init_args"]
    assert (saved["lambda_"], saved["lambda_w"], saved["lambda_h"]) == (None, pytest.approx(2e-4), 1e-4)


def test_configurations_come_first_and_a_lambda_needs_a_value():
    assert in_order(["fit", "--a", "1", "-c", "x", "--lambda", "2", "--config=y", "--b"]) == [
        *("fit", "-c", "x", "--config=y", "--a", "1", "--model.init_args.lambda=2", "--b")
    ]
    with pytest.raises(UserError, match="--lambda needs a value"):
        in_order(["fit", "--lambda"])
