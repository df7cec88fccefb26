"""docs/problems.md says what the code does."""

import doctest
import importlib.util
import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nclightning import problems
from nclightning.cli import main
from nclightning.configurations import shipped_configs

DOCS = Path(__file__).resolve().parents[2] / "docs"
EXAMPLE = DOCS.parent / "examples" / "problems" / "squared_hinge.py"


def load():
    spec = importlib.util.spec_from_file_location("problems_page", DOCS / "problems.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_of_this_code():
    page = load()
    table = page.PAGE.read_text().partition(page.BEGIN)[2].partition(page.END)[0]
    assert table == page.table(), "run: python docs/problems.py"


def test_every_member_is_in_the_table():
    listed = {name for name, _, _ in load().MEMBERS}
    members = {
        n for n in problems.__all__ if getattr(problems, n).__module__.startswith("nclightning.problems.members")
    }
    assert members - {"regression_gram"} == listed


def test_what_the_page_shows():
    result = doctest.testfile(str(DOCS / "problems.md"), module_relative=False)
    assert result.attempted > 5
    assert not result.failed


def test_the_example_is_short_enough_to_copy():
    assert len(EXAMPLE.read_text().splitlines()) < 60


@pytest.fixture
def own(monkeypatch, tmp_path):
    """Be somewhere else, with the user's file in reach."""
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read_events(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_a_loss_of_ones_own_is_trained_and_seen_in_tensorboard(own):
    gap, certified = importlib.import_module("squared_hinge").main()
    assert gap < 1e-20
    # The bound is right to the rounding of F.
    assert gap - 1e-12 < certified < 1e-10
    (file,) = own.rglob("events.out.*")
    read = read_events(file.parent)
    gaps = read["optimality/gap"]
    assert gaps[-1] == pytest.approx(gap, rel=1e-3)
    assert gaps[0] > 1e-2
    assert {"optimality/distance", "optimality/grad_norm", "nc/train/nc1"} <= read.keys()


@pytest.mark.usefixtures("no_pictures")
def test_a_configuration_with_a_problem_of_ones_own(own):
    (text,) = re.findall(r"```yaml\n(.*?)```", (DOCS / "problems.md").read_text(), re.DOTALL)
    (own / "own.yaml").write_text(text)
    main(["fit", "--config", "own.yaml", "--trainer.enable_progress_bar", "false"])
    assert read_events(own / "lightning_logs" / "version_0")["optimality/gap"][-1] < 1e-20


def test_commands_of_the_page_name_configurations():
    for name in re.findall(r"--config (\w+)", (DOCS / "problems.md").read_text()):
        assert name in shipped_configs()
