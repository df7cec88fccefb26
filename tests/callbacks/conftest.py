"""What tests of callbacks share."""

import pytest
import torch

from tests.callbacks.attached import K, N


@pytest.fixture
def samples():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, 5, generator=generator), torch.randint(K, (N,), generator=generator)
