"""Fixtures and guards for every test."""

import functools
import gc
import logging
import os
import shutil
import signal
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # Also in processes that tests start.
import torch
from lightning.fabric.utilities import registry

# A forked process waits for ever for the pool of threads that only its parent had.
torch.set_num_threads(1)

# Each Trainer looks through the metadata of all that is installed for callbacks of plugins; there is one answer.
registry.entry_points = functools.cache(registry.entry_points)


# A forked process cannot free what it has from this one, and a collection that visits it copies its memory.
os.register_at_fork(after_in_child=gc.freeze)


def pytest_collection_finish():
    """Begin to collect garbage, and skip what all tests share."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def no_pictures(monkeypatch):
    """Leave pictures blank, of which no assertion looks at the content: to draw takes a third of a short run's time."""
    monkeypatch.setattr("matplotlib.figure.Figure.draw", lambda *_: None)


@pytest.fixture(scope="session")
def _finished(tmp_path_factory):
    from nclightning.cli import main  # noqa: PLC0415

    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("matplotlib.figure.Figure.draw", lambda *_: None)
        main(["fit", "--config", "ufm_mse", "--trainer.max_steps", "20", "--trainer.enable_progress_bar", "false"])
    return folder / "lightning_logs"


@pytest.fixture
def finished(_finished, tmp_path):
    """Put a run of ``ufm_mse`` that has done its 20 iterations into ``tmp_path``, as version_0."""
    return shutil.copytree(_finished, tmp_path / "lightning_logs") / "version_0"


@pytest.fixture(autouse=True, scope="session")
def _interruptible():
    """Take SIGINT as a terminal would send it, also where the tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _no_leaks():
    """Fail a test that leaves a global setting of torch, or what Lightning says, changed."""
    loaded, before = "lightning" in sys.modules, _settings()
    yield
    after = _settings()
    # Lightning itself sets what it says when it is imported.
    assert (after if loaded else (*after[:-1], before[-1])) == before


def _settings():
    return torch.get_default_dtype(), torch.is_grad_enabled(), logging.getLogger("lightning.pytorch").level
