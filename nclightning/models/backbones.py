"""What makes features from a batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["FeatureTable"]


class FeatureTable(nn.Module):
    """Free features, one row per sample, looked up by sample index: the backbone of the UFM.

    Args:
        num_samples: N.
        feature_dim: d.
        dtype: Dtype of the table.
    """

    def __init__(self, num_samples: int, feature_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.features = nn.Parameter(torch.zeros(num_samples, feature_dim, dtype=dtype))

    def forward(self, index: Tensor) -> Tensor:
        """Look up rows.

        Args:
            index: Sample indices ``(B,)``, int64.

        Returns:
            Features ``(B, d)``.
        """
        return self.features.index_select(0, index)
