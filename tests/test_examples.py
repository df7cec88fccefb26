"""The recipes do what examples/README.md says."""

import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

from nclightning import measure
from tests.trainers import forget_accelerator

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
RECIPES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "digits")
EXACT = {"rel": 1e-12, "abs": 1e-12}


@pytest.fixture
def recipe(monkeypatch, tmp_path):
    """Run a recipe as its command does, elsewhere; return what it returns."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments):
        return importlib.import_module(name).main(["--epochs", "1", *arguments])

    yield run
    forget_accelerator()
    for name in (*RECIPES, "digits"):
        sys.modules.pop(name, None)


def digits():
    return importlib.import_module("digits").load()[0]


def logged(trainer, prefix):
    values = {tag: float(value) for tag, value in trainer.callback_metrics.items()}
    return {tag.removeprefix(prefix): value for tag, value in values.items() if tag.startswith(prefix)}


def test_a_loop_of_ones_own_and_a_trainer_read_the_same(recipe, capsys, tmp_path):
    (found,) = recipe("plain_loop", "--picture", "pictures/loop.png")
    assert found["test"].num_samples == 360
    assert (tmp_path / "pictures" / "loop.png").stat().st_size > 10_000
    assert f"nc1 {found['train']['nc1']:.3g}" in re.sub(" +", " ", capsys.readouterr().out)
    checkpoints = recipe("old_checkpoints")  # With the run of lightning_trainer.
    assert sorted(checkpoints) == ["epoch=0-step=23.ckpt", "trained.pt", "untrained.pt"]
    assert checkpoints["trained.pt"] == checkpoints["epoch=0-step=23.ckpt"] != checkpoints["untrained.pt"]
    # The same weights, bit for bit; float32 forwards in batches of other sizes.
    assert {name: found["train"][name] for name in ("nc1", "nc2", "nc3")} == pytest.approx(
        dict(checkpoints["trained.pt"]), rel=1e-5
    )


def test_what_the_trainer_logs_is_what_its_weights_show(recipe):
    trainer, module = recipe("lightning_trainer")
    found = measure(module.network, DataLoader(digits(), batch_size=64))
    assert logged(trainer, "nc/train/") == pytest.approx(dict(found), **EXACT)


def test_mixtures_are_trained_on_and_clean_images_measured(recipe):
    trainer, module = recipe("mixup")
    found = measure(module.network, DataLoader(digits(), batch_size=256))
    assert logged(trainer, "nc/clean/") == pytest.approx(dict(found), **EXACT)
    assert logged(trainer, "nc/") == {f"clean/{name}": value for name, value in logged(trainer, "nc/clean/").items()}


def test_features_in_a_file(recipe, tmp_path):
    found = recipe("saved_features")
    with np.load(tmp_path / "features.npz") as file:
        assert file["features"].shape == (1437, 64)
        assert sorted(file) == ["bias", "features", "labels", "weight"]
    assert found.num_samples == 1437
    assert 0 < found["nc1"] < 1


@pytest.mark.parametrize(("name", "samples"), [("contrastive_views", 2 * 1437), ("linear_probe", 1437)])
def test_samples_are_measured_as_they_are_trained_on(name, samples, recipe):
    (found,) = recipe(name)
    assert found.num_samples == samples
    assert 0 < found["nc1"] < 1


def test_a_linear_probe_leaves_the_features_as_they_are(recipe):
    first, second = recipe("linear_probe", "--epochs", "2")
    assert first["nc1"] == second["nc1"]
    assert first["nc3"] != second["nc3"]


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_fabric_in_mixed_precision(recipe):
    (found,) = recipe("fabric_loop")
    assert found.num_samples == 1437
    assert 0 < found["nc1"] < 2


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_trainer_of_hugging_face(recipe):
    trainer = recipe("hf_trainer")
    collate = importlib.import_module("hf_trainer").as_mapping
    found = measure(trainer.model, DataLoader(digits(), batch_size=64, collate_fn=collate))
    (row,) = [row for row in trainer.state.log_history if "nc/nc1" in row]
    assert {name: row[f"nc/{name}"] for name in found} == pytest.approx(dict(found), **EXACT)


def test_accelerate(recipe):
    (found,) = recipe("accelerate_loop")
    assert found.num_samples == 1437
    assert 0 < found["nc1"] < 1


@pytest.mark.slow
def test_collapse_by_orders_of_magnitude(recipe):
    """A third of the least of seeds 0, 1 and 2, which fell by 274, 20.7 and 60.7."""
    trainer, _ = recipe("lightning_trainer", "--epochs", "60")
    history = importlib.import_module("digits").read_csv(trainer.log_dir)
    fell = {name: history[0][name] / history[-1][name] for name in history[0]}
    assert all(fell[name] >= factor for name, factor in {"nc1": 90, "nc2": 7, "nc3": 20}.items()), fell


def test_recipes_are_short_and_listed():
    page = (EXAMPLES / "README.md").read_text()
    assert sorted(set(re.findall(r"`python examples/(\w+)\.py", page))) == RECIPES
    for name in RECIPES:
        text = (EXAMPLES / f"{name}.py").read_text()
        assert len(text.splitlines()) < 40, name
        assert f"python examples/{name}.py" in text.split('"""')[1]


def test_figures_of_the_page_are_those_of_a_run(recipe):
    """Those of the first epoch, which takes no time."""
    page = (EXAMPLES / "README.md").read_text()
    (found,) = recipe("plain_loop")
    (row,) = [line for line in page.splitlines() if "plain_loop.py" in line]
    assert f"NC1 {found['train']['nc1']:.2g} to" in row
