"""docs/optimality.md says what the code does."""

import doctest
import re
from pathlib import Path

import torch
import yaml
from jsonargparse import ArgumentParser

from nclightning.callbacks import OptimalityMonitor
from nclightning.metrics import Optimality
from nclightning.problems import CrossEntropy

PAGE = Path(__file__).resolve().parents[2] / "docs" / "optimality.md"


def test_what_the_page_shows():
    result = doctest.testfile(str(PAGE), module_relative=False)
    assert result.attempted > 5
    assert not result.failed


def test_the_table_names_all_values():
    metric = Optimality("ce", torch.eye(3))
    metric.update(torch.eye(3), torch.arange(3))
    cells = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", PAGE.read_text(), re.MULTILINE)
    assert {name for cell in cells for name in re.findall(r"`(\w+)`", cell)} == metric.compute().keys()


def test_the_configuration_makes_a_monitor():
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (callback,) = yaml.safe_load(block)["callbacks"]
    assert callback["class_path"] == "nclightning.callbacks.OptimalityMonitor"
    parser = ArgumentParser()
    parser.add_class_arguments(OptimalityMonitor, "monitor")
    made = parser.instantiate_classes(parser.parse_object({"monitor": callback["init_args"]}))
    loss = made.monitor.make_at_epochs()._reference.loss
    assert isinstance(loss, CrossEntropy)
    assert loss.class_weights.tolist() == [0.4, 1.6, 3.1]
