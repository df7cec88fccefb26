"""What the README and the pages that it opens with show, runs."""

import copy
import re
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nclightning.functional import class_statistics, etf_deviation

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in ("run", "lightning", "parts", "hosts")}


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:The number of training batches")
def test_python_blocks_run(tmp_path, monkeypatch):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.fc = nn.Linear(7, 512), nn.Linear(512, 10)

        def forward(self, x):
            return self.fc(self.body(x))

    class Module(L.LightningModule):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    torch.manual_seed(0)
    model = Model()
    x, y = torch.randn(40, 7), torch.arange(40) % 10

    def closure():
        model.zero_grad()
        value = nn.functional.cross_entropy(model.fc(model.body(x)), y)
        value.backward()
        return value

    loader = DataLoader(TensorDataset(x, y), batch_size=20)
    scope = {
        "model": model,
        "module": Module(copy.deepcopy(model)),
        "loader": loader,
        "features": model.body(x).detach(),
        "labels": y,
        "weight": model.fc.weight.detach(),
        "bias": model.fc.bias.detach(),
        "backbone": model.body,
        "closure": closure,
    }
    monkeypatch.chdir(tmp_path)
    for page in (README, PAGES["lightning"], PAGES["parts"]):
        for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
            exec(block, scope)
    assert set(scope["trainer"].callback_metrics) == {f"nc/train/nc{i}" for i in (1, 2, 3)}
    assert set(scope["result"]) == {"nc1", "nc2", "nc3"}
    assert scope["problem"].collapses
    assert float(scope["problem"].distance(*scope["optimum"])) < 1e-13
    assert scope["optimizer"].outcome.accepted
    stats = class_statistics(model.body(x), y, 10)
    assert scope["metric"].statistics.counts.tolist() == stats.counts.tolist()
    assert etf_deviation(model.fc.weight.detach()) > 0


def test_links_and_commands_point_at_what_exists():
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / target).exists(), target
    for page in (README, *PAGES.values()):
        for script in re.findall(r"python ((?:benchmarks|examples|docs)/\w+\.py)", page):
            assert (ROOT / script).exists(), script
        for config in re.findall(r"--config (\w+)", page):
            assert (ROOT / "configs" / f"{config}.yaml").exists(), config


def test_it_is_short():
    assert len(README.splitlines()) < 120
