"""What docs/loops.md shows, runs and is right."""

import re
import warnings
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter

from nclightning import measure
from tests.pages import Net
from tests.trainers import forget_accelerator

pytest.importorskip("accelerate")
ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "loops.md").read_text()


def test_blocks_run(tmp_path):
    torch.manual_seed(0)
    labels = torch.arange(60) % 3
    inputs = torch.randn(3, 5)[labels] + 0.2 * torch.randn(60, 5)
    model, plain_model = Net(), Net()
    scope = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "plain_model": plain_model,
        "plain_optimizer": torch.optim.SGD(plain_model.parameters(), lr=0.1),
        "criterion": nn.functional.cross_entropy,
        "train_loader": DataLoader(TensorDataset(inputs, labels), batch_size=16, shuffle=True),
        "plain_loader": DataLoader(TensorDataset(inputs, labels), batch_size=16, shuffle=True),
        "val_loader": DataLoader(TensorDataset(inputs[:15], labels[:15]), batch_size=16),
        "noise_loader": DataLoader(TensorDataset(torch.randn(20, 5), torch.zeros(20)), batch_size=16),
        "writer": SummaryWriter(tmp_path),
        "rank": 0,
    }
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 6
    forget_accelerator()
    results = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for block in blocks:
            exec(block, scope)
            results.append(scope["found"])
    forget_accelerator()
    between, sets, online, fabric, accelerated, alone = results
    scope["writer"].close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert sorted(events.Tags()["scalars"]) == ["nc/train/nc1", "nc/train/nc2", "nc/train/nc3"]
    assert events.Scalars("nc/train/nc1")[-1].value == pytest.approx(between["nc1"], rel=1e-6)
    assert set(sets["val"]) == {"nc1", "accuracy", "ncc_accuracy"}
    assert set(sets["noise"]) == {"nc5"}
    assert online.num_samples == fabric.num_samples == 60
    assert accelerated == alone == measure(plain_model, scope["plain_loader"])


def test_the_pages_lead_to_each_other():
    assert "(loops.md)" in (ROOT / "docs" / "measuring.md").read_text()
    for target in re.findall(r"\]\(([\w./]+)\)", PAGE):
        assert (ROOT / "docs" / target).exists()
