"""What SECURITY.md says of files that somebody else made: nothing in them runs."""

import shutil

import numpy as np
import pytest
import torch

from nclightning.cli import main
from nclightning.models import UFM
from nclightning.problems import Problem, unbalanced_ce


class Touches:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture
def ran(tmp_path):
    return tmp_path / "ran"


@pytest.fixture
def call(ran):
    """A class_path that runs a command where it is called."""
    return {"class_path": "os.system", "init_args": {"command": f"touch {ran}"}}


def refused(words, message):
    with pytest.raises(SystemExit, match=message):
        main([str(word) for word in words])


def test_the_traps_of_these_tests_work(ran, call, tmp_path):
    torch.save(Touches(ran), tmp_path / "a.pt")
    torch.load(tmp_path / "a.pt", weights_only=False).close()
    assert ran.exists()


@pytest.mark.parametrize("function", ["os.system", "subprocess.getoutput", "builtins.exec"])
def test_a_description_of_a_problem_calls_only_what_makes_problems(function, ran):
    argument = {"os.system": "command", "subprocess.getoutput": "cmd", "builtins.exec": "source"}[function]
    description = {"class_path": function, "init_args": {argument: f"touch {ran}"}}
    with pytest.raises(ValueError, match=f"{function} is not a function that makes a Problem"):
        Problem.from_description(description)
    with pytest.raises(ValueError, match=f"{function} is not a function that makes a Problem"):
        UFM(problem=description)
    loss = unbalanced_ce([3, 2], 2, 0.1, 0.1).describe()
    loss["init_args"]["loss"] = description
    with pytest.raises(ValueError, match=f"{function} is not a subclass of Loss"):
        Problem.from_description(loss)
    assert not ran.exists()


def test_a_problem_in_a_checkpoint_calls_only_what_makes_problems(finished, ran, call, tmp_path):
    path = tmp_path / "changed.ckpt"
    checkpoint = torch.load(finished / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["hyper_parameters"] = {"problem": call}
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"os.system is not a function that makes a Problem"):
        UFM.load_from_checkpoint(path, weights_only=True)
    refused(
        ["measure", path, "--model", "nclightning.models:UFM", "--out", tmp_path / "out"],
        "os.system is not a function that makes a Problem",
    )
    assert not ran.exists()


@pytest.mark.parametrize("part", ["model", "data"])
def test_a_configuration_beside_a_checkpoint_calls_only_modules_of_lightning(part, finished, ran, tmp_path):
    sections = {
        "model": "{class_path: nclightning.models.UFM}",
        "data": "{class_path: nclightning.data.IndexDataModule}",
        part: f"{{class_path: os.system, init_args: {{command: touch {ran}}}}}",
    }
    (finished / "config.yaml").write_text("".join(f"{name}: {text}\n" for name, text in sections.items()))
    refused(["measure", finished, "--out", tmp_path / "out"], f"{part}.class_path: os.system is no subclass of Lightn")
    assert not ran.exists()


def test_a_configuration_makes_no_python_objects(ran, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(f"model: !!python/object/apply:os.system ['touch {ran}']\n")
    refused(["fit", "--config", path], "a.yaml")
    refused(["theory", "--config", path], "a.yaml")
    assert not ran.exists()


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_a_checkpoint_with_objects_is_not_unpickled(command, finished, ran, tmp_path):
    path = finished / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True) | {"more": Touches(ran)}
    torch.save(checkpoint, path)
    refused([command, "--config", "ufm_mse", "--ckpt_path", path], r"not a readable checkpoint \(UnpicklingError\)")
    refused(["measure", finished, "--out", tmp_path / "out"], r"contains an object of (io|_io|builtins).open")
    assert not ran.exists()


@pytest.mark.parametrize("ending", ["npy", "npz", "pt"])
def test_saved_features_with_objects_are_not_unpickled(ending, ran, tmp_path):
    path, objects = tmp_path / f"features.{ending}", np.array([Touches(ran)], dtype=object)
    if ending == "pt":
        torch.save({"features": torch.zeros(2, 2), "labels": Touches(ran)}, path)
    elif ending == "npz":
        np.savez(path, features=np.zeros((2, 2)), labels=objects)
    else:
        np.save(path, objects)
    labels = ["--labels", path] if ending == "npy" else []
    refused(["measure", path, *labels, "--out", tmp_path / "out"], "object")
    assert not ran.exists()


def test_hyperparameters_of_a_run_that_is_drawn_make_no_objects(finished, ran, tmp_path):
    run = shutil.copytree(finished, tmp_path / "drawn")
    (run / "hparams.yaml").write_text(f"loss: !!python/object/apply:os.system ['touch {ran}']\n")
    main(["plot", str(run), "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "gap.png").is_file()
    assert not ran.exists()
