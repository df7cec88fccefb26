"""Each problem has a configuration that runs to its optimum, a page that is right, and a picture of this code."""

import csv
import doctest
import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from nclightning.cli import main
from nclightning.problems import Problem

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "problems"
REPAIR = "run: python docs/members.py"
DIGITS = 2e-6  # Data hold six places, and an optimum is certified to far more.
TRAINED = 1e-5  # Runs end at 1e-7 from the optimum; lengths near a threshold and angles of short vectors magnify that.


def load():
    spec = importlib.util.spec_from_file_location("members_page", ROOT / "docs" / "members.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


members = load()
NAMES = sorted(members.PICTURES)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("name", NAMES)
def test_its_configuration_runs_to_the_optimum_and_stops(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", f"ufm_{name}", "--trainer.enable_progress_bar", "false"])
    with (tmp_path / "lightning_logs" / "version_0" / "readings.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last["optimality/gap"]) < 1e-20
    assert float(last["optimality/distance"]) < 1e-11
    assert int(last["iteration"]) < 5000


@pytest.mark.parametrize("name", NAMES)
def test_its_page(name):
    """What it shows runs, of the problem of the configuration; it names the command and has the picture."""
    text = (PAGES / f"{name}.md").read_text()
    parsed = doctest.DocTestParser().get_doctest(text, {}, name, name, 0)
    result = doctest.DocTestRunner().run(parsed, clear_globs=False)
    assert result.attempted > 5
    assert not result.failed
    shown, shipped = (each.describe()["init_args"] for each in (parsed.globs["problem"], members.shipped(name)))
    assert shown == shipped
    assert f"python -m nclightning fit --config ufm_{name}\n" in text
    assert (PAGES / re.search(r"!\[.+\]\((.+)\)", text)[1]).resolve() == members.IMAGES / f"{name}.png"
    assert len(text.splitlines()) < 80


def test_there_is_a_page_and_a_picture_for_each():
    assert sorted(path.stem for path in PAGES.glob("*.md")) == NAMES
    assert sorted(path.stem for path in members.IMAGES.glob("*.png")) == NAMES
    for path in (ROOT / "configs").glob("ufm_*.yaml"):
        assert path.stem in ("ufm_mse", "ufm_ce") or path.stem.removeprefix("ufm_") in NAMES


def close(found, expected, tolerance):
    """Compare dictionaries of numbers, or matrices."""
    if isinstance(found, dict):
        assert found.keys() == expected.keys()
        found, expected = [*found.values()], [*expected.values()]
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance, err_msg=REPAIR)


@pytest.mark.parametrize("name", NAMES)
def test_its_picture_is_of_this_code(name):
    """Every seventh point of a curve; and runs of gradient descent end on the curves."""
    panels, drawn = members.panels_of(name), members.saved(name)
    for panel, data in zip(panels, drawn, strict=True):
        if isinstance(panel, members.Curves):
            assert (list(panel.at), list(panel.runs_at)) == (data["at"], data["runs_at"]), REPAIR
            assert panel.frame() == {key: data[key] for key in ("marks", "axes")}, REPAIR
            for x, values in list(zip(data["at"], data["curves"], strict=True))[::7]:
                close(panel.theory(x), values, DIGITS)
            for x, values in zip(data["runs_at"], data["runs"], strict=True):
                close(values, panel.theory(x), TRAINED)
        elif isinstance(panel, members.Points):
            close(panel.theory(), data["points"], DIGITS)
            close(data["runs"], data["points"], TRAINED)
        else:
            now = panel.data()
            close(now.pop("grid"), data.pop("grid"), DIGITS)
            assert now == data, REPAIR


def test_a_run_of_a_picture_made_again():
    panel, data = members.panels_of("unbalanced_ce")[0], members.saved("unbalanced_ce")[0]
    problem = panel.make(data["runs_at"][1])
    assert isinstance(problem, Problem)
    close(
        {name: float(value) for name, value in panel.quantities(problem, members.trained(problem)).items()},
        data["runs"][1],
        TRAINED,
    )
