"""docs/optimizers/laws.md says what the code does."""

import doctest
import re
from pathlib import Path

import yaml
from jsonargparse import ArgumentParser

from nclightning.callbacks import OptimizerLaws

PAGE = Path(__file__).resolve().parents[2] / "docs" / "optimizers" / "laws.md"


def test_what_the_page_shows():
    result = doctest.testfile(str(PAGE), module_relative=False)
    assert result.attempted > 20
    assert not result.failed


def test_the_table_has_the_tags_of_the_callback():
    table = PAGE.read_text().split("## The sum of the head's rows")[0]
    tags = set(re.findall(r"`laws/(\w+)`", table))
    documented = set(re.findall(r"``laws/(\w+)``", OptimizerLaws.__doc__))
    assert documented <= tags
    assert tags - documented == {"bias_sum_predicted", "bias_sum_residual", "bias_sum_forcing"}


def test_the_configuration_makes_it():
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (callback,) = yaml.safe_load(block)["trainer"]["callbacks"]
    parser = ArgumentParser()
    parser.add_subclass_arguments(OptimizerLaws, "laws")
    assert isinstance(parser.instantiate_classes(parser.parse_object({"laws": callback})).laws, OptimizerLaws)
