"""What the README shows, runs."""

import re
from pathlib import Path

import torch
from torch import nn

from nclightning.functional import class_statistics, etf_deviation

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_blocks_run():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.fc = nn.Linear(7, 512), nn.Linear(512, 10)

    torch.manual_seed(0)
    model = Model()
    x, y = torch.randn(40, 7), torch.arange(40) % 10

    def closure():
        model.zero_grad()
        value = nn.functional.cross_entropy(model.fc(model.body(x)), y)
        value.backward()
        return value

    scope = {"model": model, "loader": [(x, y)], "backbone": model.body, "closure": closure}
    for block in blocks("python"):
        exec(block, scope)
    assert scope["problem"].collapses
    assert float(scope["problem"].distance(*scope["optimum"])) < 1e-13
    assert scope["optimizer"].outcome.accepted
    stats = class_statistics(model.body(x), y, 10)
    assert scope["metric"].statistics.counts.tolist() == stats.counts.tolist()
    assert etf_deviation(model.fc.weight.detach()) > 0


def test_links_and_commands_point_at_what_exists():
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / target).exists(), target
    for script in re.findall(r"python (benchmarks/\w+\.py)", README):
        assert (ROOT / script).exists(), script
    for config in re.findall(r"--config (\w+)", README):
        assert (ROOT / "configs" / f"{config}.yaml").exists(), config
