"""The network of the pages whose blocks are run."""

import lightning  # noqa: F401  # Not in a test, where what its import sets would be taken for a leak.
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.fc = nn.Sequential(nn.Linear(5, 8), nn.Tanh()), nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(self.body(x))
