"""Fixtures and guards for every test."""

import pytest
import torch


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def _no_leaks():
    """Fail a test that leaves a global setting of torch changed."""
    before = (torch.get_default_dtype(), torch.is_grad_enabled())
    yield
    assert (torch.get_default_dtype(), torch.is_grad_enabled()) == before
