"""The pictures of docs/architecture.md show the code as it is, and each component has a batch once."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from nclightning.callbacks import NeuralCollapseMonitor, OptimalityMonitor
from tests.floors import FLOORS, PACKAGE

DOCS = Path(__file__).resolve().parents[1] / "docs"
REPAIR = "run: python docs/architecture.py"


def load():
    spec = importlib.util.spec_from_file_location("architecture", DOCS / "architecture.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # As dataclasses need it.
    spec.loader.exec_module(module)
    return module


architecture = load()


@pytest.fixture(scope="module")
def pictures():
    return {name: made() for name, made in architecture.WALK_PICTURES.items()}


@pytest.fixture(scope="module")
def walks(pictures):
    return {title: trail for trails in pictures.values() for title, trail in trails.items()}


@pytest.mark.parametrize("name", sorted(architecture.IMPORT_PICTURES))
def test_pictures_of_imports_are_of_this_code(name):
    drawn = architecture.saved(architecture.IMAGES / name)
    assert drawn == architecture.IMPORT_PICTURES[name]().data, REPAIR


@pytest.mark.parametrize("name", sorted(architecture.WALK_PICTURES))
def test_pictures_of_walks_are_of_this_code(name, pictures):
    drawn = architecture.saved(architecture.IMAGES / name)
    assert drawn == architecture.walk_data(pictures[name]), REPAIR


def test_imports_go_down_in_the_picture():
    graph = architecture.import_graph()
    assert graph.keys() == FLOORS.keys()
    assert all(FLOORS[other] < FLOORS[unit] for unit, others in graph.items() for other in others)


def test_each_component_has_a_batch_once(walks):
    for trail in walks.values():
        batches = [[visit for visit in trail.visits if visit.batch == i and not visit.is_done] for i in (1, 2, 3)]
        first, *others = [[visit.place for visit in batch] for batch in batches]
        assert others[0] == others[1]
        assert len(set(others[0])) == len(others[0])
        # The first one is examined besides.
        assert set(first) > set(others[0])
        assert first.count("RowBuffer.add") == 1
        done = [visit.place for visit in trail.visits if visit.is_done]
        assert "StatisticsCollector.add" in done
        assert len(set(done)) == len(done)
        assert done[-2:] == ["Publisher.publish", "Logger.log_metrics"]


def test_no_component_of_a_batch_calls_back_up(walks):
    """Who has handed a batch on gets it back only as what a call returns."""
    for trail in walks.values():
        # The first batch is examined by runs of the model, which are handed down as a function.
        for visit in (each for each in trail.visits if each.batch > 1 and not each.is_done):
            around, owners = visit.around, [visit.place.split(".")[0]]
            while around is not None:
                owners.append(around.place.split(".")[0])
                around = around.around
            # A call of the user's model, and what the hooks in it do, is an end of its own.
            inner = owners[: owners.index("Net")] if "Net" in owners else owners
            assert len(set(inner)) == len(inner), owners


def test_monitors_beside_each_other_share_the_batches():
    alone = architecture.walk("sweep")
    trail = architecture.walk("sweep", NeuralCollapseMonitor(measures=("nc2_centred",)))
    count = [sum(visit.place == "DataLoader" for visit in each.visits) for each in (alone, trail)]
    assert count == [3, 3]
    places = [visit.place for visit in trail.visits if visit.batch == 2]
    assert places.count("PairReader.split") == 1
    assert places.count("RowBuffer.add") == 1
    assert [visit.place for visit in trail.visits].count("StatisticsCollector.add") == 2


def test_the_page_names_what_exists():
    page = (DOCS / "architecture.md").read_text()
    files = *PACKAGE.rglob("*.py"), DOCS / "architecture.py", DOCS.parent / "tests" / "test_house.py"
    sources = "\n".join(path.read_text() for path in files)
    for name in set(re.findall(r"`([A-Z]\w+)[.`(]", page)):
        assert re.search(rf"\b{name}\b", sources), name
    for member in set(re.findall(r"`[A-Z]\w+\.(\w+)", page)):
        assert re.search(rf"def {member}\b", sources), member
    for path in set(re.findall(r"`((?:\w+/)+\w+\.py)`", page)):
        assert (PACKAGE / path).exists() or (DOCS.parent / path).exists(), path
    pictures = set(re.findall(r"\(images/(\w+\.png)\)", page))
    assert pictures == {*architecture.IMPORT_PICTURES, *architecture.WALK_PICTURES}
    assert OptimalityMonitor.__name__ in page
