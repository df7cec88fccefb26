"""What docs/report.md shows runs, and its numbers are those of the code."""

import re
import shlex
from pathlib import Path

import torch

import nclightning
from nclightning.cli import main
from nclightning.report import trends, verdicts
from nclightning.report.page import MARK
from tests.recorded import NC, geometric, record

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "report.md").read_text()


def test_commands_and_code_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(2):
        record(tmp_path / f"lightning_logs/version_{number}", {tag: geometric(100, 10) for tag in NC})
    commands = [shlex.split(block) for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)]
    assert len(commands) == 2
    for words in commands:
        main(words[3:])
    features = torch.eye(3).repeat(2, 1)
    result = nclightning.measure(features=features, labels=torch.arange(6) % 3, weight=torch.eye(3))
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(code, {"result": result})
    result.to_json("result.json")
    main(["report", "result.json", "--out", "result.html"])
    for name in ("report", "comparison", "both", "result"):
        assert MARK in (tmp_path / f"{name}.html").read_text()


def test_limits_of_the_page_are_those_of_the_code():
    assert verdicts.roundoff_of("nc2", "float64") == verdicts.TARGET == 1e-12
    assert verdicts.roundoff_of("nc2", "float32") == 1e-5
    assert trends.LEAST_READINGS == 5
    for limit in ("1e-12", "float32: 1e-5", "at least five readings", "within a factor of 1.2", "1.01/mu"):
        assert limit in PAGE
