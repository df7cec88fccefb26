"""What docs/measuring.md shows, runs and prints what it says."""

import json
import math
import re
from pathlib import Path

import lightning  # noqa: F401  # Not in a test, where what its import sets would be taken for a leak.
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import nclightning
from nclightning.metrics import MEASURES
from nclightning.quantities import DECISION_NAMES, measure_named
from tests.pages import Net

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "measuring.md").read_text()


def test_blocks_run_and_print_what_is_shown(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    labels = torch.arange(60) % 3
    inputs = torch.randn(3, 5)[labels] + 0.2 * torch.randn(60, 5)
    model = Net()
    scope = {
        "model": model,
        "loader": DataLoader(TensorDataset(inputs, labels), batch_size=16, shuffle=True),
        "features": model.body(inputs),
        "labels": labels,
        "weight": model.fc.weight,
        "bias": model.fc.bias,
        "targets": inputs[:, :3].double(),
    }
    monkeypatch.chdir(tmp_path)
    results = []
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(block, scope)
        results.append(scope.pop("found", None))
    printed = re.sub(r", [\d.e+-]+ s\n", "\n", capsys.readouterr().out)
    assert printed == "".join(re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL))
    assert len(results) == 6
    of_regression = {name: float(value) for name, value in results[3].items()}
    assert max(of_regression[name] for name in ("nrc1", "nrc2", "nrc3")) < 1e-28
    assert of_regression["gamma"] == pytest.approx(60 * 1e-3 * 1e-2)
    assert (tmp_path / "collapse.png").exists()
    assert json.loads(scope["text"])["measures"]["nc1"] == results[2]["nc1"]
    assert 0 <= scope["worst"] < 3


def test_options_of_the_page_exist():
    page = PAGE.split("## Measures")[0]
    options = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| ", page, re.MULTILINE)
    names = {name for cell in options for name in re.findall(r"`(\w+)`", cell)}
    assert names <= set(nclightning.measure.__annotations__)
    assert {"measures", "device", "batch_fn"} <= names


def test_the_table_of_measures_is_that_of_the_package():
    section = PAGE.split("## Measures")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| (.*?) ?\|$", section, re.MULTILINE)
    assert [name for name, *_ in rows] == [*MEASURES, *DECISION_NAMES]
    sizes = {"K": 4, "d": 8, "log": math.log, "min": min}
    for name, text, collapsed in rows:
        quantity = measure_named(name)
        assert text == quantity.meaning, name
        formula = collapsed.replace("2K", "2*K").removesuffix(" *")
        value = eval(formula, sizes) if formula else None
        assert value == pytest.approx(quantity.at_collapse(4, 8)), name
        assert collapsed.endswith("*") == (
            quantity.at_collapse(9, 3) is None and quantity.at_collapse(4, 8) is not None
        )
