"""Fixtures and guards for every test."""

import signal

import pytest
import torch

# A forked process waits for ever for the pool of threads that only its parent had.
torch.set_num_threads(1)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _interruptible():
    """Take SIGINT as a terminal would send it, also where the tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _no_leaks():
    """Fail a test that leaves a global setting of torch changed."""
    before = (torch.get_default_dtype(), torch.is_grad_enabled())
    yield
    assert (torch.get_default_dtype(), torch.is_grad_enabled()) == before
