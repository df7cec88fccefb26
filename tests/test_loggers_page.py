"""What docs/loggers.md shows, runs, and leaves what it says."""

import re
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, TensorDataset

from nclightning import pictures
from tests.offline_runs import finished_wandb_run, mlflow_pictures, wandb_pictures, wandb_rows
from tests.pages import Net

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "loggers.md").read_text()


def test_blocks_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pictures, "_registered", {})
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    torch.manual_seed(0)
    labels = torch.arange(60) % 3
    data = TensorDataset(torch.randn(3, 5)[labels] + 0.2 * torch.randn(60, 5), labels)
    scope = {"model": Net(), "loader": DataLoader(data, batch_size=16)}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    for block in blocks:
        if "mlflow" in block:
            import mlflow  # noqa: PLC0415

            mlflow.set_tracking_uri(f"file:{tmp_path}/mlruns")
        exec(block, scope)
    assert len(blocks) == 4
    events = EventAccumulator(str(tmp_path / "runs")).Reload()
    assert [event.step for event in events.Images("nc")] == [0, 1]
    assert len(events.Scalars("nc/nc1")) == 2
    folder = finished_wandb_run(scope["run"])
    assert [row["_step"] for row, _ in wandb_pictures(folder, "nc")] == [0, 1]
    assert ["nc/nc1" in row for row in wandb_rows(folder)] == [True, True]
    scope["mlflow"].flush_artifact_async_logging()
    scope["mlflow"].end_run()  # The flush begins one.
    (images,) = tmp_path.glob("mlruns/*/*/artifacts/images")
    assert [(tag, step) for tag, step, _ in mlflow_pictures(images.parent)] == [("nc", 0)]
    assert [path.name for path in (tmp_path / "album").iterdir()] == ["nc_0.png"]
