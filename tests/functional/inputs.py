"""Random matrices, and simplex ETFs."""

import torch


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def etf(K, d, seed=0):
    return (torch.eye(K, dtype=torch.float64) - 1 / K) @ torch.linalg.qr(draw(d, K, seed=seed)).Q.T
